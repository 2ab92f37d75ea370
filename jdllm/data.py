"""Training data as arrays: examples from a file or from task generators, encoded once and cached.

A row is prompt ids, response ids, then padding with eos, which is trained on (it teaches length).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jdllm.configs import ModelConfig
from jdllm.tasks import TASKS
from jdllm.tokenizer import encode_prompts, encode_responses

CHUNK = 20_000


@dataclasses.dataclass(frozen=True)
class Rows:
    """Encoded examples: tokens [n, T] (uint16 or int32), prompt lengths and lengths [n] int32."""

    tokens: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray

    def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows at `index` (any shape), tokens widened to int32."""
        return self.tokens[index].astype(np.int32), self.prompt_lengths[index], self.lengths[index]


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Reads "sudoku:1,countdown:3" into names and weights; ValueError for an unknown task."""
    mixture = []
    for part in text.split(","):
        name, _, share = part.partition(":")
        if name not in TASKS:
            raise ValueError(f"task={name} is unknown; there are {', '.join(sorted(TASKS))}")
        mixture.append((name, float(share or 1)))
    return mixture


def generated_pairs(mixture: str, examples: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompt and response of `examples` generated docs, split over tasks by weight."""
    parsed = parse_mixture(mixture)
    total = sum(share for _, share in parsed)
    for name, share in parsed:
        task = TASKS[name]
        for doc in task.generate(round(examples * share / total), seed, held_out=False):
            yield task.prompt(doc), task.response(doc)


def file_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Prompt and response of every row of a .jsonl file; a .txt file is one response.

    A row has the keys prompt and response, or messages (the last one is the response, the user
    turn before it the prompt), or text. ValueError, naming the line, for any other row.
    """
    if path.suffix != ".jsonl":
        yield "", path.read_text(encoding="utf-8")
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line) if line.strip() else None
            match row:
                case None:
                    continue
                case {"prompt": str(prompt), "response": str(response)}:
                    yield prompt, response
                case {"messages": [*_, {"content": str(prompt)}, {"content": str(response)}]}:
                    yield prompt, response
                case {"text": str(text)}:
                    yield "", text
                case _:
                    raise ValueError(
                        f"{path}, line {number}: a row needs the keys prompt and response, or "
                        f"messages, or text; it has {', '.join(row)}"
                    )


def _encode(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], end_id: int
) -> Iterator[tuple[list[int], list[int]]]:
    prompts = encode_prompts(tokenizer, [p for p, _ in pairs])
    responses = encode_responses(tokenizer, [r for _, r in pairs], end_id)
    for (text, _), prompt, response in zip(pairs, prompts, responses, strict=True):
        yield (prompt if text else []), response


def _canvases(
    prompt: list[int], response: list[int], length: int, response_length: int | None
) -> Iterator[tuple[list[int], int, bool]]:
    """Canvases (ids, end column, whether the end was lost) of one example.

    Plain text longer than a canvas becomes several; an answer is never split, but cut.
    """
    step = length if not prompt else max(len(response), 1)
    for start in range(0, len(response), step):
        ids = prompt + response[start : start + step]
        end = min(length, len(prompt) + (response_length or length))
        if len(prompt) < end:
            yield ids[:end], end, len(ids) > end


def encode_rows(
    tokenizer: Any,
    pairs: Iterable[tuple[str, str]],
    config: ModelConfig,
    length: int,
    response_length: int | None,
) -> Rows:
    """Encodes examples into canvases of `length` columns.

    With `response_length` the canvas of a row ends that many columns after its prompt (as in
    decoding with that gen_length) and the rest is hidden; without it every row fills all `length`
    columns, as in LLaDA's and EDIT's recipe. Longer examples lose their end. ValueError where no
    example leaves room for a response.
    """
    kind = np.uint16 if config.vocab <= 1 << 16 else np.int32
    parts: list[tuple[np.ndarray, list[int], list[int]]] = []
    cut = 0
    with tqdm(desc="encoding", unit=" examples", unit_scale=True, mininterval=1.0) as bar:
        for chunk in batched(pairs, CHUNK):
            canvases, starts, ends = [], [], []
            for prompt, response in _encode(tokenizer, chunk, config.stop_ids[-1]):
                for ids, end, lost in _canvases(prompt, response, length, response_length):
                    canvases.append(ids)
                    starts.append(len(prompt))
                    ends.append(end)
                    cut += lost
            tokens = np.full((len(canvases), length), config.pad_id, kind)
            for row, ids in zip(tokens, canvases, strict=True):
                row[: len(ids)] = ids
            parts.append((tokens, starts, ends))
            bar.update(len(chunk))
    tokens, starts, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(tokens):
        raise ValueError(f"no example leaves room for a response within length={length}")
    if cut:
        print(f"note: {cut} examples are longer than their canvas and lose their end")
    return Rows(tokens, starts.astype(np.int32), ends.astype(np.int32))


def cached_rows(folder: Path, key: dict[str, Any], build: Callable[[], Rows]) -> Rows:
    """`build()`'s rows, kept in `folder` under a name made from `key` and read back next time."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"rows-{name}.npz"
    if not path.exists():
        rows = build()
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **dataclasses.asdict(rows))
        os.replace(partial, path)
    with np.load(path) as stored:
        return Rows(**stored)


def batch_index(rows: int, size: int, step: int, seed: int) -> np.ndarray:
    """Row numbers of batch `step`: a fresh permutation an epoch, and a function of step alone.

    So a resumed run sees the batches that it would have seen. Rows that do not fill the last
    batch of an epoch wait for the next one; a batch larger than the data wraps around.
    """
    per_epoch = max(rows // size, 1)
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return np.take(order, np.arange(place * size, (place + 1) * size), mode="wrap")
