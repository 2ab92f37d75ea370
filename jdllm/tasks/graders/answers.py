r"""Reading a final answer out of a completion: where it stands, and which number it states.

The sane readings, which the default graders share; d1.py holds those of the reference.
"""

import re
from fractions import Fraction

from jdllm.tasks.puzzles.expression import last_box

_BRACES = re.compile(r"\{([^{}]*)\}")
_TAG = re.compile(r"<answer>(.*?)(?:</answer>|<\||$)", re.DOTALL)
_SPACES = re.compile(r"\\[!,;: ]|~")
_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*(\{[^{}]*\}|\d)\s*(\{[^{}]*\}|\d)")
# A minus after a letter, a digit or a bracket subtracts; it is not a sign.
_SIGN = r"(?:(?<![\w)}])-\s*)?"
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(rf"{_SIGN}{_DIGITS}(?:\s*/\s*{_DIGITS})?")


def final(text: str) -> str | None:
    r"""Returns the content of the last non-empty \boxed{}, else of the last answer tag, or None.

    A tag that is never closed runs to the next special token or to the end.
    """
    boxed = last_box(text)
    if boxed and boxed.strip(" ."):
        return boxed
    tags = [tag.strip() for tag in _TAG.findall(text) if tag.strip()]
    return tags[-1] if tags else None


def braced(text: str) -> list[str]:
    """The texts in curly braces, in order; those that hold nothing are left out."""
    return [found.strip() for found in _BRACES.findall(text) if found.strip()]


def plain(text: str) -> str:
    r"""Returns a text without LaTeX spacing, dollar and percent signs, with fractions as a/b."""
    text = _SPACES.sub("", text).replace("{,}", ",").replace("\u2212", "-")
    text = re.sub(r"\\left|\\right|\\?[$%]", "", text)
    return _FRACTION.sub(lambda found: f" {_bare(found[1])}/{_bare(found[2])}", text)


def _bare(group: str) -> str:
    return group.strip("{} ")


def numbers(text: str) -> list[Fraction]:
    """Returns the numbers written in a text, exactly: 1,000 is a thousand, 1/2 a half."""
    return [
        value for word in _NUMBER.findall(plain(text)) if (value := _fraction(word)) is not None
    ]


def number(text: str) -> Fraction | None:
    """Returns the number that is all of a text, or None where it is not exactly one number."""
    word = plain(text).strip().rstrip(".")
    return _fraction(word) if _NUMBER.fullmatch(word) else None


def _fraction(word: str) -> Fraction | None:
    top, _, bottom = re.sub(r"[,\s]", "", word).partition("/")
    below = Fraction(bottom or 1)
    return Fraction(top) / below if below else None


def words(text: str) -> str:
    r"""Returns the text with \text{} and its kin replaced by what they hold."""
    return _WORDS.sub(r"\1", text)
