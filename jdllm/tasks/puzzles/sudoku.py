"""Sudoku 4x4 with eight clues: the prompt, the grader and the generator.

There are only 288 grids. So every question about a puzzle (is it ambiguous, which completion
comes first) is answered by listing them. A grid and a puzzle are 16-character strings, row by row.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jdllm.tasks.graders import d1
from jdllm.tasks.lm_eval import jsonl
from jdllm.tasks.puzzles import held_out as holdout

CELLS = 16
CLUES = 8  # every puzzle of d1's test file has eight
GEN_LENGTH = 256
D1_FILE = Path("sudoku4x4") / "d1_test.jsonl"

# No commas or digits: the bundled tokenizer keeps those apart, so each would cost two tokens.
INSTRUCTION = (
    "Fill in this four by four sudoku. The string lists its cells from left to right and top to "
    "bottom with a zero for an empty cell. Every row and every column and every two by two box "
    "must hold the digits from one to four exactly once. Give all sixteen digits inside "
    "<answer></answer>.\n"
)

_BOXES = [[r + dr + c + dc for dr in (0, 4) for dc in (0, 1)] for r in (0, 8) for c in (0, 2)]
_ROWS = [list(range(r, r + 4)) for r in range(0, CELLS, 4)]
_COLUMNS = [list(range(c, CELLS, 4)) for c in range(4)]
UNITS = _ROWS + _COLUMNS + _BOXES

_TAG = re.compile(r"<answer>(.*?)(?:</answer>|<\||$)", re.DOTALL)
_BARE = re.compile(r"(?<!\d)\d{16}(?!\d)")


def prompt(doc: dict) -> str:
    """Returns the user's message: the rules in words, then the puzzle on a line of its own."""
    return INSTRUCTION + doc["puzzle"]


def response(doc: dict) -> str:
    """Returns the training answer: the puzzle's first completion in lexicographic order, tagged.

    It depends on the puzzle alone, so an ambiguous puzzle always has the same training answer.
    """
    return f"<answer>{completions(doc['puzzle'])[0]}</answer>"


def target(doc: dict) -> str:
    """Returns the listed solution, 16 digits."""
    return doc["solution"]


def key(doc: dict) -> str:
    """Returns the text that is hashed for the hold-out: the puzzle string."""
    return doc["puzzle"]


def is_grid(text: str) -> bool:
    """Returns whether a string is a finished grid: 1 to 4 once in each row, column and box."""
    if len(text) != CELLS:
        return False
    return all({text[cell] for cell in unit} == set("1234") for unit in UNITS)


@functools.cache
def grids() -> tuple[str, ...]:
    """Returns all 288 finished grids, in lexicographic order."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    tops = [a + b for a in rows for b in rows if _fits(a + b)]
    return tuple(top + c + d for top in tops for c in rows for d in rows if is_grid(top + c + d))


def _fits(top: str) -> bool:
    """Returns whether two rows can be the upper half of a grid."""
    columns = all(top[i] != top[i + 4] for i in range(4))
    return columns and len(set(top[0:2] + top[4:6])) == 4


@functools.cache
def _having() -> dict[tuple[int, str], int]:
    """Returns, for each (cell, digit), the grids with that digit there, as bits of an integer."""
    sets = dict.fromkeys(itertools.product(range(CELLS), "1234"), 0)
    for index, grid in enumerate(grids()):
        for place in enumerate(grid):
            sets[place] |= 1 << index
    return sets


def completions(puzzle: str) -> list[str]:
    """Returns all grids that keep the puzzle's clues, in lexicographic order.

    Raises ValueError when the puzzle is not 16 characters of 0-4 or has no completion.
    """
    if len(puzzle) != CELLS or set(puzzle) - set("01234"):
        raise ValueError(
            f"a puzzle is {CELLS} characters of 0 to 4, row by row, 0 for an empty cell; "
            f"this is {puzzle!r}"
        )
    having = _having()
    left = (1 << len(grids())) - 1
    for place in enumerate(puzzle):
        if place[1] != "0":
            left &= having[place]
    if not left:
        raise ValueError(f"the puzzle {puzzle!r} contradicts itself: no grid keeps all its clues")
    found = []
    while left:
        lowest = left & -left
        found.append(grids()[lowest.bit_length() - 1])
        left ^= lowest
    return found


def extract(completion: str) -> str:
    """Returns the answer without blanks: the last answer tag, else a run of 16 digits.

    A tag that is never closed runs to the next special token or to the end. "" when neither is
    there.
    """
    tagged = _TAG.findall(completion)
    if tagged:
        return "".join(tagged[-1].split())
    bare = _BARE.findall(completion)
    return bare[-1] if bare else ""


def grade(doc: dict, completion: str) -> dict[str, float]:
    """Returns the scores of one completion, each in [0, 1].

    solved: a finished grid that keeps every clue, so any completion of an ambiguous puzzle counts.
    exact_match: equal to the listed solution.
    cell_acc: share of the empty cells filled as in the listed solution; an answer of another
    length is cut or padded to 16 first, as d1's evaluation does.
    """
    puzzle, solution, answer = doc["puzzle"], doc["solution"], extract(completion)
    kept = all(clue in ("0", cell) for clue, cell in zip(puzzle, answer, strict=False))
    holes = [cell for cell in range(CELLS) if puzzle[cell] == "0"]
    padded = answer[:CELLS].ljust(CELLS, "0")
    right = sum(padded[cell] == solution[cell] for cell in holes)
    return {
        "solved": float(is_grid(answer) and kept),
        "exact_match": float(answer == solution),
        "cell_acc": right / len(holes) if holes else float(answer == solution),
    }


def grade_d1(doc: dict, completion: str) -> dict[str, float]:
    """Returns grade's scores and d1_cells: the share of empty cells right by d1's parser."""
    cells = d1.sudoku_cells(doc["puzzle"], doc["solution"], completion)
    return grade(doc, completion) | {"d1_cells": cells / (doc["puzzle"].count("0") or 1)}


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the tables of the generator.

    Returns the grids' characters [288, 16] uint8, every choice of CLUES cells [M, 16] bool and,
    for each choice and grid, the index of the first grid with the same clues [M, 288] int16.
    """
    characters = np.array([list(grid.encode()) for grid in grids()], dtype=np.uint8)
    cells = np.array(list(itertools.combinations(range(CELLS), CLUES)))
    shown = np.zeros((len(cells), CELLS), dtype=bool)
    np.put_along_axis(shown, cells, True, axis=1)
    digits = characters.astype(np.int64) - ord("0")
    places = 5 ** np.arange(CLUES, dtype=np.int64)
    first = np.empty((len(cells), len(characters)), dtype=np.int16)
    for row, choice in enumerate(cells):
        # grids are sorted, so the first occurrence of a set of clues is its smallest completion
        _, start, group = np.unique(
            digits[:, choice] @ places, return_index=True, return_inverse=True
        )
        first[row] = start[group]
    return characters, shown, first


def _draw(rng: np.random.Generator, count: int) -> Iterator[dict]:
    """Draws documents uniformly from all (grid, choice of clues) pairs, as d1's file seems to."""
    characters, shown, first = _tables()
    grid = rng.integers(0, len(characters), size=count)
    choice = rng.integers(0, len(shown), size=count)
    puzzles = np.where(shown[choice], characters[grid], np.uint8(ord("0")))
    solutions = characters[first[choice, grid]]
    columns = (_strings(puzzles), _strings(solutions))
    for puzzle, solution in zip(*columns, strict=True):
        yield {"puzzle": puzzle, "solution": solution}


def _strings(rows: np.ndarray) -> list[str]:
    """Turns rows of character codes [N, 16] uint8 into N strings."""
    text = np.ascontiguousarray(rows).tobytes().decode("ascii")
    return [text[start : start + CELLS] for start in range(0, len(text), CELLS)]


def generate(n: int, seed: int, *, held_out: bool) -> list[dict]:
    """Draws n documents {"puzzle", "solution"}; the solution is the smallest completion.

    Training documents may repeat; held-out ones are distinct, and no puzzle is ever on both
    sides. Raises ValueError when n is negative or there are fewer held-out puzzles than n.
    """
    return holdout.draw(_draw, key, n, seed, held_out=held_out)


def read(folder: Path | None) -> list[dict]:
    """Reads d1's test puzzles from folder/sudoku4x4/d1_test.jsonl.

    Raises FileNotFoundError when the file is not there, ValueError for a line of another form.
    """
    docs = []
    for where, row in jsonl.rows(folder, D1_FILE, "sudoku_d1"):
        doc = {"puzzle": str(row.get("Puzzle", "")), "solution": str(row.get("Solution", ""))}
        if not re.fullmatch(r"[0-4]{16}", doc["puzzle"]) or not is_grid(doc["solution"]):
            raise ValueError(
                f'{where}: a row is {{"Puzzle": 16 digits 0-4, "Solution": a finished grid}}, '
                f"both as strings; this is {json.dumps(row)}"
            )
        docs.append(doc)
    return docs
