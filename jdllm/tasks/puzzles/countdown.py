"""Countdown with three numbers: the prompt, the generator and the canonical answer.

Every way to combine three numbers is one of COMBINATIONS. The table solves one document for its
answer and a whole batch of triples for the generator. The grader is in expression.py.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jdllm.tasks.graders import d1
from jdllm.tasks.lm_eval import jsonl
from jdllm.tasks.puzzles import expression
from jdllm.tasks.puzzles import held_out as holdout

LARGEST = 100  # numbers and targets lie in 1 to 100, as in d1's test file
GEN_LENGTH = 256
D1_FILE = Path("countdown") / "d1_cd3_test.jsonl"

INSTRUCTION = (
    "Combine the three numbers into the target with +-*/ and use each of them exactly once. Think "
    "step by step and then write only the final expression without an equals sign inside "
    "\\boxed{}.\n"
)


class Combination(NamedTuple):
    """One way to combine three numbers, sorted from large to small: two steps in order.

    The first step is n[i] op n[j]; the second is result op n[k], or n[k] op result if flipped.
    """

    op1: str
    i: int
    j: int
    op2: str
    k: int
    flipped: bool = False


def _combinations() -> tuple[Combination, ...]:
    """Returns all combinations in order of preference: sums, then one product, then quotients."""
    pairs = [(0, 1, 2), (0, 2, 1), (1, 2, 0)]
    shapes: list[tuple[str, str, bool]] = [
        ("+", "+", False),
        ("+", "-", False),
        ("-", "-", False),
        ("*", "+", False),
        ("*", "-", False),
        ("*", "-", True),
        ("+", "*", False),
        ("-", "*", False),
        ("/", "+", False),
        ("/", "-", False),
        ("/", "-", True),
        ("+", "/", False),
        ("-", "/", False),
        ("+", "/", True),
        ("-", "/", True),
        ("*", "*", False),
        ("/", "*", False),
        ("*", "/", False),
        ("/", "/", False),
    ]
    return tuple(Combination(p, i, j, q, k, f) for p, q, f in shapes for i, j, k in pairs)


COMBINATIONS = _combinations()
EASY = sum(way.op1 in "+-" and way.op2 in "+-" for way in COMBINATIONS)  # the first rows
# How often the generator draws a combination whose value is in range: in how many orders the sum
# can be written from left to right.
WEIGHTS = np.array([{"++": 6, "+-": 4, "--": 2}.get(p.op1 + p.op2, 1) for p in COMBINATIONS])
# How often a document's target should be out of reach of sums and differences. Only about half of
# the triples reach such a value, which leaves a tenth of the documents, as in d1's test file.
HARD = 0.19


def _step(op: str, a, b):
    """Returns (result, whether it is a whole number >= 0) of an operation on ints or int arrays."""
    if op == "+":
        return a + b, a == a
    if op == "-":
        return a - b, a >= b
    if op == "*":
        return a * b, a == a
    divisor = b + (b == 0)  # keeps // and % quiet where b is 0; such a step is marked wrong
    return a // divisor, (b > 0) & (a % divisor == 0)


def _apply(way: Combination, n):
    """Returns (first, second, valid) of a combination of three numbers, each an int or an array."""
    first, fits = _step(way.op1, n[way.i], n[way.j])
    pair = (n[way.k], first) if way.flipped else (first, n[way.k])
    second, fits_too = _step(way.op2, *pair)
    return first, second, fits & fits_too


@functools.lru_cache(maxsize=65536)
def _solve(numbers: tuple[int, ...], wanted: int) -> tuple[Combination, int]:
    """Returns the preferred combination for numbers sorted large to small, and its first result."""
    for way in COMBINATIONS:
        first, second, valid = _apply(way, numbers)
        if valid and second == wanted:
            return way, int(first)
    raise ValueError(
        f"no expression that uses {', '.join(map(str, numbers))} once each makes {wanted} through "
        f"whole numbers; correct or remove the document"
    )


def solution(doc: dict) -> tuple[str, str]:
    """Returns the canonical chain and expression, as in ("93+30=123,123-100=23", "93+30-100").

    They depend only on the target and on which numbers there are. They use the first combination
    that hits the target, larger operands first, no needless parentheses, and every step is a whole
    number not below zero. Raises ValueError when no combination hits the target.
    """
    n = _sorted(doc["numbers"])
    way, first = _solve(n, doc["target"])
    step = f"{n[way.i]}{way.op1}{n[way.j]}"
    # no combination subtracts a sum or divides by a product: parentheses have no other use
    inner = f"({step})" if way.op1 in "+-" and way.op2 in "*/" else step
    last = n[way.k]
    if way.flipped:
        chain, written = f"{last}{way.op2}{first}", f"{last}{way.op2}{inner}"
    else:
        chain, written = f"{first}{way.op2}{last}", f"{inner}{way.op2}{last}"
    return f"{step}={first},{chain}={doc['target']}", written


def prompt(doc: dict) -> str:
    """Returns the user's message: the rules in words, then the numbers in the document's order."""
    listed = ",".join(str(number) for number in doc["numbers"])
    return f"{INSTRUCTION}Numbers: {listed} target: {doc['target']}"


def response(doc: dict, *, chain: bool = True) -> str:
    r"""Returns the training answer: the canonical chain, if asked, and the boxed expression."""
    steps, written = solution(doc)
    boxed = f"\\boxed{{{written}}}"
    return f"{steps} {boxed}" if chain else boxed


def target(doc: dict) -> str:
    """Returns the number to reach, as text."""
    return str(doc["target"])


def key(doc: dict) -> str:
    """Returns the text to hash for the hold-out: sorted numbers and target, as in "1,2,3=6"."""
    return ",".join(map(str, sorted(doc["numbers"]))) + f"={doc['target']}"


def grade(doc: dict, completion: str) -> dict[str, float]:
    """Returns the scores of one completion, each 0.0 or 1.0.

    solved: the expression uses exactly the given numbers and has exactly the target's value.
    exact_match: it is also written as the canonical answer is, character for character.
    """
    written, right = expression.extract(completion), solved(doc, completion)
    return {"solved": right, "exact_match": float(right and written == solution(doc)[1])}


def solved(doc: dict, completion: str) -> float:
    """Returns 1.0 where the expression uses exactly the document's numbers and makes its target."""
    tree = expression.parse(expression.extract(completion))
    return float(
        tree is not None
        and sorted(expression.numbers(tree)) == sorted(doc["numbers"])
        and expression.value(tree) == doc["target"]
    )


def grade_d1(doc: dict, completion: str) -> dict[str, float]:
    """Returns grade's scores and d1_match: the verdict of d1's parser, oddities included."""
    matched = d1.countdown_match(doc["numbers"], doc["target"], completion)
    return grade(doc, completion) | {"d1_match": float(matched)}


def _sorted(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(numbers, reverse=True))


def _draw(rng: np.random.Generator, count: int) -> Iterator[dict]:
    """Draws numbers uniformly, then one of the targets in range that they reach.

    With probability HARD the target is one that sums and differences cannot make, where the
    numbers have any such; otherwise it is one that they can make, and they always can.
    """
    drawn = rng.integers(1, LARGEST + 1, size=(count, 3))
    n = -np.sort(-drawn, axis=1).T  # [3, N], large to small
    values, hits = _values(n)
    easy = values[:EASY]
    new = np.ones_like(hits)
    new[:EASY] = False
    for row in range(EASY, len(COMBINATIONS)):
        new[row] = ~(easy == values[row]).any(axis=0)
    hard = hits & new
    wants_hard = (rng.random(count) < HARD) & hard.any(axis=0)
    pool = np.where(wants_hard, hard, hits & ~new)
    weights = np.cumsum(pool * WEIGHTS[:, None], axis=0)
    choice = (weights > rng.integers(0, weights[-1])).argmax(axis=0)
    targets = values[choice, np.arange(count)]
    for numbers, reached in zip(drawn.tolist(), targets.tolist(), strict=True):
        yield {"numbers": numbers, "target": reached}


def _values(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns every combination's value [P, N] for numbers [3, N] (0: invalid), and if in range."""
    columns = []
    for way in COMBINATIONS:
        _, second, valid = _apply(way, n)
        columns.append(np.where(valid, second, 0))
    values = np.stack(columns)
    return values, (values >= 1) & (values <= LARGEST)


def generate(n: int, seed: int, *, held_out: bool) -> list[dict]:
    """Draws n documents {"numbers": [a, b, c], "target": t}, all from 1 to 100 and all solvable.

    Training documents may repeat; held-out ones are distinct, and no (numbers, target) is ever on
    both sides, in whatever order the numbers come. Raises ValueError when n is negative.
    """
    return holdout.draw(_draw, key, n, seed, held_out=held_out)


def read(folder: Path | None) -> list[dict]:
    """Reads d1's test documents from folder/countdown/d1_cd3_test.jsonl.

    Raises FileNotFoundError when the file is not there, ValueError for a line of another form.
    """
    docs = []
    for where, row in jsonl.rows(folder, D1_FILE, "countdown_d1"):
        listed, reached = str(row.get("input", "")), str(row.get("output", ""))
        if not re.fullmatch(r"\d+,\d+,\d+", listed) or not re.fullmatch(r"\d+", reached):
            raise ValueError(
                f'{where}: a row is {{"input": "a,b,c", "output": "target"}} in whole numbers; '
                f"this is {row}"
            )
        docs.append({"numbers": [int(x) for x in listed.split(",")], "target": int(reached)})
    return docs
