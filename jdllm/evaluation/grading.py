"""lm-eval's verdict on one task or group: its tasks run on a model, the samples as rows."""

import contextlib
import dataclasses
import functools
import logging
import numbers
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from tqdm import tqdm

from jdllm.evaluation.harness import JdllmLM
from jdllm.tasks import Doc, Task
from jdllm.tasks.lm_eval import ours, resolve
from jdllm.tokenizer import unmarked


def as_lm_eval(task: Task, docs: Sequence[Doc], samples: int = 1) -> Any:
    """An lm-eval task over `docs`: the prompts, targets and grades of `task`, means of metrics.

    With several samples per document, its metrics are the means of theirs.
    """
    return resolve.build(ours.of_task(task, docs), samples)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides lm-eval's remarks on task configs and its instant bar over building requests.

    Errors still show, and so does the bar of the model.
    """
    import datasets

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with mock.patch("lm_eval.api.task.tqdm", functools.partial(tqdm, disable=True)):
            yield
    finally:
        logger.setLevel(level)
        datasets.enable_progress_bars()


@dataclasses.dataclass(frozen=True)
class Score:
    """What lm-eval says about a task or group; a metric behind a filter is "metric,filter"."""

    metrics: dict[str, float]
    """Means over the documents, by lm-eval's own names without ",none"."""
    stderr: dict[str, float | None]
    """lm-eval's standard errors; None where one document has none."""
    samples: list[dict[str, Any]]
    """A row per document: task, doc_id, target, prompt, metrics, each: those of every sample, and
    filtered: by filter, what it left of every sample."""


def plain(name: str) -> str:
    """lm-eval's "metric,filter" without the name of the filter that does nothing."""
    return name.removesuffix(",none")


def grade(lm: JdllmLM, name: str, loaded: dict[str, Any], **settings: Any) -> Score:
    """Runs what resolve() loaded for `name` through lm-eval.

    This is lm_eval.evaluate, the part of simple_evaluate behind its look-ups of tasks by name:
    those take up to half a minute, and its call of git complains outside of a checkout. Prompts of
    tasks that generate are one user turn, examples included, framed by the model where lm.chat says
    so; lm-eval frames those with a prefix of the answer, which stays open. Contexts whose
    continuations are scored are not framed.
    """
    with quiet():
        from lm_eval.evaluator import evaluate

        prefixed = any(task.config.gen_prefix for task in loaded["tasks"].values())
        framed = lm.frames and prefixed
        results: Any = evaluate(
            lm=lm, task_dict=loaded, apply_chat_template=framed, fewshot_as_multiturn=False,
            confirm_run_unsafe_code=True, **settings,
        )  # fmt: skip
    name = resolve.ALIASES.get(name, name)
    table = results["results"].get(name) or next(iter(results["results"].values()))
    found = {
        key: value
        for key, value in table.items()
        if "," in key and "_stderr," not in key and isinstance(value, numbers.Real)
    }
    errors = {key: table.get(key.replace(",", "_stderr,", 1)) for key in found}
    return Score(
        metrics={plain(key): float(value) for key, value in found.items()},
        stderr={
            plain(key): float(error) if isinstance(error, numbers.Real) else None
            for key, error in errors.items()
        },
        samples=[
            row
            for member, task in loaded["tasks"].items()
            for row in rows(member, task, results["samples"][member])
        ],
    )


def rows(name: str, task: Any, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each document, from lm-eval's one for each document and filter."""
    found: dict[int, dict[str, Any]] = {}
    for sample in samples:
        row = found.setdefault(
            sample["doc_id"],
            {
                "task": name,
                "doc_id": sample["doc_id"],
                "target": str(sample["target"]),
                "prompt": unmarked(str(sample["arguments"][0][0])),
                "metrics": {},
                "filtered": {},
                "each": [{} for _ in range(task.config.repeats)],
            },
        )
        left = sample["filtered_resps"]
        row["filtered"][sample["filter"]] = left[0] if isinstance(left[0], list) else left
        part = "," + sample["filter"]
        whole = {plain(key + part): sample[key] for key in sample["metrics"]}
        row["metrics"] |= {k: float(v) for k, v in whole.items() if isinstance(v, numbers.Real)}
        if hasattr(task, "grade"):  # of several samples
            for each, graded in zip(
                row["each"], task.grade(sample["doc"], sample["filtered_resps"]), strict=True
            ):
                each |= {plain(key + part): float(value) for key, value in graded.items()}
    for row in found.values():
        row["each"] = [each or row["metrics"] for each in row["each"]]
    return [found[doc_id] for doc_id in sorted(found)]


def run_task(lm: JdllmLM, task: Task, docs: Sequence[Doc], samples: int = 1) -> Score:
    """Runs one of our generated tasks on `docs`."""
    loaded = {"tasks": {task.name: as_lm_eval(task, docs, samples)}, "groups": {}}
    return grade(lm, task.name, loaded)
