"""Questions of a benchmark: prompts with a verdict each, generated or of a file."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jdllm.tasks import TASKS, Doc, Task
from jdllm.tasks.graders.answers import braced

GENERATED = ("sudoku", "countdown")  # the tasks that the bundled model was trained on
TAILS = {  # our wording of what BlockInfer asks of each source
    "gsm8k": "Work it out step by step. Write the final number in curly braces, like {answer}.",
    "math500": "Solve it. Write the final answer in curly braces, like {answer}.",
    "mmlu": "Write nothing but the number of the right option in curly braces, like {0}.",
    "longbench_hotpotqa": "Answer briefly, with the answer in curly braces, like {answer}.",
    "": "Write the answer in curly braces, like {answer}.",
}
ANSWER = r"answer(?: is)?:?\s*(.+?)(?:\.|<|$)"
# Where there are no braces: patterns in this order, of which the first match counts
FALLBACKS = {
    "gsm8k": [r"####\s*([\d,.]+)", r"(?:answer|result):\s*([\d,.]+)", r"=\s*([\d,.]+)",
              r"([\d,.]+)(?!.*[\d,.])"],
    "math500": [r"\\boxed\{([^}]+)\}", ANSWER],
    "mmlu": [r"(?<!\d)([0-3])(?!\d)", r"([0-3])"],
    "longbench_hotpotqa": [ANSWER],
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A prompt, and the verdict on a completion."""

    prompt: str
    right: Callable[[str], bool]
    source: str


def generated(names: Sequence[str], count: int, seed: int) -> list[Question]:
    """`count` held-out questions of our own tasks, in equal parts."""
    found = []
    for i, name in enumerate(names):
        share = (count + len(names) - 1 - i) // len(names)
        docs = TASKS[name].generate(share, seed, held_out=True) if share else []
        found += [of_document(TASKS[name], doc) for doc in docs]
    return found


def of_document(task: Task, doc: Doc) -> Question:
    """The question that a document of one of our tasks is."""
    return Question(
        task.prompt(doc), lambda text: task.grade(doc, text)[task.metric] == 1, task.name
    )


def read(path: Path, source: str | None) -> list[Question]:
    """The questions of a jsonl file with question, answer, choices, source; only those of `source`.

    ValueError, with the line, for one that is no such object.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            question = of_row(row)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path}: line {number} is no object with question, answer, choices, source"
            ) from None
        if source in (None, question.source):
            found.append(question)
    return found


def of_row(row: dict[str, Any]) -> Question:
    """The question of a row, its options numbered from 0."""
    source = row.get("source", "")
    choices = row.get("choices") or []
    choices = json.loads(choices) if isinstance(choices, str) else choices
    options = "\n".join(f"{i}. {choice}" for i, choice in enumerate(choices))
    prompt = "\n\n".join(filter(None, [row["question"], options, TAILS.get(source, TAILS[""])]))
    gold = str(row.get("answer", "")).strip()
    return Question(prompt, lambda text: same(extract(text, source), gold), source)


def extract(text: str, source: str) -> str:
    """The answer in a completion: first in curly braces, else by the patterns of the source."""
    if found := braced(text):
        return found[0]
    for pattern in FALLBACKS.get(source, []):
        if match := re.search(pattern, text, re.I | re.S if "(?!.*" in pattern else re.I):
            return match[1].strip()
    return " ".join(text.split()[:10])


def same(answer: str, gold: str) -> bool:
    """Equal up to case, spaces and commas."""
    plain = [re.sub(r"[\s,]", "", text).lower() for text in (answer, gold)]
    return plain[0] == plain[1]
