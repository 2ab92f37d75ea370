r"""What the parser of d1 (and EDIT's copy of it) makes of a completion, oddities included.

These graders repeat published verdicts to the letter: 1,000 reads as 1, a whole completion counts
as the answer where there is no \boxed, prose inside an answer tag is taken for sudoku cells. The
graders to trust stand beside their tasks; both are reported, this one's metrics start with d1_.
"""

import ast
import math
import operator
import re
from collections.abc import Callable

END = r"<\|eot_id\|>|<\|endoftext\|>"
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def tagged(text: str) -> str | None:
    """Returns the stripped content of the first closed answer tag."""
    found = _TAG.search(text)
    return found.group(1).strip() if found else None


# gsm8k


def gsm8k_truth(answer: str) -> float | None:
    """Returns the gold number of a GSM8K answer as d1 loads it; None if negative: always wrong."""
    found = re.search(r"####\s*(\d[\d,.]*)", answer)
    return float(found.group(1).replace(",", "").rstrip(".")) if found else None


def gsm8k_answer(text: str) -> float | None:
    r"""Returns the number in the first \boxed{} that has one, else in the answer tag.

    A box ends at its first closing brace and holds no line break; of a box the first number
    counts, of the tag the last.
    """
    for content in re.findall(r"\\boxed\{(.*?)\}", text):
        content = content.strip()
        if content.strip("."):
            value = _float(content, first=True)
            if value is not None:
                return value
    content = tagged(text)
    return None if content is None else _float(content, first=False)


def _float(text: str, *, first: bool) -> float | None:
    try:
        return float(text)  # accepts inf, nan, 1e3 and 1_000 as the reference does
    except ValueError:
        numbers = _NUMBER.findall(text)
        return float(numbers[0 if first else -1]) if numbers else None


def gsm8k_match(truth: float | None, text: str) -> bool:
    """Returns whether the completion's number is exactly the gold one."""
    value = gsm8k_answer(text)
    return truth is not None and value is not None and value == truth


# math


def last_box(text: str) -> str | None:
    r"""Returns the last \boxed (else \fbox) to its balancing brace, without \boxed{} itself.

    The whole text where there is neither, None where the braces never balance; a \boxed followed
    by a space runs to the next dollar sign.
    """
    if "\\boxed " in text:
        return text.rsplit("\\boxed ", 1)[1].split("$")[0]
    start = text.rfind("\\boxed") if "\\boxed" in text else text.rfind("\\fbox")
    if start < 0:
        return text
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and depth == 0:
            found = text[start : place + 1]
            return found[len("\\boxed{") : -1] if found.startswith("\\boxed{") else found
    return None


def math_answer(text: str) -> str | None:
    """Returns the last box; where it is empty or unbalanced, the first answer tag's content."""
    return last_box(text) or tagged(text)


def normalise(text: str) -> str:
    """Returns the canonical writing that the reference compares.

    Raises IndexError, ValueError or AssertionError where the reference does; the caller then
    compares the texts as they are.
    """
    for old, new in _REWRITES:
        text = text.replace(old, new)
    if "\\text{ " in text:
        parts = text.split("\\text{ ")
        if len(parts) != 2:
            raise AssertionError(f"more than one unit in {text!r}")
        text = parts[0]
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    sides = text.split("=")
    text = sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text
    text = _braced_roots(text).replace(" ", "")
    text = _braced_fractions(text)
    return _slash("\\frac{1}{2}" if text == "0.5" else text)


_REWRITES = [
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
]


def _braced_roots(text: str) -> str:
    r"""Turns \sqrt3 into \sqrt{3}: one character, a blank included."""
    head, *rest = text.split("\\sqrt")
    return head + "".join(
        "\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest
    )


def _braced_fractions(text: str) -> str:
    r"""Turns \frac12 into \frac{1}{2}; after a numerator in braces nothing changes."""
    head, *rest = text.split("\\frac")
    out = head
    for part in rest:
        if part[0] == "{":
            out += "\\frac" + part
        elif len(part) < 2:
            return text
        else:
            top, bottom, tail = part[0], part[1], part[2:]
            out += f"\\frac{{{top}}}" + (part[1:] if bottom == "{" else f"{{{bottom}}}{tail}")
    return out


def _slash(text: str) -> str:
    r"""Turns 1/2 into \frac{1}{2}, for two whole numbers in canonical writing."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    top, bottom = int(parts[0]), int(parts[1])
    return f"\\frac{{{top}}}{{{bottom}}}" if text == f"{top}/{bottom}" else text


def math_match(truth: str, text: str) -> bool:
    """Returns whether answer and gold have the same canonical writing."""
    answer = math_answer(text)
    if answer is None:
        return False
    try:
        return normalise(truth) == normalise(answer)
    except (IndexError, ValueError, AssertionError):
        return truth == answer


# countdown

_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
LARGEST_POWER = 1000  # exponents and bases beyond are not worth the wait
LONGEST = 1000


def countdown_answer(text: str) -> str:
    """Returns the expression: the box, else the tag, else the whole text, left of the "="."""
    found = last_box(text)
    if found is None:
        tag = tagged(text)
        found = text if tag is None else tag
    for spelling, plain in (("\\div", "/"), ("\\times", "*"), ("\\cdot", "*")):
        found = found.replace(spelling, plain)
    equation = re.search(r"([0-9+\-*/() ]+)=[0-9. ]+", found)
    return equation.group(1).strip() if equation else found


def countdown_value(answer: str, numbers: list[int]) -> complex | float | None:
    """Returns Python's value of an expression of exactly `numbers`.

    None where other numbers are used, infinity where it is not arithmetic. Powers, whole division
    and decimal points pass, as in the reference.
    """
    if sorted(map(int, re.findall(r"\d+", answer))) != sorted(numbers):
        return None
    if len(answer) > LONGEST or not re.fullmatch(r"[\d+\-*/().\s]+", answer):
        return math.inf
    try:
        return _evaluate(ast.parse(answer.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return math.inf


def _evaluate(tree: ast.expr):
    match tree:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as op, operand=operand):
            value = _evaluate(operand)
            return -value if isinstance(op, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _evaluate(left), _evaluate(right)
            if isinstance(op, ast.Pow) and max(abs(a), abs(b)) > LARGEST_POWER:
                raise OverflowError(f"{a} ** {b} is too large")
            return _OPERATORS[type(op)](a, b)
    raise ValueError("not arithmetic")


def countdown_match(numbers: list[int], target: float, text: str) -> bool:
    """Returns whether the expression uses exactly the numbers and is within 1e-5 of the target."""
    value = countdown_value(countdown_answer(text), numbers)
    return value is not None and abs(value - target) < 1e-5


# sudoku

_SUDOKU = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<answer>.*?```\s*([\d\s]+)```",
        rf"<answer>(.*?)(?:{END}|</answer>)",
        rf"</answer>(.*?)(?:{END}|$)",
        r"(\d{16})\s*</answer>",
        r"\b(\d{16})\b",
    )
]


def sudoku_answer(text: str) -> str:
    """Returns the first of five places that is not blank, cut or padded with 0 to 16, or ""."""
    for pattern in _SUDOKU:
        found = pattern.search(text)
        if found and found.group(1).strip():
            return "".join(found.group(1).split())[:16].ljust(16, "0")
    return ""


def sudoku_cells(puzzle: str, solution: str, text: str) -> int:
    """Returns how many of the empty cells hold the solution's digit; changed clues cost nothing."""
    rows = zip(puzzle, solution, sudoku_answer(text), strict=False)
    return sum(clue == "0" and right == cell for clue, right, cell in rows)
