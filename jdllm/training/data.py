"""Training data as arrays: examples from a file or from task generators, encoded once and cached.

A row is prompt ids, response ids, then padding with eos, which is trained on (it teaches length).
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jdllm.model.config import ModelConfig
from jdllm.runtime import processes
from jdllm.runtime.files import atomic_file
from jdllm.runtime.hints import asked, nearest
from jdllm.tasks import TASKS
from jdllm.tokenizer import Message, encode_prompts, encode_responses

type Pair = tuple[str | Sequence[Message], str]
CHUNK = 20_000


@dataclasses.dataclass(frozen=True)
class Rows:
    """Encoded examples: tokens [n, T] (uint16 or int32), prompt lengths and lengths [n] int32."""

    tokens: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray

    def place(self, index: np.ndarray, sharding: jax.sharding.Sharding) -> tuple[jax.Array, ...]:
        """The rows at `index` [A, B] on a mesh, as int32 [A, B, T], [A, B] and [A, B].

        A process reads only the rows of its own devices.
        """

        def one(array: np.ndarray) -> jax.Array:
            def read(part: Any) -> np.ndarray:
                return array[index[part[:2]]].astype(np.int32)

            return jax.make_array_from_callback(index.shape + array.shape[1:], sharding, read)

        return one(self.tokens), one(self.prompt_lengths), one(self.lengths)

    def digest(self) -> str:
        """A short hash of the content, the same wherever and whenever the rows were made."""
        whole = hashlib.sha256()
        for array in (self.tokens, self.prompt_lengths, self.lengths):
            whole.update(f"{array.dtype} {array.shape}".encode())
            whole.update(np.ascontiguousarray(array).data)
        return whole.hexdigest()[:16]


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Reads "sudoku:1,countdown:3" into names and shares (1 where none is given).

    ValueError, with the nearest names, for an unknown task, and for a share that is not above 0.
    """
    mixture = []
    for part in text.split(","):
        name, colon, share = part.strip().partition(":")
        if name not in TASKS:
            hint = (near := asked(nearest(name, TASKS))) and f"{near} "
            raise ValueError(f"task={name} is unknown; {hint}there are {', '.join(sorted(TASKS))}")
        try:
            weight = float(share) if colon else 1.0
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ValueError(f"task={part}: a share must be a number above 0, for example {name}:2")
        mixture.append((name, weight))
    return mixture


def generated_pairs(mixture: str, examples: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompt and response of `examples` generated docs, split over tasks by share."""
    parsed = parse_mixture(mixture)
    total = sum(share for _, share in parsed)
    for name, share in parsed:
        task = TASKS[name]
        for doc in task.generate(round(examples * share / total), seed, held_out=False):
            yield task.prompt(doc), task.response(doc)


def check_file(path: Path) -> None:
    """FileNotFoundError where there is no file, ValueError where its name ends in another way."""
    if not path.is_file():
        raise FileNotFoundError(f"data={path}: there is no such file")
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(
            f"data={path} must end in .jsonl (one example a line) or .txt (plain text)"
        )


def file_pairs(path: Path) -> Iterator[Pair]:
    """Prompt and response of every row of a .jsonl file; a .txt file is one response.

    A row has the keys prompt and response, or messages (the last one is the response, all turns
    before it are the prompt), or text; empty lines are skipped. An empty prompt means plain text.
    ValueError, naming the line, for any other row; FileNotFoundError where there is no such file.
    """
    check_file(path)
    try:
        if path.suffix == ".jsonl":
            yield from _jsonl_pairs(path)
        else:
            yield "", _not_blank(path, path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"data={path} must be UTF-8 text: {error.reason}") from None


def _not_blank(path: Path, text: str) -> str:
    if not text.strip():
        raise ValueError(f"data={path} holds no text")
    return text


def _jsonl_pairs(path: Path) -> Iterator[Pair]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _parse_row(json.loads(line))
            except json.JSONDecodeError as error:
                reason = f"not valid JSON: {error.msg} at column {error.colno}"
                raise ValueError(f"{path}, line {number}: {reason}") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def _parse_row(row: Any) -> Pair:
    """Prompt and response of one row; a single question is a string, a conversation its turns."""
    match row:
        case {"prompt": str(prompt), "response": str(response)}:
            return prompt, response
        case {
            "messages": [
                *earlier,
                {"role": "user", "content": str(prompt)},
                {"role": "assistant", "content": str(response)},
            ]
        } if all(map(_is_turn, earlier)):
            return [*earlier, {"role": "user", "content": prompt}] if earlier else prompt, response
        case {"text": str(text)}:
            return "", text
    rule = (
        "a row needs the strings prompt and response, or messages (each with the strings role and "
        "content) that end with a user and an assistant turn, or the string text"
    )
    keys = f"it has the keys {', '.join(row) or '(none)'}" if isinstance(row, dict) else ""
    raise ValueError(f"{rule}; {keys or f'it is of type {type(row).__name__}'}")


def _is_turn(message: Any) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False


def _encode(
    tokenizer: Any, pairs: Sequence[Pair], config: ModelConfig
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of prompts and responses; an answer ends with the turn, plain text with eos."""
    framed = iter(encode_prompts(tokenizer, [p for p, _ in pairs if p]))
    responses = encode_responses(tokenizer, [r for _, r in pairs])
    for (prompt, _), response in zip(pairs, responses, strict=True):
        if prompt:
            yield next(framed), [*response, config.stop_ids[-1]]
        else:
            yield [], [*response, config.eos_id]


def _canvases(
    prompt: list[int], response: list[int], length: int, response_length: int | None
) -> Iterator[tuple[list[int], int]]:
    """Canvases of one example: all its ids, which may be too many, and the end column.

    Plain text longer than a canvas becomes several; an answer is never split, but cut. Nothing
    where the prompt leaves no room.
    """
    end = min(length, len(prompt) + (response_length or length))
    step = len(response) if prompt else end
    if len(prompt) < end:
        for start in range(0, len(response), step):
            yield prompt + response[start : start + step], end


def encode_rows(
    tokenizer: Any,
    pairs: Iterable[Pair],
    config: ModelConfig,
    length: int,
    response_length: int | None,
) -> Rows:
    """Encodes examples into canvases of `length` columns.

    With `response_length` the canvas of a row ends that many columns after its prompt (as in
    decoding with that gen_length) and the rest is hidden; without it every row fills all `length`
    columns, as in LLaDA's and EDIT's recipe. Longer examples lose their end, and those whose
    prompt leaves no room are left out; a note counts both. ValueError where no example is left,
    or where the tokenizer is not the model's.
    """
    if len(tokenizer) > config.vocab:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, but the model knows only {config.vocab}; "
            "name the model's own with tokenizer="
        )
    kind = np.uint16 if config.vocab <= 1 << 16 else np.int32
    parts: list[tuple[np.ndarray, list[int], list[int]]] = []
    cut = dropped = 0
    with tqdm(desc="encoding", unit=" examples", unit_scale=True, mininterval=1.0) as bar:
        for chunk in batched(pairs, CHUNK):
            canvases, starts, ends = [], [], []
            for prompt, response in _encode(tokenizer, chunk, config):
                before = len(canvases)
                for ids, end in _canvases(prompt, response, length, response_length):
                    canvases.append(ids[:end])
                    starts.append(len(prompt))
                    ends.append(end)
                    cut += len(ids) > end
                dropped += len(canvases) == before
            tokens = np.full((len(canvases), length), config.pad_id, kind)
            for row, ids in zip(tokens, canvases, strict=True):
                row[: len(ids)] = ids
            parts.append((tokens, starts, ends))
            bar.update(len(chunk))
    if not sum(len(tokens) for tokens, _, _ in parts):
        reason = f"{dropped} prompts leave none within length={length}" if parts else "it is empty"
        raise ValueError(f"no example has room for a response in the training text: {reason}")
    if cut:
        processes.say(f"note: {cut} examples are longer than their canvas and lose their end")
    if dropped:
        processes.say(f"note: {dropped} examples are left out: their prompt fills length={length}")
    tokens, starts, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Rows(tokens, starts.astype(np.int32), ends.astype(np.int32))


def fingerprint(path: Path) -> str:
    """A hash of a file's content; "" where there is no file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_rows(folder: Path, key: dict[str, Any], build: Callable[[], Rows]) -> Rows:
    """`build()`'s rows, kept in `folder` under a name made from `key` and read back next time."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"rows-{name}.npz"
    if not path.exists():
        rows = build()
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.savez(file, **dataclasses.asdict(rows))
    with np.load(path) as stored:
        return Rows(**stored)


@functools.lru_cache(maxsize=1)
def _order(rows: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)


def batch_index(rows: int, size: int, step: int, seed: int) -> np.ndarray:
    """Row numbers of batch `step`: a fresh permutation an epoch, and a function of step alone.

    So a resumed run sees the batches that it would have seen. Rows that do not fill the last
    batch of an epoch wait for the next one; a batch larger than the data wraps around.
    """
    per_epoch = max(rows // size, 1)
    epoch, place = divmod(step, per_epoch)
    order = _order(rows, epoch, seed)
    return np.take(order, np.arange(place * size, (place + 1) * size), mode="wrap")
