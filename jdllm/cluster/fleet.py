"""A fleet: what looks like one LLM, and has a crew of workers do what takes a device."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from jdllm.batches import plan_batches
from jdllm.cluster.connect import share
from jdllm.cluster.crew import Crew
from jdllm.decode import DecodeConfig
from jdllm.kernels.choose import choices
from jdllm.llm import LLM, Batch, Prompt
from jdllm.runtime.environment import environment, peak_bytes
from jdllm.score.likelihood import LikelihoodConfig
from jdllm.score.scoring import Ids, Likelihood

ENGINE_BATCHES = 4  # batches of rows that go to a worker at once where an engine decodes them


class RemoteMaps:
    """The maps of the workers' adapter."""

    def __init__(self, crew: Crew):
        self._crew = crew

    def digest(self, settings: Any) -> str:
        """As `Maps.digest`."""
        return self._crew.ask("maps", "digest", settings)

    def alignment(self, settings: Any) -> dict[str, float]:
        """As `Maps.alignment`."""
        return self._crew.ask("maps", "alignment", settings)


class Fleet(LLM):
    """An LLM without weights: it tokenises and plans, and its workers decode and score.

    A task is a batch of rows, so that a lost worker costs one batch.
    """

    def __init__(self, crew: Crew, engine: str):
        self.crew = crew
        parts = crew.ask("parts")
        self.config, self.tokenizer = parts["config"], parts["tokenizer"]
        self.defaults, self._verifier = parts["defaults"], parts["verifier"]
        kinds = np.array([SimpleNamespace(device_kind=parts["device"])])
        self.mesh: Any = SimpleNamespace(shape=parts["shape"], devices=kinds)  # a worker's
        self.maps: Any = RemoteMaps(crew)
        self.engine: Any = engine
        self._fingerprint = crew.fingerprint or ""

    @classmethod
    def start(cls, settings: dict[str, Any], workers: int, gpus: float | None) -> "Fleet":
        """A fleet whose workers load what `settings` of LLM.load say.

        ValueError or OSError, in one sentence, as from LLM.load and where there is no cluster.
        """
        if jax.process_count() > 1:
            raise ValueError("executor=ray starts its workers itself: leave jdllm.launch out")
        return cls(Crew(settings, workers, share(settings["mesh"], gpus)), settings["engine"])

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        config: DecodeConfig | None = None,
        *,
        batch_size: int = 32,
        chat: bool = True,
        stop: Sequence[str] = (),
        samples: Sequence[int] | None = None,
        watch: Callable[[int, Any], None] | None = None,
    ) -> Iterator[Batch]:
        """As `LLM.stream`; batches come in the order in which workers end them."""
        rows, config = self.encode(prompts, chat), self.resolve(config)
        samples = numbered(rows) if samples is None else samples
        size = batch_size * (ENGINE_BATCHES if self.engine == "on" and not watch else 1)
        shards = plan_batches([len(row) for row in rows], size, self.mesh.shape["data"])
        options = {"config": config, "batch_size": batch_size, "stop": tuple(stop)}
        tasks = [
            (
                [rows[i] for i in shard],
                options | {"samples": [samples[i] for i in shard]},
                watch is not None,
            )
            for shard in shards
        ]
        for number, (batches, seen) in self.crew.run("stream", tasks):
            shard = shards[number]
            for i, record in seen:
                assert watch is not None
                watch(shard[i], record)
            for batch in batches:
                own = [shard[i] for i in batch.index]
                yield Batch(
                    own, batch.completions, batch.forwards, batch.seconds, batch.compile_seconds,
                    batch.shared_tokens,
                )  # fmt: skip

    def loglikelihood(
        self,
        pairs: Sequence[tuple[Ids, Ids]],
        config: LikelihoodConfig | None = None,
        *,
        batch_size: int = 32,
        finished: Callable[[int, Likelihood], None] = lambda index, found: None,
    ) -> list[Likelihood]:
        """As `LLM.loglikelihood`; `finished` is called a batch at a time."""
        order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
        shards = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        tasks = [([pairs[i] for i in shard], config, batch_size) for shard in shards]
        found: dict[int, Likelihood] = {}
        for number, scores in self.crew.run("loglikelihood", tasks):
            for i, score in zip(shards[number], scores, strict=True):
                found[i] = score
                finished(i, score)
        return [found[i] for i in range(len(pairs))]

    def fingerprint(self) -> str:
        """The workers', which all have the same."""
        return self._fingerprint

    def verifier_fingerprint(self) -> str | None:
        """The workers'."""
        return self._verifier


def numbered(rows: Sequence[Sequence[int]]) -> list[int]:
    """How often each row came before: what tells draws from the same prompt apart."""
    seen: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for row in rows:
        numbers.append(seen[tuple(row)])
        seen[tuple(row)] += 1
    return numbers


def surroundings(llm: LLM) -> dict[str, Any]:
    """What the work of a model is measured on."""
    if isinstance(llm, Fleet):
        return llm.crew.ask("surroundings") | {"workers": llm.crew.count}
    return environment()


def kernels(llm: LLM) -> list[dict[str, Any]]:
    """Which kernels were chosen for a model, and why; of workers, by one of them."""
    return llm.crew.ask("kernels") if isinstance(llm, Fleet) else choices()


def peak(llm: LLM) -> int:
    """What the first device of a model has held at most so far; of a CPU, its process."""
    return llm.crew.ask("peak_bytes") if isinstance(llm, Fleet) else peak_bytes()
