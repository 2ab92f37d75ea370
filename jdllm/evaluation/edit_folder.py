"""EDIT's own output folders: accuracies as its parser counts them, and steps from its CSV files.

Its parse_and_get_acc reads *_generations.json; the script that its README names for the steps is
not in its repository, so they are counted as its paper does: the mean over samples of the sum over
blocks, against gen_length / 2.
"""

import csv
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jdllm.evaluation.report import table
from jdllm.tasks.graders import d1

GENERATIONS, STEPS = "*_generations.json", "*_early_*_steps_device-*.csv"
PUZZLE = re.compile(r"^\d{16}|(?<=Sudoku puzzle: )\d{16}")
UNFINISHED = 1000  # what EDIT's file holds of a block that was never decoded


def sudoku_cells(row: Mapping[str, Any]) -> tuple[int, int]:
    """Right cells and empty cells of a puzzle."""
    found = PUZZLE.search(row["question"])
    puzzle = found.group() if found else ""
    cells = d1.sudoku_cells(puzzle, row["ground_truth"], row["generations"])
    return cells, puzzle.count("0")


def verdict(match: Callable[[Any, str], bool]) -> Callable[[Mapping[str, Any]], tuple[int, int]]:
    """From a grader to right answers and questions of a row, 0 or 1 of 1."""
    return lambda row: (int(match(row["ground_truth"], row["generations"])), 1)


GRADERS: dict[str, Callable[[Mapping[str, Any]], tuple[int, int]]] = {
    "gsm8k": verdict(d1.gsm8k_match),
    "math": verdict(d1.math_match),
    "countdown": verdict(lambda truth, text: d1.countdown_match(truth[0], truth[1], text)),
    "sudoku": sudoku_cells,
}
"""By the word that a file's name begins with: right and all, of sudoku in empty cells."""


@dataclasses.dataclass
class Setup:
    """What the files of a task and length sum to."""

    correct: int = 0
    total: int = 0
    samples: int = 0
    steps: list[list[int]] = dataclasses.field(default_factory=list)
    """By sample: steps of each block; none where there are no CSV files."""

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / self.total if self.total else 0.0

    @property
    def mean_steps(self) -> float | None:
        """Mean over samples of the sum over blocks."""
        totals = [sum(blocks) for blocks in self.steps]
        return sum(totals) / len(totals) if totals else None


def read(folder: Path) -> dict[tuple[str, int], Setup]:
    """What is found below a folder, by task and length.

    ValueError, with the file, for one that cannot be read or is of another kind.
    """
    found: dict[tuple[str, int], Setup] = {}
    for path in sorted(folder.rglob(GENERATIONS)):
        task, facts = task_of(path), load(path)
        setup = found.setdefault((task, int(facts["gen_length"])), Setup())
        for row in facts["generations"]:
            right, count = GRADERS[task](row)
            setup.correct, setup.total = setup.correct + right, setup.total + count
            setup.samples += 1
        for sheet in sorted(path.parent.glob(STEPS)):
            if device(sheet) == path.name.split("_")[-2]:
                setup.steps += read_steps(sheet)
    if not found:
        raise ValueError(f"{folder} has no {GENERATIONS}: name a folder that EDIT's eval has left")
    return found


def task_of(path: Path) -> str:
    """The task that a file's name begins with; ValueError for any other name."""
    task = path.name.split("_")[0]
    if task not in GRADERS:
        raise ValueError(f"{path}: its name must begin with one of {', '.join(GRADERS)}")
    return task


def load(path: Path) -> dict[str, Any]:
    """The facts of a generations file; ValueError where it is none."""
    try:
        facts = json.loads(path.read_text())
        if facts["gen_length"] and facts["generations"][0].keys() >= {"question", "generations"}:
            return facts
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} is no file of EDIT's: it needs gen_length and generations")


def device(path: Path) -> str:
    """The device number in the name of a CSV file."""
    return path.stem.rpartition("device-")[2]


def read_steps(path: Path) -> list[list[int]]:
    """Steps of every block of every sample; blocks that were never decoded are left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    blocks = [name for name in rows[0] if name.startswith("Block_")] if rows else []
    kept = [row for row in rows if next(iter(row.values())).startswith("Sample_")]
    return [
        [int(float(row[name])) for name in blocks if float(row[name]) != UNFINISHED] for row in kept
    ]


def lines(found: Mapping[tuple[str, int], Setup]) -> Iterator[list[str]]:
    """The table's lines: task, length, samples, right, accuracy, steps, of all, reduction."""
    for (task, length), setup in sorted(found.items()):
        full, mean = length / 2, setup.mean_steps
        steps = ["-", "-"] if mean is None else [f"{mean:.2f}", f"{100 * (1 - mean / full):.1f}"]
        unit = "cells" if task == "sudoku" else "answers"
        yield [
            f"{task} {length}", str(setup.samples), f"{setup.correct}/{setup.total} {unit}",
            f"{setup.accuracy:.2f}", steps[0], f"{full:.0f}", steps[1],
        ]  # fmt: skip


def report(folder: Path) -> str:
    """The table of a folder; ValueError as from `read`."""
    heads = ["setup", "samples", "right", "accuracy %", "steps", "of", "reduction %"]
    return table([heads, *lines(read(folder))])
