"""Training text: where it comes from, and how a row of it becomes an example.

An example is plain text, or a conversation whose assistant turns are learned.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jdllm.runtime.hints import asked, nearest
from jdllm.tasks import TASKS
from jdllm.tokenizer import Message

type Example = str | list[Message]
FILES = (".jsonl", ".txt")
HUB = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
S1K = (  # how d1 asks for the form in which s1K's answers are given
    "\nRespond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n"
    "<answer>\n...\n</answer>\n\n\n"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """One file, folder or hub data set of a mixture, or one generated task."""

    name: str
    share: float | None = None
    """How much of an epoch it is, against the others; None: each of its examples once."""
    split: str = "train"
    """Of a folder or a hub data set."""
    generated: bool = False
    """Whether it is a task that makes its examples."""


def parse_mixture(text: str, setting: str) -> list[tuple[str, float | None]]:
    """Reads "a:1,b:3" into names and shares; all of them have a share or none has.

    ValueError for a share that is not above 0, and where some have one and some have none.
    """
    mixture: list[tuple[str, float | None]] = []
    for part in text.split(","):
        name, colon, share = part.strip().rpartition(":")
        if not colon:
            mixture.append((part.strip(), None))
            continue
        try:
            weight = float(share)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"{setting}={part}: a share must be a number above 0, for example {name}:2"
            )
        mixture.append((name, weight))
    if len({share is None for _, share in mixture}) > 1:
        raise ValueError(f"{setting}={text}: give each a share, or none")
    return mixture


def parse_tasks(text: str) -> list[Source]:
    """Reads "sudoku:1,countdown:3"; a task without a share has 1.

    ValueError, with the nearest names, for an unknown task, and as in `parse_mixture`.
    """
    found = parse_mixture(text, "task")
    for name, _ in found:
        if name not in TASKS:
            hint = (near := asked(nearest(name, TASKS))) and f"{near} "
            raise ValueError(f"task={name} is unknown; {hint}there are {', '.join(sorted(TASKS))}")
    return [Source(name, share or 1.0, generated=True) for name, share in found]


def parse_data(text: str, setting: str = "data") -> list[Source]:
    """Reads "a.jsonl:2,owner/name@split:1": files, folders and hub data sets with shares.

    ValueError for a name that can be none of them or comes twice, and as in `parse_mixture`.
    """
    sources = []
    for full, share in parse_mixture(text, setting):
        name, _, split = full.partition("@")
        name = os.path.expanduser(name)
        folder = Path(name).is_dir() or name.endswith(os.sep)
        if not (name and (Path(name).suffix in FILES or folder or HUB.fullmatch(name))):
            raise ValueError(
                f"{setting}={name} must end in .jsonl (one example a line) or .txt (plain text), "
                "or be a folder or an id of the hub, owner/name"
            )
        sources.append(Source(name, share, split or "train"))
        if [(s.name, s.split) for s in sources].count((name, split or "train")) > 1:
            raise ValueError(f"{setting}={text}: {full} is there twice; give it one larger share")
    return sources


def is_file(source: Source) -> bool:
    """Whether the source is one file, read by us, and not a data set of the hub or a folder."""
    return Path(source.name).suffix in FILES and not Path(source.name).is_dir()


def check_sources(sources: Iterable[Source]) -> None:
    """FileNotFoundError where a file is not there: asked before a large model is loaded."""
    for source in sources:
        if is_file(source) and not Path(source.name).is_file():
            raise FileNotFoundError(f"data={source.name}: there is no such file")


def read(source: Source) -> Iterator[Example]:
    """The examples of a file, a folder or a hub data set.

    ValueError, naming the row, for one of no known form; FileNotFoundError or ValueError where
    there is no such data set.
    """
    check_sources([source])
    if not is_file(source):
        yield from _hub_examples(source)
        return
    path = Path(source.name)
    try:
        if path.suffix == ".jsonl":
            yield from _jsonl_examples(path)
        else:
            yield _not_blank(path, path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"data={path} must be UTF-8 text: {error.reason}") from None


def _not_blank(path: Path, text: str) -> str:
    if not text.strip():
        raise ValueError(f"data={path} holds no text")
    return text


def _jsonl_examples(path: Path) -> Iterator[Example]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield example_of(json.loads(line))
            except json.JSONDecodeError as error:
                reason = f"not valid JSON: {error.msg} at column {error.colno}"
                raise ValueError(f"{path}, line {number}: {reason}") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


@functools.lru_cache(maxsize=8)
def load_rows(source: Source) -> Any:
    """The rows of a hub data set or of a folder that `datasets` reads; ValueError without them."""
    import datasets  # half a second, hence its place

    owner, _, rest = source.name.partition("/")
    path, name = source.name, None
    if not Path(path).is_dir() and "/" in rest:  # owner/name/config
        path, _, name = source.name.rpartition("/")
    try:
        return datasets.load_dataset(path, name, split=source.split)
    except Exception as error:  # the library and what it stands on raise all kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"data={source.name}@{source.split} cannot be loaded: {reason}") from None


def _hub_examples(source: Source) -> Iterator[Example]:
    for number, row in enumerate(load_rows(source), 1):
        try:
            yield example_of(row)
        except ValueError as error:
            raise ValueError(f"{source.name}, row {number}: {error}") from None


def generated(source: Source, sources: list[Source], examples: int, seed: int) -> Iterator[Example]:
    """A task's part of so many generated documents: prompts and responses."""
    total = sum(other.share or 0 for other in sources)
    task, share = TASKS[source.name], source.share or 0
    for doc in task.generate(round(examples * share / total), seed, held_out=False):
        yield conversation(task.prompt(doc), task.response(doc))


def fingerprint(source: Source) -> str:
    """A hash of what a source holds, or of what names it where it is not a file."""
    if source.generated:
        return source.name
    if is_file(source):
        with Path(source.name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return getattr(load_rows(source), "_fingerprint", "")


# Rows


def conversation(prompt: str, response: str) -> list[Message]:
    """One question and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def without_reasoning(example: Example) -> list[Message]:
    """A question, and the result alone of an answer that ends in "#### result", as gsm8k's do.

    ValueError for an example of another form.
    """
    turns = example if isinstance(example, list) else []
    _, mark, result = turns[-1]["content"].rpartition("####") if turns else ("", "", "")
    if len(turns) != 2 or not mark or not result.strip():
        raise ValueError(
            "hidden_reasoning= needs questions whose answers end in '#### ' and a result, as "
            "openai/gsm8k/main has them"
        )
    return conversation(
        S1K + turns[0]["content"], f"</reasoning>\n<answer>{result.strip()}</answer>"
    )


def parse_gap(text: str) -> tuple[int, int]:
    """Reads "128:256", the least and the largest number of columns; ValueError for others."""
    low, _, high = text.partition(":")
    if low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high):
        return int(low), int(high)
    raise ValueError(f"hidden_reasoning={text} must be two rising numbers of columns: 128:256")


def _alpaca(row: Mapping[str, Any]) -> Example:
    prompt = "\n\n".join(filter(None, [row["instruction"], row.get("input") or ""]))
    return conversation(prompt, row["output"])


def _s1k(row: Mapping[str, Any]) -> Example:
    """As d1 and EDIT frame it: the first trajectory is the reasoning, the attempt the answer."""
    thoughts = row["thinking_trajectories"][0]
    answer = f"<reasoning>{thoughts}</reasoning>\n<answer>{row['attempt']}</answer>"
    return conversation(S1K + row["question"], answer)


def _messages(row: Mapping[str, Any]) -> Example:
    """A conversation up to its last answer."""
    messages = row["messages"]
    turns = [m for m in messages if isinstance(m, Mapping)]
    if len(turns) != len(messages) or not all(
        isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in turns
    ):
        raise ValueError("messages need the strings role and content each")
    answers = [i for i, m in enumerate(turns) if m["role"] == "assistant"]
    if not answers or not any(m["role"] == "user" for m in turns[: answers[-1]]):
        raise ValueError(
            "messages need an assistant turn behind a user's: there is nothing to learn"
        )
    return list(turns[: answers[-1] + 1])


FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Example]] = {
    ("messages",): _messages,
    ("prompt", "response"): lambda row: conversation(row["prompt"], row["response"]),
    ("instruction", "output"): _alpaca,
    ("question", "thinking_trajectories", "attempt"): _s1k,
    ("question", "answer"): lambda row: conversation(row["question"], row["answer"]),
    ("text",): lambda row: row["text"],
}
"""How a row becomes an example, by the columns that it has; the first that fit count."""
LISTS = {"messages", "thinking_trajectories"}


def example_of(row: Any) -> Example:
    """The example of one row; an empty prompt means plain text. ValueError for no known form."""
    if isinstance(row, Mapping):
        for columns, form in FORMS.items():
            if all(isinstance(row.get(c), list if c in LISTS else str) for c in columns):
                found = form(row)
                if isinstance(found, list) and len(found) == 2 and not found[0]["content"]:
                    return found[1]["content"]
                return found
    known = "; ".join(" and ".join(columns) for columns in FORMS)
    keys = f"it has the keys {', '.join(row) or '(none)'}" if isinstance(row, Mapping) else ""
    raise ValueError(
        f"a row needs the strings of one of these forms: {known} (messages is a list); "
        f"{keys or f'it is of type {type(row).__name__}'}"
    )
