"""jdllm as an lm-eval model: importing this module registers it, running it is lm-eval's command.

import lm_eval, jdllm.evaluation.harness
lm_eval.simple_evaluate(model="jdllm", model_args="model=bundled,mesh=1x1", tasks=["gsm8k"])

python -m jdllm.evaluation.harness run --model jdllm --model_args model=bundled --tasks gsm8k
"""

import contextlib
import dataclasses
import difflib
import functools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  a registry that holds our name alone would hide lm-eval's own
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from jdllm.decode import DecodeConfig
from jdllm.decode.presets import preset_settings
from jdllm.evaluation.settings import check_verifier
from jdllm.evaluation.speed import Cost, Speed
from jdllm.llm import LLM, Completion
from jdllm.runtime import processes
from jdllm.runtime.files import alone
from jdllm.runtime.journal import Journal, digest
from jdllm.score.likelihood import LikelihoodConfig
from jdllm.score.scoring import Likelihood
from jdllm.tokenizer import chat_frame

DEFAULT_LENGTH = 128  # columns, where neither the settings, the model nor the request names any
LM_EVAL_DEVICE = "cuda:0"  # what lm-eval's command line passes where the user names none
INSTRUCT = (
    "the model has a chat template: likelihoods are made for base models, and those of an "
    "instruction-tuned one are often poor; tasks that generate text score it better"
)
log = logging.getLogger("jdllm")


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished request to generate."""

    task: str | None
    doc_id: int | None
    sample: int
    """Its number among the repeats of the same request."""
    prompt: str
    completion: Completion
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Group:
    """Requests that may share a batch: same stop strings, same lengths."""

    stop: tuple[str, ...]
    decode: DecodeConfig


class JdllmLM(LM):
    """An LLM under lm-eval's interface; `records` and `likelihoods` grow with every call.

    A prompt is framed as one user message where `chat` is on and the model has a chat template,
    unless lm-eval framed it (apply_chat_template=True): then it is passed on as it is. Contexts
    whose continuations are scored are never framed here.
    """

    def __init__(
        self,
        model: str | LLM = "bundled",
        *,
        decode: DecodeConfig | None = None,
        likelihood: LikelihoodConfig | None = None,
        mesh: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        batch_size: int | str = 32,
        chat: bool = True,
        progress: bool = True,
        leave: bool = True,
        journal: Journal | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        verifier: str | None = None,
        allow_unknown: Sequence[str] = (),
        **settings: Any,
    ):
        """Loads `model` (see LLM.load), or wraps an LLM that is loaded already.

        Decoding is set by `decode`, or by words such as decode.threshold=0.8 among lm-eval's
        model_args; the estimate of likelihoods by `likelihood`, or likelihood.mc_num=32. What is
        finished goes into `journal` (a folder, or a Journal) and is not done again. `verifier` is
        the causal model that decode.rule=verify asks; a loaded LLM has its own. `allow_unknown` are
        keys of a Hugging Face config.json to ignore (as text: separated by spaces).
        `max_batch_size` is lm-eval's and not needed: batches never outgrow `batch_size`. ValueError
        for a word that is no setting, OSError where another run holds the folder.
        """
        super().__init__()
        if device not in (None, LM_EVAL_DEVICE):
            raise ValueError(f"device={device} is for PyTorch models; place this one with mesh=")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} must be a number of rows, 1 or more")
        bases = {"decode": decode or DecodeConfig(), "likelihood": likelihood or LikelihoodConfig()}
        chosen = read_settings(settings, bases)
        self.decode: DecodeConfig = chosen["decode"]
        self.likelihood: LikelihoodConfig = chosen["likelihood"]
        if isinstance(model, LLM):
            self.llm = model
        else:
            check_verifier(verifier, [self.decode])
            self.llm = LLM.load(model, mesh, dtype, seed, verifier, allow_unknown)
        self.tokenizer: Any = self.llm.tokenizer
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, and the prompts of a task are text")
        self.batch_size = int(batch_size)
        self.chat = chat
        self.progress, self.leave = progress, leave
        if isinstance(journal, str):
            self._lock = contextlib.ExitStack()  # held as long as this object, or the process
            self._lock.enter_context(alone(Path(journal)))
            journal = Journal(Path(journal) / "finished.jsonl")
        self.journal = journal
        self.records: list[Record] = []
        self.likelihoods: list[Likelihood] = []

    @property
    def speed(self) -> Speed:
        """What the records cost."""
        return Speed.of((record.completion, record.cost) for record in self.records)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The model's; see jdllm.store.fingerprint."""
        return self.llm.fingerprint()

    @functools.cached_property
    def verifier_fingerprint(self) -> str | None:
        """The verifier's, where there is one."""
        return self.llm.verifier_fingerprint()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions in the order of `requests`, each cut at the first of its `until` strings.

        A request's max_gen_toks counts only where neither the decode settings nor the model say
        how long a completion is; sampling is set by the decode settings, never by a request.
        A request that comes several times (lm-eval's repeats) draws anew each time.
        """
        if not requests:
            return []
        found: dict[int, Record] = {}
        rows = self._encode([request.args[0] for request in requests])
        groups = self._groups(requests)
        keys, samples = self._keys(requests, rows, groups)
        bar = self._bar(requests, disable_tqdm)
        for i, request in enumerate(requests):
            if keys[i] in (self.journal or ()):
                found[i] = self._remember(request, samples[i], keys[i])
                bar.update(1)
        with bar:
            for group, members in groups.items():
                members = [i for i in members if i not in found]
                for batch in self.llm.stream(
                    [rows[i] for i in members],
                    group.decode,
                    batch_size=self.batch_size,
                    stop=group.stop,
                    samples=[samples[i] for i in members],
                ):
                    cost = Cost.of(batch)
                    chosen = [members[row] for row in batch.index]
                    for i, completion in zip(chosen, batch.completions, strict=True):
                        request = requests[i]
                        found[i] = Record(
                            request.task_name, request.doc_id, samples[i], request.args[0],
                            completion, cost,
                        )  # fmt: skip
                    self._keep({keys[i]: dataclasses.asdict(found[i]) for i in chosen})
                    for i in chosen:
                        self.cache_hook.add_partial(
                            "generate_until", requests[i].args, found[i].completion.text
                        )
                    bar.update(len(chosen))
        self.records += [found[i] for i in range(len(requests))]
        return [found[i].completion.text or "" for i in range(len(requests))]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) and whether it is the greedy one (where that is checked).

        An estimate of a bound, by `likelihood`; `likelihoods` has the standard errors. Text is
        split as in LLaDA's harness: a context's trailing spaces go to the continuation, and both
        are tokenised together.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        scores = self._score(requests, [[pair] for pair in pairs], disable_tqdm)
        return [(score.value, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p(text) of whole texts.

        A text longer than the model's canvas is cut into windows of that length, which are scored
        each by itself and added up.
        """
        window = self.llm.config.max_length - 1  # room for an eos
        texts = [self.llm.encode([request.args[0]], chat=False)[0] for request in requests]
        split = [
            [([], row[i : i + window]) for i in range(0, len(row), window)] for row in texts
        ]  # fmt: skip
        return [score.value for score in self._score(requests, split, disable_tqdm)]

    def _score(
        self, requests: list[Instance], pairs: list[list[tuple]], hidden: bool
    ) -> list[Likelihood]:
        """The summed score of each request's pairs; what the journal holds is not scored again."""
        if self.tokenizer.chat_template and requests:
            log.warning(INSTRUCT)
        model = self.fingerprint if self.journal is not None else None
        facts = {"model": model, "likelihood": dataclasses.asdict(self.likelihood)}
        keys, _ = number_repeats(
            [
                digest(facts | {"task": r.task_name, "doc_id": r.doc_id, "pairs": p})
                for r, p in zip(requests, pairs, strict=True)
            ]
        )
        journal: Any = self.journal or {}
        found = {i: Likelihood(**journal[k]["score"]) for i, k in enumerate(keys) if k in journal}
        owners = [i for i, split in enumerate(pairs) for _ in split if i not in found]
        collected: dict[int, list[Likelihood]] = {i: [] for i in owners}
        bar = self._bar(requests, hidden)
        bar.update(len(found))

        def finished(number: int, score: Likelihood) -> None:
            i = owners[number]
            collected[i].append(score)
            if len(collected[i]) < len(pairs[i]):
                return
            found[i] = functools.reduce(Likelihood.__add__, collected[i])
            facts = {"task": requests[i].task_name, "doc_id": requests[i].doc_id}
            self._keep({keys[i]: facts | {"score": dataclasses.asdict(found[i])}})
            bar.update(1)

        with bar:
            missing = [pair for i, split in enumerate(pairs) for pair in split if i not in found]
            self.llm.loglikelihood(
                missing, self.likelihood, batch_size=self.batch_size, finished=finished
            )
        scores = [found[i] for i in range(len(requests))]
        self.likelihoods += scores
        return scores

    def _keep(self, finished: dict[str, dict[str, Any]]) -> None:
        """Appends records to the journal, if there is one; equal requests are kept once."""
        if self.journal is not None:
            self.journal.append({"key": key} | facts for key, facts in finished.items())

    def _remember(self, request: Instance, sample: int, key: str) -> Record:
        """What the journal holds under `key`, of an earlier run or of this one."""
        kept: Any = self.journal and self.journal[key]
        completion, cost = Completion(**kept["completion"]), Cost(**kept["cost"])
        return Record(request.task_name, request.doc_id, sample, request.args[0], completion, cost)

    def _keys(
        self, requests: Sequence[Instance], rows: Sequence[list[int]], groups: dict[Group, list]
    ) -> tuple[list[str], list[int]]:
        """What tells each request from any other, in any run, and its number among its repeats."""
        owner = {i: group for group, members in groups.items() for i in members}
        model = self.fingerprint if self.journal is not None else None
        facts = [
            {
                "model": model,
                "decode": dataclasses.asdict(owner[i].decode),
                "stop": owner[i].stop,
                "task": request.task_name,
                "doc_id": request.doc_id,
                "prompt": rows[i],
            }
            for i, request in enumerate(requests)
        ]
        for i, fact in enumerate(facts):
            if model and owner[i].decode.rule == "verify":
                fact["verifier"] = self.verifier_fingerprint
        return number_repeats([digest(fact) for fact in facts])

    def _bar(self, requests: Sequence[Instance], hidden: bool) -> tqdm:
        """A progress bar over requests, shown by one of several processes."""
        name = requests[0].task_name if requests else None
        hidden = hidden or not self.progress or not processes.leads()
        return tqdm(total=len(requests), desc=name, unit="prompt", disable=hidden, leave=self.leave)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval files cached requests under."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for lm-eval's records; None where it is not asked for."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders messages; without a generation prompt the last message is left open."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _groups(self, requests: Sequence[Instance]) -> dict[Group, list[int]]:
        """Indices of the requests that may share a batch."""
        groups: dict[Group, list[int]] = {}
        for i, request in enumerate(requests):
            settings: dict[str, Any] = request.arguments[1]
            until = settings.get("until") or ()
            stop = (until,) if isinstance(until, str) else tuple(until)
            config = self._resolve(settings.get("max_gen_toks") or DEFAULT_LENGTH)
            groups.setdefault(Group(stop, config), []).append(i)
        return groups

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and its continuation."""
        bare = context.rstrip()
        whole, prefix = self.llm.encode([context + continuation, bare], chat=False)
        return prefix, whole[len(prefix) :]

    def _resolve(self, length: int) -> DecodeConfig:
        """The decode settings, with `length` (filled up to whole blocks) as the last resort."""
        usual = self.llm.defaults.block_length or 32
        block = self.decode.block_length or min(usual, length)
        return self.llm.resolve(self.decode, gen_length=-(-length // block) * block)

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of the prompts, framed where lm-eval has not done it.

        A prompt that starts with the token that every framed prompt starts with has been framed:
        that holds for system messages, few-shot turns and requests from lm-eval's cache too.
        """
        rows = self.llm.encode(prompts, chat=False)
        if not self.chat:
            return rows
        before, _ = chat_frame(self.tokenizer)
        opening = self.llm.encode([before], chat=False)[0][:1]
        framed = self.llm.encode(prompts, chat=True)
        return [
            row if opening and row[:1] == opening else with_frame
            for row, with_frame in zip(rows, framed, strict=True)
        ]


register_model("jdllm")(JdllmLM)  # as a decorator it would hide the signature from type checkers


def number_repeats(keys: Sequence[str]) -> tuple[list[str], list[int]]:
    """Keys that tell repeats of a key apart, and how often each key came before."""
    seen: Counter[str] = Counter()
    numbers = []
    for key in keys:
        numbers.append(seen[key])
        seen[key] += 1
    return [digest([key, n]) for key, n in zip(keys, numbers, strict=True)], numbers


def read_settings[T](words: dict[str, Any], bases: dict[str, T]) -> dict[str, T]:
    """`bases` changed by words such as decode.threshold, which is how model_args set decoding.

    ValueError, with the nearest names, for a word that is not a setting, or no preset's name.
    """
    words = dict(words)
    preset = words.pop("decode.preset", None)
    known = {
        f"{name}.{field.name}": (name, field.name)
        for name, base in bases.items()
        for field in dataclasses.fields(base)  # pyright: ignore[reportArgumentType]
    }
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known) or list(known)
            raise ValueError(f"{word} is not a setting of this model; try {', '.join(near)}")
    changes: dict[str, dict[str, Any]] = {name: {} for name in bases}
    if preset:
        changes["decode"] |= preset_settings(preset)
    for word, value in words.items():
        name, field = known[word]
        changes[name][field] = value
    return {
        name: dataclasses.replace(base, **changes[name])  # pyright: ignore[reportArgumentType]
        for name, base in bases.items()
    }
