"""Reading an arithmetic expression out of a completion and evaluating it exactly and safely.

The text is parsed with ast and only whole numbers, + - * / and parentheses are let through, so
nothing a model writes is ever executed.
"""

import ast
import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

LONGEST = 200  # characters; keeps the parser away from its recursion limit

_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SPELLINGS = {
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "\\left": "",
    "\\right": "",
    "\u00d7": "*",
    "\u00b7": "*",
    "\u00f7": "/",
    "\u2212": "-",
    "$": "",
}
_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def last_box(text: str) -> str | None:
    r"""Returns the content of the last \boxed{...} whose braces balance, or None."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        begin = start + len("\\boxed{")
        depth = 1
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[begin:place]
        start = text.rfind("\\boxed{", 0, start)
    return None


def extract(completion: str) -> str:
    r"""Returns the expression in a completion, in plain operators and without what follows an "=".

    It is the last \boxed{}, else the last answer tag, else the whole text, stripped.
    """
    found = last_box(completion)
    if found is None:
        tagged = _TAG.findall(completion)
        found = tagged[-1] if tagged else completion
    for spelling, plain in _SPELLINGS.items():
        found = found.replace(spelling, plain)
    return " ".join(found.split("=")[0].split())


def parse(text: str) -> ast.expr | None:
    """Returns the syntax tree of an expression, or None when it is not one of the allowed kind."""
    if len(text) > LONGEST or not _ALLOWED.fullmatch(text):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if _allowed(tree) else None


def _allowed(tree: ast.expr) -> bool:
    """Returns whether a tree holds only whole numbers, signs and the four operators."""
    match tree:
        case ast.Constant(value=value):
            return type(value) is int
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _allowed(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return type(op) in _OPERATORS and _allowed(left) and _allowed(right)
    return False


def numbers(tree: ast.expr) -> Iterator[int]:
    """Returns the whole numbers written in a tree that parse() let through."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            yield node.value


def value(tree: ast.expr) -> Fraction | None:
    """Returns the exact value of a tree that parse() let through; None where it divides by zero."""
    try:
        return _value(tree)
    except ZeroDivisionError:
        return None


def _value(tree: ast.expr) -> Fraction:
    match tree:
        case ast.Constant(value=int(number)):
            return Fraction(number)
        case ast.UnaryOp(op=op, operand=operand):
            return -_value(operand) if isinstance(op, ast.USub) else _value(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise TypeError(f"value() takes a tree from parse(), not a {type(tree).__name__}")
