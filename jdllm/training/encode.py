"""Examples as ids: which columns are learned, where the last answer begins, what is cut off."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jdllm.model.config import ModelConfig
from jdllm.runtime import processes
from jdllm.runtime.files import atomic_file
from jdllm.tokenizer import MARK, encode_texts, render, unmarked
from jdllm.training.data import Example, without_reasoning

CHUNK = 20_000


@dataclasses.dataclass(frozen=True)
class Texts:
    """Encoded examples, one behind the other, without padding."""

    ids: np.ndarray
    """uint16 or int32 [columns of all]."""
    learned: np.ndarray
    """bool [columns of all]: assistants' turns with their ends, or plain text."""
    offsets: np.ndarray
    """int64 [n + 1]: where an example begins, and the end of the last."""
    answers: np.ndarray
    """int32 [n]: the column where an example's last answer begins."""

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """int64 [n]: columns of every example."""
        return np.diff(self.offsets)

    def digest(self) -> str:
        """A short hash of the content, the same wherever and whenever it was made."""
        whole = hashlib.sha256()
        for array in (self.ids, self.learned, self.offsets, self.answers):
            whole.update(f"{array.dtype} {array.shape}".encode())
            whole.update(np.ascontiguousarray(array).data)
        return whole.hexdigest()[:16]


@dataclasses.dataclass
class Counts:
    """What a note tells about examples that did not fit."""

    cut: int = 0
    dropped: int = 0
    rewritten: int = 0

    def tell(self, length: int) -> None:
        """Says so, one line for each that happened."""
        for number, what in (
            (self.cut, "examples are longer than their canvas and lose their end"),
            (self.dropped, f"examples are left out: their prompt fills length={length}"),
            (self.rewritten, "earlier answers carry no loss: the chat template rewrites them"),
        ):
            if number:
                processes.say(f"note: {number} {what}")


type Piece = tuple[str, bool]
type Columns = tuple[list[int], list[bool], int]
"""Ids, which of them are learned, and where the last answer begins."""


def written(text: str, content: str) -> str:
    """What `text` begins with of a message's content, as it is or trimmed; "" where it does not.

    Special tokens that the content quotes are marked in the text.
    """
    for wanted in (content, content.strip()):
        if text.startswith(wanted):
            return wanted
        end, places = 0, iter(wanted if MARK in text else "")
        while text[end : end + 1] == next(places, None):
            end += 1
            end += len(MARK) * text.startswith(MARK, end)
        if wanted and unmarked(text[:end]) == wanted:
            return text[:end]
    return ""


def pieces_of(tokenizer: Any, example: Example, counts: Counts) -> list[Piece]:
    """The text of an example in pieces, marked where they are learned; the last one always is.

    An earlier answer is learned where the chat template writes it behind the head that it had when
    it was the next to come, as it is or trimmed.
    """
    if isinstance(example, str):
        return [(example, True)]
    answer = example[-1]["content"]
    if len(example) == 2 and not getattr(tokenizer, "chat_template", None):
        return [(example[0]["content"], False), (answer, True)]
    whole = render(tokenizer, example[:-1], open_last=False)
    pieces, done = [], 0
    for i, message in enumerate(example[:-1]):
        if message["role"] != "assistant" or not any(m["role"] == "user" for m in example[:i]):
            continue
        head = render(tokenizer, example[:i], open_last=False)
        size = len(head) if whole.startswith(head) else len(whole)
        if found := written(whole[size:], message["content"]):
            pieces += [(whole[done:size], False), (found, True)]
            done = size + len(found)
        else:
            counts.rewritten += 1
    return [*pieces, (whole[done:], False), (answer, True)]


def joined(pieces: Sequence[tuple[list[int], bool]], config: ModelConfig) -> Columns:
    """One example of its pieces' ids. An answer's end of turn is learned, and so is a text's eos.

    Behind an earlier answer the template has written the end; behind the last one it is put here.
    """
    ids: list[int] = []
    learned: list[bool] = []
    for k, (part, is_answer) in enumerate(pieces):
        learned += [is_answer] * len(part)
        if k and not is_answer and part and part[0] in config.stop_ids:
            learned[len(ids)] = True
        ids += part
    end = config.stop_ids[-1] if len(pieces) > 1 else config.eos_id
    return [*ids, end], [*learned, True], len(ids) - len(pieces[-1][0])


def encoded(
    tokenizer: Any, examples: Sequence[Example], config: ModelConfig, counts: Counts
) -> Iterator[Columns]:
    """The columns of every example; its ids are made of the pieces of all at once."""
    pieces = [pieces_of(tokenizer, example, counts) for example in examples]
    ids = iter(encode_texts(tokenizer, [text for some in pieces for text, _ in some]))
    for some in pieces:
        yield joined([(next(ids), is_answer) for _, is_answer in some], config)


def gapped(columns: Columns, mask_id: int, gap: tuple[int, int], number: int) -> Columns:
    """With learned masks before the last answer, in place of a reasoning that nobody has written.

    How many is drawn by the example's number.
    """
    ids, learned, answer = columns
    size = int(np.random.default_rng(number).integers(gap[0], gap[1] + 1))
    filled = [*ids[:answer], *[mask_id] * size, *ids[answer:]]
    return filled, [*learned[:answer], *[True] * size, *learned[answer:]], answer


def windows(
    columns: Columns, length: int, response_length: int | None, first: Sequence[int] = ()
) -> Iterator[Columns]:
    """Parts of one example that are a canvas each, at most `length` columns.

    Plain text longer than a canvas becomes several, each behind `first`; a conversation is never
    split, but cut. Nothing where no learned column is left.
    """
    ids, learned, answer = columns
    if learned[0]:
        step = min(length, response_length or length) - len(first)
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            yield [*first, *part], [False] * len(first) + [True] * len(part), len(first)
        return
    end = min(length, answer + (response_length or length))
    if any(learned[:end]):
        yield ids[:end], learned[:end], answer


def encode_examples(
    tokenizer: Any,
    examples: Iterable[Example],
    config: ModelConfig,
    length: int,
    response_length: int | None = None,
    gap: tuple[int, int] | None = None,
) -> Texts:
    """Encodes examples, as much of each as a canvas of `length` columns holds.

    With `gap` only the result of an answer is encoded, behind so many masks.
    With `response_length` a canvas ends that many columns after where the last answer begins.
    Longer examples lose their end, and those whose prompt leaves no room are left out; a note
    counts both. ValueError where no example is left, or where the tokenizer is not the model's.
    """
    if len(tokenizer) > config.vocab:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, but the model knows only {config.vocab}; "
            "name the model's own with tokenizer="
        )
    bos = tokenizer.bos_token_id if config.shift_logits else None
    first = [] if bos is None else [bos]  # a model with shifted logits predicts nothing there
    kind = np.uint16 if config.vocab <= 1 << 16 else np.int32
    ids: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    answers: list[int] = []
    sizes, counts, any_there = [0], Counts(), False
    with tqdm(desc="encoding", unit=" examples", unit_scale=True, mininterval=1.0) as bar:
        for chunk in batched(examples, CHUNK):
            any_there = True
            own: list[int] = []  # of this chunk: one array of it is smaller than one per example
            flags: list[bool] = []
            rows = [without_reasoning(example) for example in chunk] if gap else chunk
            for columns in encoded(tokenizer, rows, config, counts):
                if gap:
                    columns = gapped(columns, config.mask_id, gap, len(answers))
                parts = list(windows(columns, length, response_length, first))
                counts.dropped += not parts
                kept = sum(len(part) - len(first) * columns[1][0] for part, _, _ in parts)
                counts.cut += bool(parts) and kept < len(columns[0])
                for part, marks, start in parts:
                    own += part
                    flags += marks
                    sizes.append(len(part))
                    answers.append(start)
            ids.append(np.array(own, kind))
            learned.append(np.array(flags, bool))
            bar.update(len(chunk))
    if not answers:
        left = f"{counts.dropped} prompts leave none within length={length}"
        reason = left if any_there else "it is empty"
        raise ValueError(f"no example has room for a response in the training text: {reason}")
    counts.tell(length)
    offsets = np.cumsum(sizes, dtype=np.int64)
    return Texts(np.concatenate(ids), np.concatenate(learned), offsets, np.array(answers, np.int32))


def fingerprint(path: Path) -> str:
    """A hash of a file's content; "" where there is no file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_texts(folder: Path, key: dict[str, Any], build: Callable[[], Texts]) -> Texts:
    """`build()`'s texts, kept in `folder` under a name made from `key` and read back next time."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"texts-{name}.npz"
    if not path.exists():
        texts = build()
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.savez(file, **dataclasses.asdict(texts))
    with np.load(path) as stored:
        return Texts(**stored)
