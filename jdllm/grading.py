"""jdllm's tasks as lm-eval tasks, and lm-eval's verdict on one of them."""

import contextlib
import dataclasses
import functools
import logging
import statistics
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from tqdm import tqdm

from jdllm.harness import JdllmLM
from jdllm.tasks import Doc, Task


def as_lm_eval(task: Task, docs: Sequence[Doc], samples: int = 1) -> Any:
    """An lm-eval task over `docs`: the prompts, targets and grades of `task`, means of metrics.

    With several samples a document, its metrics are the means of theirs.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    metrics = task.grade(docs[0], "")

    def grade(doc: Doc, results: Any) -> dict[str, float]:
        grades = [task.grade(doc, text) for text in results[0]]
        return {name: statistics.fmean(grade[name] for grade in grades) for name in metrics}

    return ConfigurableTask(
        config={
            "task": task.name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(list(docs))},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": task.prompt,
            "doc_to_target": task.target,
            "process_results": grade,
            "repeats": samples,
            "filter_list": [
                {"name": "none", "filter": [{"function": "take_first_k", "k": samples}]}
            ],
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


def run_task(lm: JdllmLM, task: Task, docs: Sequence[Doc], samples: int = 1) -> Score:
    """Runs `task` on `docs` through lm-eval.

    This is lm_eval.evaluate, the part of simple_evaluate behind its look-ups of tasks by name:
    those take up to half a minute, and its call of git complains outside of a checkout.
    """
    with quiet():
        from lm_eval.evaluator import evaluate

        lm_task = as_lm_eval(task, docs, samples)
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
