r"""MATH-500 as d1 asks it: zero-shot, the answer in \boxed{}; and when two answers are the same."""

import re

from jdllm.tasks.graders import answers, d1
from jdllm.tasks.lm_eval import gsm8k

HUB = {"dataset_path": "HuggingFaceH4/MATH-500"}
INSTRUCTION = gsm8k.INSTRUCTION

_ROOT = re.compile(r"\\sqrt\s*(\d|[a-z])")
_NAMED = re.compile(r"[a-zA-Z]\w{0,2}(?:\([a-z]\))?\s*(?:=|\\in\b)")
_UNIT = re.compile(r"(?<=[\d}])\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$")


def canonical(answer: str) -> str:
    r"""Returns one writing for answers that only differ in layout.

    Spacing, \left and \right, degree, dollar and percent signs, a unit behind a number, a name in
    front ("x =", "f(x) =", "x \in"), a trailing dot and \text{} go; fractions become a/b, one
    character under a root gets braces, and thousands lose their commas.
    """
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "", answer.strip().rstrip("."))
    text = answers.words(_UNIT.sub("", text))
    found = _NAMED.match(text)
    if found and text.count("=") < 2:
        text = text[found.end() :]
    value = answers.number(text)
    if value is not None:
        return str(value)
    return _ROOT.sub(r"\\sqrt{\1}", "".join(answers.plain(text).split()))


def same(truth: str, answer: str) -> bool:
    """Returns whether two answers are equal: in canonical form, as numbers, or as words."""
    one, other = canonical(truth), canonical(answer)
    return one == other or (one.isalpha() and len(one) > 1 and one.lower() == other.lower())


def grade(doc: dict, completion: str) -> dict[str, float]:
    r"""Returns solved (by the last \boxed{}, answer tag or line) and d1_match (d1's verdict)."""
    answer = answers.final(completion)
    if answer is None:
        answer = (completion.strip().splitlines() or [""])[-1]
    return {
        "solved": float(same(doc["answer"], answer)),
        "d1_match": float(d1.math_match(doc["answer"], completion)),
    }
