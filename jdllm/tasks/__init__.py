"""The tasks that jdllm trains and is graded on: prompts, training answers, graders and documents.

TASKS maps a name to its Task. A document is a plain dict. Each task has a file.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from jdllm.tasks.puzzles import countdown, countdown4, expression, sudoku

Doc = dict


class Generate(Protocol):
    """Draw n documents from a seed: training documents, or held-out ones never trained on."""

    def __call__(self, n: int, seed: int, *, held_out: bool) -> list[Doc]: ...


@dataclass(frozen=True)
class Task:
    """Everything an entry point needs to know about a task.

    prompt, response and target turn a document into the user's message, the training answer and
    the gold text; extract reads the answer out of a completion and grade scores one with metrics in
    [0, 1], metric being the one to quote.
    gen_length is the default number of tokens to generate. generate draws documents; a task with a
    read is graded on the file that read finds in a folder, and generate is for training alone.
    """

    name: str
    prompt: Callable[[Doc], str]
    response: Callable[[Doc], str]
    target: Callable[[Doc], str]
    extract: Callable[[str], str]
    grade: Callable[[Doc, str], dict[str, float]]
    metric: str
    gen_length: int
    generate: Generate
    read: Callable[[Path | None], list[Doc]] | None = None


_SUDOKU = Task(
    name="sudoku",
    prompt=sudoku.prompt,
    response=sudoku.response,
    target=sudoku.target,
    extract=sudoku.extract,
    grade=sudoku.grade,
    metric="solved",
    gen_length=sudoku.GEN_LENGTH,
    generate=sudoku.generate,
)
_COUNTDOWN = Task(
    name="countdown",
    prompt=countdown.prompt,
    response=countdown.response,
    target=countdown.target,
    extract=expression.extract,
    grade=countdown.grade,
    metric="solved",
    gen_length=countdown.GEN_LENGTH,
    generate=countdown.generate,
)
_COUNTDOWN4 = Task(
    name="countdown4",
    prompt=countdown4.prompt,
    response=countdown4.response,
    target=countdown.target,
    extract=expression.extract,
    grade=countdown4.grade,
    metric="solved",
    gen_length=countdown4.GEN_LENGTH,
    generate=countdown4.generate,
)

TASKS: dict[str, Task] = {
    "sudoku": _SUDOKU,
    "sudoku_d1": replace(_SUDOKU, name="sudoku_d1", read=sudoku.read, grade=sudoku.grade_d1),
    "countdown": _COUNTDOWN,
    "countdown_d1": replace(
        _COUNTDOWN, name="countdown_d1", read=countdown.read, grade=countdown.grade_d1
    ),
    "countdown4": _COUNTDOWN4,
    "countdown4_dream": replace(_COUNTDOWN4, name="countdown4_dream", read=countdown4.read),
}
