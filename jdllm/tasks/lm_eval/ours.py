"""Our tasks as lm-eval configs: plain dicts, one function a name."""

from collections.abc import Callable, Sequence
from typing import Any

from jdllm.tasks import TASKS, Doc, Task
from jdllm.tasks.graders import answers
from jdllm.tasks.lm_eval import blockinfer, gsm8k, math500, mbpp


def graded(grade: Callable[[Doc, str], dict[str, float]], metrics: Sequence[str], **config) -> dict:
    """Returns an lm-eval config of a task that generates text and is graded by `grade`.

    The first of the metrics is the one to quote.
    """
    return {
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "process_results": lambda doc, results: grade(doc, results[0]),
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics
        ],
        "metadata": {"version": 1, "quoted": f"{metrics[0]},none"},
        **config,
    }


def length(tokens: int) -> dict[str, Any]:
    """Returns the generation_kwargs of a task whose completions end by themselves."""
    return {"until": [], "max_gen_toks": tokens}


def of_task(task: Task, docs: Sequence[Doc]) -> dict:
    """Returns the config of a Task over `docs`."""

    def dataset(**_: Any) -> dict:
        from datasets import Dataset

        return {"test": Dataset.from_list(list(docs))}

    return graded(
        task.grade,
        [task.metric, *(name for name in task.grade(docs[0], "") if name != task.metric)],
        task=task.name,
        custom_dataset=dataset,
        doc_to_text=task.prompt,
        doc_to_target=task.target,
        generation_kwargs=length(task.gen_length),
    )


def _boxed(module: Any, question: str) -> dict:
    return graded(
        module.grade,
        ["solved", "d1_match"],
        **module.HUB,
        doc_to_text=module.INSTRUCTION + f"{{{{{question}}}}}",
        doc_to_target="{{answer}}",
        generation_kwargs=length(256),
    )


def _hotpotqa() -> dict:
    return graded(
        blockinfer.grade_hotpotqa,
        ["exact_match", "f1"],
        dataset_path="hotpotqa_sample",
        doc_to_text=blockinfer.HOTPOTQA_PROMPT,
        doc_to_target="{{answers[0]}}",
        generation_kwargs=length(128),
    )


def _mmlu() -> dict:
    return graded(
        blockinfer.grade_mmlu,
        ["exact_match"],
        dataset_path="mmlu_sample",
        doc_to_text=blockinfer.MMLU_PROMPT,
        doc_to_target="{{'ABCD'[answer]}}",
        generation_kwargs=length(128),
    )


def _mmlu_likelihood() -> dict:
    return {
        "dataset_path": "mmlu_sample",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": blockinfer.CHOICES + "Answer:",
        "doc_to_choice": list(blockinfer.LETTERS),
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1, "quoted": "acc,none"},
    }


CONFIGS: dict[str, Callable[[], dict]] = {
    "gsm8k_boxed": lambda: _boxed(gsm8k, "question"),
    "math500_boxed": lambda: _boxed(math500, "problem"),
    "hotpotqa_sample": _hotpotqa,
    "mmlu_sample": _mmlu,
    "mmlu_sample_likelihood": _mmlu_likelihood,
    **gsm8k.CONFIGS,
    **mbpp.CONFIGS,
}
# How the graders of ours read the answer of a completion; lm-eval's own tasks have filters for it.
READERS: dict[str, Callable[[str], str | None]] = {
    **{name: task.extract for name, task in TASKS.items()},
    "gsm8k_boxed": answers.final,
    "math500_boxed": answers.final,
    "hotpotqa_sample": blockinfer.answer,
    "mmlu_sample": blockinfer.letter,
}
