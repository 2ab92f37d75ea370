"""Countdown with four numbers: three steps, drawn at random, are the document and its answer.

There is no table of all ways as countdown.py has one: an answer is any expression that is right.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jdllm.tasks.lm_eval import jsonl
from jdllm.tasks.puzzles import countdown
from jdllm.tasks.puzzles import held_out as holdout

COUNT = 4
LARGEST = 99  # of numbers and targets, as in Dream's test file
HIGHEST = 999  # of results on the way
GEN_LENGTH = 64
OPERATORS = "+-*/"
WEIGHTS = (4, 4, 1, 1)  # of drawing each; products and quotients that do not fit are drawn anew
DREAM_FILE = Path("countdown") / "dream_cd4_test.jsonl"
INSTRUCTION = countdown.INSTRUCTION.replace("three", "four")
STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


def prompt(doc: dict) -> str:
    """Returns the user's message: the rules in words, then the numbers in the document's order."""
    listed = ",".join(map(str, doc["numbers"]))
    return f"{INSTRUCTION}Numbers: {listed} target: {doc['target']}"


def written(doc: dict) -> str:
    """Returns the document's steps as one expression, with the parentheses that it needs.

    Raises ValueError where a step takes a number that is not there.
    """
    left = [(number, str(number), "") for number in doc["numbers"]]  # value, text, last operator

    def take(value: int, operator: str, second: bool) -> str:
        for one in left:
            if one[0] == value:
                left.remove(one)
                last = one[2]
                loose = last in ("+", "-") and (operator in "*/" or (second and operator == "-"))
                tight = last in ("*", "/") and second and operator == "/"
                return f"({one[1]})" if last and (loose or tight) else one[1]
        raise ValueError(f"a step takes {value}, which is not among {doc['numbers']} and results")

    for step in doc["steps"]:
        a, operator, b, result = STEP.fullmatch(step).groups()  # type: ignore
        first, second = take(int(a), operator, False), take(int(b), operator, True)
        left.append((int(result), first + operator + second, operator))
    return left[0][1]


def response(doc: dict) -> str:
    r"""Returns the training answer: the steps, and the boxed expression."""
    return f"{','.join(doc['steps'])} \\boxed{{{written(doc)}}}"


def grade(doc: dict, completion: str) -> dict[str, float]:
    """Returns solved: 1.0 where the expression uses these numbers once and makes the target."""
    return {"solved": countdown.solved(doc, completion)}


def _draw(rng: np.random.Generator, count: int) -> Iterator[dict]:
    """Draws numbers, then steps on what is left until one number is, in range of a target."""
    quick = random.Random(int(rng.integers(2**63)))  # NumPy's draws of single numbers are slow
    for numbers in rng.integers(1, LARGEST + 1, size=(count, COUNT)).tolist():
        steps: list[str] = []
        while not steps:
            left = list(numbers)
            while len(left) > 1:
                quick.shuffle(left)
                high, low = max(left[-2:]), min(left[-2:])
                operator = quick.choices(OPERATORS, WEIGHTS)[0]
                result = _result(high, operator, low)
                if result is None:
                    break
                left[-2:] = [result]
                steps.append(f"{high}{operator}{low}={result}")
            if len(left) > 1 or left[0] > LARGEST:
                steps.clear()
        yield {"numbers": numbers, "target": left[0], "steps": steps}


def _result(high: int, operator: str, low: int) -> int | None:
    """Returns what a step gives; None where that is no whole number from 1 to HIGHEST.

    Products and quotients by 1 are left out: they would stand for four numbers in name only.
    """
    if operator in "*/" and low <= 1:
        return None
    if operator == "/":
        return high // low if high % low == 0 else None
    found = {"+": high + low, "-": high - low, "*": high * low}[operator]
    return found if 1 <= found <= HIGHEST else None


def generate(n: int, seed: int, *, held_out: bool) -> list[dict]:
    """Draws n documents {"numbers": [a, b, c, d], "target": t, "steps": ["a+b=e", ...]}.

    As for countdown, training documents may repeat, held-out ones are distinct, and those of
    Dream's test file are never trained on. Raises ValueError when n is negative.
    """
    return holdout.draw(_draw, countdown.key, n, seed, held_out=held_out)


def read(folder: Path | None) -> list[dict]:
    """Reads Dream's test documents from folder/countdown/dream_cd4_test.jsonl.

    Raises FileNotFoundError when the file is not there, ValueError for a line of another form.
    """
    docs = []
    for where, row in jsonl.rows(folder, DREAM_FILE, "countdown4_dream"):
        listed, steps = str(row.get("input", "")), str(row.get("output", "")).split(",")
        if not re.fullmatch(r"\d+(,\d+){4}", listed) or not all(map(STEP.fullmatch, steps)):
            raise ValueError(
                f'{where}: a row is {{"input": "a,b,c,d,target", "output": "a+b=e,..."}} in whole '
                f"numbers; this is {row}"
            )
        *numbers, target = map(int, listed.split(","))
        docs.append({"numbers": numbers, "target": target, "steps": steps})
    return docs
