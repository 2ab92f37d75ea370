"""jdllm as an lm-eval model, and jdllm's tasks as lm-eval tasks.

Any lm-eval task that generates text can be run: importing this module registers the model.

import lm_eval, jdllm.harness
lm_eval.simple_evaluate(model="jdllm", model_args="model=bundled,mesh=1x1", tasks=["gsm8k"])
"""

import contextlib
import dataclasses
import difflib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import lm_eval.models  # noqa: F401  a registry that holds our name alone would hide lm-eval's own
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from jdllm.decode import DecodeConfig
from jdllm.decode.presets import preset_settings
from jdllm.llm import LLM, Batch, Completion
from jdllm.tasks import Doc, Task
from jdllm.tokenizer import chat_frame

DEFAULT_LENGTH = 128  # columns, where neither the settings, the model nor the request names any
GENERATES_ONLY = (
    "jdllm scores generated text so far: a likelihood under a diffusion model is an estimate that "
    "is still to come; choose tasks of output_type generate_until"
)


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a run cost; every rate is 0 before anything ran."""

    completion_tokens: int = 0
    """Tokens up to the end id, prompts never counted."""
    row_nfe: int = 0
    """Sum of the rows' NFE."""
    forwards: int = 0
    """Model calls of the batches."""
    seconds: float = 0.0
    """On the device and back, without compilation."""
    compile_seconds: float = 0.0

    @classmethod
    def of(cls, batch: Batch) -> "Speed":
        """The cost of one batch."""
        return cls(
            completion_tokens=sum(len(done.ids) for done in batch.completions),
            row_nfe=sum(done.nfe for done in batch.completions),
            forwards=batch.forwards,
            seconds=batch.seconds,
            compile_seconds=batch.compile_seconds,
        )

    def __add__(self, other: "Speed") -> "Speed":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Speed(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens a second."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Completion tokens for each model evaluation of a row."""
        return self.completion_tokens / self.row_nfe if self.row_nfe else 0.0

    @property
    def forwards_per_second(self) -> float:
        """Model calls of the batches a second."""
        return self.forwards / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished request."""

    task: str | None
    doc_id: int | None
    prompt: str
    completion: Completion


class JdllmLM(LM):
    """An LLM under lm-eval's interface; `records` and `speed` grow with every call.

    A prompt is framed as one user message where `chat` is on and the model has a chat template,
    unless lm-eval framed it (apply_chat_template=True): then it is passed on as it is.
    """

    def __init__(
        self,
        model: str | LLM = "bundled",
        *,
        decode: DecodeConfig | None = None,
        mesh: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        batch_size: int | str = 32,
        chat: bool = True,
        progress: bool = True,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ):
        """Loads `model` (see LLM.load), or wraps an LLM that is loaded already.

        Decoding is set by `decode`, or by words such as decode.threshold=0.8 among lm-eval's
        model_args. `max_batch_size` is lm-eval's and not needed: batches never outgrow
        `batch_size`. ValueError for a word that is no setting.
        """
        super().__init__()
        if device is not None:
            raise ValueError(f"device={device} is for PyTorch models; place this one with mesh=")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} must be a number of rows, 1 or more")
        self.decode = read_settings(settings, decode or DecodeConfig())
        self.llm = model if isinstance(model, LLM) else LLM.load(model, mesh, dtype, seed)
        self.tokenizer: Any = self.llm.tokenizer
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, and the prompts of a task are text")
        self.batch_size = int(batch_size)
        self.chat = chat
        self.progress = progress
        self.records: list[Record] = []
        self.speed = Speed()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions in the order of `requests`, each cut at the first of its `until` strings.

        A request's max_gen_toks counts only where neither the decode settings nor the model say
        how long a completion is; sampling is set by the decode settings, never by a request.
        """
        if not requests:
            return []
        found: dict[int, Completion] = {}
        name = requests[0].task_name
        hidden = disable_tqdm or not self.progress
        with tqdm(total=len(requests), desc=name, unit="prompt", disable=hidden) as bar:
            for (until, config), members in self._groups(requests).items():
                prompts = self._encode([requests[i].args[0] for i in members])
                for batch in self.llm.stream(
                    prompts, config, batch_size=self.batch_size, stop=until
                ):
                    for row, completion in zip(batch.index, batch.completions, strict=True):
                        i = members[row]
                        found[i] = completion
                        self.cache_hook.add_partial(
                            "generate_until", requests[i].args, completion.text
                        )
                    self.speed += Speed.of(batch)
                    bar.update(len(batch.index))
        self.records += [
            Record(request.task_name, request.doc_id, request.args[0], found[i])
            for i, request in enumerate(requests)
        ]
        return [found[i].text or "" for i in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not there yet: raises NotImplementedError."""
        raise NotImplementedError(GENERATES_ONLY)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not there yet: raises NotImplementedError."""
        raise NotImplementedError(GENERATES_ONLY)

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

    def _groups(
        self, requests: Sequence[Instance]
    ) -> dict[tuple[tuple[str, ...], DecodeConfig], list[int]]:
        """Indices of the requests that may share a batch: same `until`, same lengths."""
        groups: dict[tuple[tuple[str, ...], DecodeConfig], list[int]] = {}
        for i, request in enumerate(requests):
            settings: dict[str, Any] = request.arguments[1]
            until = settings.get("until") or ()
            stop = (until,) if isinstance(until, str) else tuple(until)
            config = self._resolve(settings.get("max_gen_toks") or DEFAULT_LENGTH)
            groups.setdefault((stop, config), []).append(i)
        return groups

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


def read_settings(words: dict[str, Any], base: DecodeConfig) -> DecodeConfig:
    """`base` changed by words such as decode.threshold, which is how model_args set decoding.

    ValueError, with the nearest names, for a word that is not a setting, or no preset's name.
    """
    words = dict(words)
    preset = words.pop("decode.preset", None)
    named = preset_settings(preset) if preset else {}
    known = {f"decode.{field.name}": field.name for field in dataclasses.fields(DecodeConfig)}
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known) or list(known)
            raise ValueError(f"{word} is not a setting of this model; try {', '.join(near)}")
    given = {known[word]: value for word, value in words.items()}
    return dataclasses.replace(base, **(named | given))


def as_lm_eval(task: Task, docs: Sequence[Doc]) -> Any:
    """An lm-eval task over `docs`: the prompts, targets and grades of `task`, means of metrics."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    metrics = task.grade(docs[0], "")
    return ConfigurableTask(
        config={
            "task": task.name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(list(docs))},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": task.prompt,
            "doc_to_target": task.target,
            "process_results": lambda doc, results: task.grade(doc, results[0]),
            "generation_kwargs": {"until": [], "max_gen_toks": task.gen_length},
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in metrics
            ],
            "metadata": {"version": 1},
        }
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides lm-eval's remarks on task configs and its instant bar over building requests.

    Errors still show, and so does the bar of the model.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with mock.patch("lm_eval.api.task.tqdm", functools.partial(tqdm, disable=True)):
            yield
    finally:
        logger.setLevel(level)


@dataclasses.dataclass(frozen=True)
class Score:
    """What lm-eval says about a task."""

    metrics: dict[str, float]
    """Means over the documents."""
    stderr: dict[str, float | None]
    """lm-eval's standard errors; None where one document has none."""
    samples: list[dict[str, Any]]
    """lm-eval's sample rows, in the order of the documents."""


def run_task(lm: LM, task: Task, docs: Sequence[Doc]) -> Score:
    """Runs `task` on `docs` through lm-eval.

    This is lm_eval.evaluate, the part of simple_evaluate behind its look-ups of tasks by name:
    those take up to half a minute, and its call of git complains outside of a checkout.
    """
    with quiet():
        from lm_eval.evaluator import evaluate

        lm_task = as_lm_eval(task, docs)
        loaded: Any = {"tasks": {task.name: lm_task}, "groups": {}}
        results: Any = evaluate(lm=lm, task_dict=loaded)
    found = results["results"][task.name]
    names = task.grade(docs[0], "")
    errors = {name: found[f"{name}_stderr,none"] for name in names}
    return Score(
        metrics={name: float(found[f"{name},none"]) for name in names},
        stderr={name: None if error == "N/A" else float(error) for name, error in errors.items()},
        samples=sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"]),
    )
