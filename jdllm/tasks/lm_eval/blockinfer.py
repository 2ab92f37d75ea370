"""HotpotQA without passages and MMLU, as BlockInfer's sample of 200 questions has them."""

import re
from collections import Counter

from jdllm.tasks.graders.answers import braced

LETTERS = "ABCD"
_LETTER = re.compile(r"\(?\b([A-D])\b\)?")


def answer(completion: str) -> str:
    """Returns the last text in curly braces, else the first line."""
    found = braced(completion)
    return found[-1] if found else (completion.strip().splitlines() or [""])[0]


def words(text: str) -> list[str]:
    """Returns lower-case words without articles and punctuation."""
    return re.sub(r"\b(a|an|the)\b|[^\w\s]", " ", text.lower()).split()


def grade_hotpotqa(doc: dict, completion: str) -> dict[str, float]:
    """Returns exact_match and f1 of the words of the answer, the better of the listed answers."""
    said = words(answer(completion))
    scores = []
    for listed in doc["answers"]:
        wanted = words(listed)
        shared = sum((Counter(said) & Counter(wanted)).values())
        scores.append(2 * shared / (len(said) + len(wanted)) if shared else 0.0)
    right = any(said == words(listed) for listed in doc["answers"])
    return {"exact_match": float(right), "f1": max(scores, default=0.0)}


def letter(completion: str) -> str:
    """Returns the letter chosen: in braces, else after the last "answer is", else the first.

    "" where there is none.
    """
    texts = [*reversed(braced(completion))]
    texts += [*reversed(re.split(r"(?i)answer(?: is|:)", completion)[1:]), completion]
    found = (_LETTER.search(text) for text in texts)
    return next((match[1] for match in found if match), "")


def grade_mmlu(doc: dict, completion: str) -> dict[str, float]:
    """Returns exact_match: whether the letter chosen is the right one."""
    return {"exact_match": float(letter(completion) == LETTERS[doc["answer"]])}


CHOICES = "{{question.strip()}}\n" + "".join(
    f"{letter}. {{{{choices[{place}]}}}}\n" for place, letter in enumerate(LETTERS)
)
HOTPOTQA_PROMPT = (
    "{{question.strip()}}\nAnswer in a few words and put the final answer in curly braces, "
    "like {answer}."
)
MMLU_PROMPT = CHOICES + "Choose one of A, B, C and D and put its letter in curly braces, like {A}."
