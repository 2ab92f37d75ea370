"""The data sets of tasks: from the Hugging Face hub, or from the files of a folder.

While `reading(folder)` is on, a task that asks the hub for a data set of FILES gets the folder's
rows instead: lm-eval's own tasks, a user's, and ours alike.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from jdllm.tasks.graders.code import CodeEval
from jdllm.tasks.lm_eval import jsonl

# (path, name) as for datasets.load_dataset -> split -> file in the folder, plain or with .gz.
FILES: dict[tuple[str, str | None], dict[str, str]] = {
    ("openai/gsm8k", "main"): {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
    ("HuggingFaceH4/MATH-500", None): {"test": "math500/test.jsonl"},
    ("openai/openai_humaneval", None): {"test": "humaneval/test.jsonl"},
    ("truthfulqa/truthful_qa", "generation"): {"validation": "truthfulqa/validation.jsonl"},
    ("cais/mmlu", None): {"test": "mmlu/test.jsonl", "dev": "mmlu/dev.jsonl"},
    **{
        ("google-research-datasets/mbpp", name): {
            split: f"mbpp/{name}_{split}.jsonl"
            for split in ("train", "test", "validation", "prompt")
        }
        for name in ("full", "sanitized")
    },
    ("hotpotqa_sample", None): {"test": "hotpotqa/longbench_sample50.jsonl"},
    ("mmlu_sample", None): {"test": "mmlu/sample50.jsonl", "dev": "mmlu/dev.jsonl"},
}
OLD_NAMES = {
    "gsm8k": "openai/gsm8k",
    "mbpp": "google-research-datasets/mbpp",
    "openai_humaneval": "openai/openai_humaneval",
    "truthful_qa": "truthfulqa/truthful_qa",
}
NOT_ON_HUB = ("hotpotqa_sample", "mmlu_sample")
MMLU = "cais/mmlu"  # its names are subjects, which the files hold as a column


class Splits(dict):
    """Splits of a data set, each read from its file when it is first asked for."""

    def __init__(self, folder: Path, files: dict[str, str], subject: str | None):
        super().__init__()
        self.folder, self.files, self.subject = folder, files, subject

    def __missing__(self, split: str) -> Any:
        from datasets import Dataset

        if split not in self.files:
            raise KeyError(f"there is no split {split!r} but {', '.join(self.files)}")
        path = jsonl.find(self.folder, self.files[split])
        if path is None:
            raise FileNotFoundError(f"{self.folder} has no {self.files[split]}, nor one with .gz")
        rows = [row for _, row in jsonl.read(path)]
        if self.subject not in (None, "all"):
            rows = [row for row in rows if row["subject"] == self.subject]
        if not rows:
            raise ValueError(f"{path} has no row" + (f" of {self.subject}" if self.subject else ""))
        self[split] = Dataset.from_list(rows)
        return self[split]


def load(folder: Path | None, real: Any, path: str, name: str | None = None, **more: Any) -> Any:
    """Returns a data set from the folder's files where it has them, else from the hub (`real`).

    FileNotFoundError, with the files that would do, where neither folder nor hub can serve.
    """
    known = OLD_NAMES.get(path, path)
    files = FILES.get((known, name)) or FILES.get((known, None)) or {}
    if folder and any(jsonl.find(folder, file) for file in files.values()):
        splits = Splits(folder, files, name if known == MMLU else None)
        return splits[more["split"]] if more.get("split") else splits
    wanted = ", ".join(files.values())
    fix = f"pass data=FOLDER with {wanted} in it" if files else "no data=FOLDER serves it"
    if folder and files:
        fix = f"data={folder} holds none of {wanted}"
    if path in NOT_ON_HUB:
        raise FileNotFoundError(f"{path} is not on the Hugging Face hub; {fix}")
    try:
        return real(path=path, name=name, **more)
    except (OSError, ValueError) as error:  # no network, or no such data set
        what = f"{path} ({name})" if name else path
        raise FileNotFoundError(
            f"the Hugging Face hub did not give the data set {what}; {fix} ({error})"
        ) from error


@contextlib.contextmanager
def reading(folder: Path | None) -> Iterator[None]:
    """Makes lm-eval's tasks use load() and our sandbox inside the block.

    lm-eval's code tasks fetch their metric from the network when they are imported: they get
    CodeEval, and keep it.
    """
    import datasets

    evaluate = importlib.import_module("evaluate")  # lm-eval's own dependency
    real, old = datasets.load_dataset, evaluate.load
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with (
            mock.patch.object(datasets, "load_dataset", functools.partial(load, folder, real)),
            mock.patch.object(evaluate, "load", functools.partial(metric, old)),
        ):
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()


def metric(real: Any, path: str, *arguments: Any, **more: Any) -> Any:
    """Returns our code_eval, and for other names what evaluate.load (`real`) returns."""
    return CodeEval() if path == "code_eval" else real(path, *arguments, **more)
