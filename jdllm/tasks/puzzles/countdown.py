"""Countdown with three numbers: the prompt, the generator and the canonical answer.

Every way to combine three numbers is one row of PLANS; the same table solves one document for its
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


class Plan(NamedTuple):
    """One way to combine three numbers, sorted from large to small: two steps in order.

    The first step is n[i] op n[j]; the second is result op n[k], or n[k] op result if flipped.
    """

    op1: str
    i: int
    j: int
    op2: str
    k: int
    flipped: bool = False


def _plans() -> tuple[Plan, ...]:
    """All plans in order of preference: sums, then one product, then quotients."""
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
    return tuple(Plan(p, i, j, q, k, f) for p, q, f in shapes for i, j, k in pairs)


PLANS = _plans()
EASY_PLANS = sum(plan.op1 in "+-" and plan.op2 in "+-" for plan in PLANS)  # the first rows
# How often the generator draws a plan that reaches a target in range: in how many orders the sum
# can be written from left to right.
WEIGHTS = np.array([{"++": 6, "+-": 4, "--": 2}.get(p.op1 + p.op2, 1) for p in PLANS])
# How often a document's target should be out of reach of sums and differences. Only about half of
# the triples reach such a value, which leaves a tenth of the documents, as in d1's test file.
HARD = 0.19


def _step(op: str, a, b):
    """One operation on ints or int arrays: (result, whether it is a whole number, not negative)."""
    if op == "+":
        return a + b, a == a
    if op == "-":
        return a - b, a >= b
    if op == "*":
        return a * b, a == a
    divisor = b + (b == 0)  # keeps // and % quiet where b is 0; such a step is marked wrong
    return a // divisor, (b > 0) & (a % divisor == 0)


def _apply(plan: Plan, n):
    """Carry out a plan on three numbers, each an int or an array: (first, second, valid)."""
    first, fits = _step(plan.op1, n[plan.i], n[plan.j])
    pair = (n[plan.k], first) if plan.flipped else (first, n[plan.k])
    second, fits_too = _step(plan.op2, *pair)
    return first, second, fits & fits_too


@functools.lru_cache(maxsize=65536)
def _solve(numbers: tuple[int, ...], wanted: int) -> tuple[Plan, int]:
    """The preferred plan for three numbers sorted from large to small, and its first result."""
    for plan in PLANS:
        first, second, valid = _apply(plan, numbers)
        if valid and second == wanted:
            return plan, int(first)
    raise ValueError(
        f"no expression that uses {', '.join(map(str, numbers))} once each makes {wanted} through "
        f"whole numbers; correct or remove the document"
    )


def solution(doc: dict) -> tuple[str, str]:
    """The canonical chain and expression, as in ("93+30=123,123-100=23", "93+30-100").

    They depend only on the target and on which numbers there are: the first plan that hits the
    target, larger operands first, no needless parentheses, every step a whole number not below
    zero. Raises ValueError when no plan hits the target.
    """
    n = _sorted(doc["numbers"])
    plan, first = _solve(n, doc["target"])
    step = f"{n[plan.i]}{plan.op1}{n[plan.j]}"
    # no plan subtracts a sum or divides by a product, so this is the only need for parentheses
    inner = f"({step})" if plan.op1 in "+-" and plan.op2 in "*/" else step
    last = n[plan.k]
    if plan.flipped:
        chain, written = f"{last}{plan.op2}{first}", f"{last}{plan.op2}{inner}"
    else:
        chain, written = f"{first}{plan.op2}{last}", f"{inner}{plan.op2}{last}"
    return f"{step}={first},{chain}={doc['target']}", written


def prompt(doc: dict) -> str:
    """The user's message: the rules in words, then the numbers in the document's order."""
    listed = ",".join(str(number) for number in doc["numbers"])
    return f"{INSTRUCTION}Numbers: {listed} target: {doc['target']}"


def response(doc: dict, *, chain: bool = True) -> str:
    r"""The training answer: the canonical chain (left out on request) and the boxed expression."""
    steps, written = solution(doc)
    boxed = f"\\boxed{{{written}}}"
    return f"{steps} {boxed}" if chain else boxed


def target(doc: dict) -> str:
    """The number to reach, as text."""
    return str(doc["target"])


def key(doc: dict) -> str:
    """What the hold-out hash is taken of: numbers from small to large and the target: "1,2,3=6"."""
    return ",".join(map(str, sorted(doc["numbers"]))) + f"={doc['target']}"


def grade(doc: dict, completion: str) -> dict[str, float]:
    """Score one completion with 0.0 or 1.0.

    solved: the expression uses exactly the given numbers and has exactly the target's value.
    exact_match: it is also written as the canonical answer is, character for character.
    """
    written = expression.extract(completion)
    tree = expression.parse(written)
    solved = (
        tree is not None
        and sorted(expression.numbers(tree)) == sorted(doc["numbers"])
        and expression.value(tree) == doc["target"]
    )
    return {
        "solved": float(solved),
        "exact_match": float(solved and written == solution(doc)[1]),
    }


def grade_d1(doc: dict, completion: str) -> dict[str, float]:
    """grade, and beside it d1_match: the verdict of d1's parser, oddities included."""
    matched = d1.countdown_match(doc["numbers"], doc["target"], completion)
    return grade(doc, completion) | {"d1_match": float(matched)}


def _sorted(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(numbers, reverse=True))


def _draw(rng: np.random.Generator, count: int) -> Iterator[dict]:
    """Draw numbers uniformly, then one of the targets in range that they reach.

    With probability HARD the target is one that sums and differences cannot make, where the
    numbers have any such; otherwise it is one that they can make, and they always can.
    """
    drawn = rng.integers(1, LARGEST + 1, size=(count, 3))
    n = -np.sort(-drawn, axis=1).T  # [3, N], large to small
    values, hits = _values(n)
    easy = values[:EASY_PLANS]
    new = np.ones_like(hits)
    new[:EASY_PLANS] = False
    for row in range(EASY_PLANS, len(PLANS)):
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
    """Every plan's value for numbers [3, N]: values [P, N] (0 where invalid), in range [P, N]."""
    columns = []
    for plan in PLANS:
        _, second, valid = _apply(plan, n)
        columns.append(np.where(valid, second, 0))
    values = np.stack(columns)
    return values, (values >= 1) & (values <= LARGEST)


def generate(n: int, seed: int, *, held_out: bool) -> list[dict]:
    """Draw n documents {"numbers": [a, b, c], "target": t}, all from 1 to 100 and all solvable.

    Training documents may repeat; held-out ones are distinct, and no (numbers, target) is ever on
    both sides, in whatever order the numbers come. Raises ValueError when n is negative.
    """
    return holdout.draw(_draw, key, n, seed, held_out=held_out)


def read(folder: Path | None) -> list[dict]:
    """Read d1's test documents from folder/countdown/d1_cd3_test.jsonl.

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
