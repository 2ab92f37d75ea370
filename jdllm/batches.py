"""Batches: which prompts share one, where rows stand, what they draw, and what they begin with."""

import dataclasses
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import jax
import numpy as np

GRAIN = 32  # columns between the sizes of short canvases, and of short common prefixes
WORTH = 16_384  # columns that a common prefix must save; a program of its own costs seconds


def bucket(length: int, sizes: int = 4) -> int:
    """The canvas room that prompts of up to `length` tokens share: few sizes, few programs.

    Multiples of 32, and at most so many sizes between two powers of 2.
    """
    step = max(GRAIN, (1 << (length - 1).bit_length()) // (2 * sizes))
    return -(-length // step) * step


def plan_batches(lengths: Sequence[int], size: int, multiple: int) -> list[list[int]]:
    """Splits prompts, sorted by length, into even batches of at most `size` rows.

    Prompts of different buckets never share a batch; sizes are what is left after an even split,
    and callers fill rows up to a multiple of `multiple`.
    """
    size = max(size // multiple, 1) * multiple
    rooms: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        rooms.setdefault(bucket(max(lengths[i], 1)), []).append(i)
    batches = []
    for rows in rooms.values():
        count = -(-len(rows) // size)
        even = -(-len(rows) // count)
        batches += [rows[start : start + even] for start in range(0, len(rows), even)]
    return batches


def heights(batches: Sequence[Sequence[int]], lengths: Sequence[int], multiple: int) -> list[int]:
    """Rows that each batch is filled up to: the same throughout a bucket, so one program serves."""
    rooms = [bucket(max(lengths[batch[0]], 1)) for batch in batches]
    most: dict[int, int] = {}
    for room, batch in zip(rooms, batches, strict=True):
        most[room] = max(most.get(room, 0), -(-len(batch) // multiple) * multiple)
    return [most[room] for room in rooms]


def deal(rows: int, height: int, replicas: int) -> list[int]:
    """The place of each row in a batch of `height`, so that replicas get equally many, in turn.

    A replica holds neighbouring places; none has more than one row less than another.
    """
    share = height // replicas
    return [i % replicas * share + i // replicas for i in range(rows)]


def row_seeds(rows: Sequence[Sequence[int]], samples: Sequence[int] | None = None) -> list[int]:
    """A number for each prompt's random draws: from its ids, and its number among its repeats.

    So a prompt draws the same alone and in company, and repeated prompts draw differently.
    """
    seen: Counter[int] = Counter()
    seeds = []
    for i, row in enumerate(rows):
        digest = zlib.crc32(np.array(row, np.int32).tobytes())
        number = seen[digest] if samples is None else samples[i]
        seeds.append((digest + number * 0x9E3779B1) % (1 << 32))
        seen[digest] += 1
    return seeds


def row_keys(seed: int, numbers: Sequence[int] | np.ndarray) -> jax.Array:
    """The random keys of rows, by their numbers (`row_seeds`)."""
    base = jax.random.key(seed)
    return jax.vmap(lambda n: jax.random.fold_in(base, n))(np.asarray(numbers, np.uint32))


@dataclasses.dataclass(frozen=True)
class Common:
    """What prompts begin with, as far as many begin with the same: few-shot examples, say."""

    prefixes: list[list[int]]
    """Token ids, different ones of the same length."""
    which: list[int]
    """By prompt: the number of its prefix."""

    @property
    def length(self) -> int:
        """Tokens of a prefix."""
        return len(self.prefixes[0])


def common_prefixes(rows: Sequence[Sequence[int]], block: int, room: int) -> Common | None:
    """The prefixes, of whole blocks, that save the most columns; None where they save too few.

    All have one length, shorter than the shortest prompt, and take at most `room` columns
    together. One is enough for a task with examples; tasks or subjects that come together bring
    one each, and prompts that repeat share more than their examples.
    """
    texts = [np.asarray(row, np.int32).tobytes() for row in rows]
    best, saved = 0, WORTH - 1
    for length in prefix_lengths(block, min(map(len, rows), default=0)):
        count = len({text[: 4 * length] for text in texts})
        if count * length <= room and (len(rows) - count) * length > saved:
            best, saved = length, (len(rows) - count) * length
    if not best:
        return None
    numbers: dict[bytes, int] = {}
    which = [numbers.setdefault(text[: 4 * best], len(numbers)) for text in texts]
    return Common([np.frombuffer(text, np.int32).tolist() for text in numbers], which)


def prefix_lengths(block: int, below: int) -> Iterator[int]:
    """Lengths that a common prefix may have: whole blocks, about 32 tokens apart.

    From 1024 tokens on at most sixteen lengths an octave: each has programs of its own.
    """
    length = 0
    while True:
        step = max(GRAIN, (1 << length.bit_length()) // 32)
        length += -(-step // block) * block
        if length >= below:
            return
        yield length
