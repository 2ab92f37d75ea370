"""Rows of a batch: which examples, where they end, how they are padded, packed and ordered."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jdllm.model.config import ModelConfig
from jdllm.train.objective import HIDDEN, Batch
from jdllm.training.encode import Texts

OPEN = 64  # packed rows that are filled at the same time
WIDTHS = 8  # different widths, and so compiled programs, of batches grouped by length
GROUPED = 50  # batches whose rows are sorted together


@dataclasses.dataclass(frozen=True)
class Padding:
    """What fills a canvas behind its text: learned ids, or nothing."""

    ids: tuple[int, ...]
    """Repeated in this order; empty: the canvas ends with its text."""
    first: int | None = None
    """Once, before the others, unless the text ends with it."""


def parse_padding(text: str) -> tuple[str, int]:
    """Reads eos, none or rainbow:K into the name and K; ValueError for anything else."""
    name, _, count = text.partition(":")
    if name in ("eos", "none") and not count:
        return name, 0
    if name == "rainbow" and (count or "7").isdecimal() and int(count or 7) > 0:
        return name, int(count or 7)
    raise ValueError(f"padding={text} must be eos, none or rainbow:K with K ids, for example 7")


def choose_padding(text: str, config: ModelConfig, known: int) -> Padding:
    """The ids of `padding=text` for a model whose tokenizer has `known` ids.

    rainbow takes the first ids of the vocabulary that the tokenizer does not use. ValueError where
    there are too few.
    """
    name, count = parse_padding(text)
    if name == "none":
        return Padding(())
    if name == "eos":
        return Padding((config.pad_id,))
    used = {config.mask_id, config.pad_id, *config.stop_ids}
    free = [i for i in range(known, config.vocab) if i not in used][:count]
    if len(free) < count:
        raise ValueError(
            f"padding={text} needs {count} ids that the tokenizer does not use; this model has "
            f"{len(free)}: use rainbow:{max(len(free), 1)} or padding=eos"
        )
    return Padding(tuple(free), config.eos_id)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How examples become canvases."""

    length: int
    padding: Padding
    response_length: int | None = None
    """A canvas ends that many columns after where its last answer begins."""
    packing: bool = False
    """Several examples in a row, none of which sees another."""
    block: int = 1
    """Canvases of one example end at a multiple of it, as far as they are padded."""
    longest: bool = False
    """Batches of alike lengths, whose canvases end with the longest of them."""
    cutoff: bool = False
    """All responses of a batch end where that of one random row does."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of all sources, those of a source side by side."""

    texts: Texts
    layout: Layout
    documents: np.ndarray
    """int64: numbers of the examples, in the order of the rows."""
    bounds: np.ndarray
    """int64 [n + 1]: which of them a row holds."""
    sizes: tuple[int, ...]
    """Rows of every source."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n]: columns of text that a row holds."""
        size = self.texts.sizes[self.documents]
        return np.add.reduceat(size, self.bounds[:-1])

    def ends(self, numbers: np.ndarray, draw: Sequence[int]) -> tuple[np.ndarray, int]:
        """Where the canvases of a batch of unpacked rows end [rows], and the batch's width.

        `draw` are the numbers from which cutoff's random row is drawn.
        """
        layout, texts = self.layout, self.texts
        which = self.documents[self.bounds[numbers]]
        size, answer = texts.sizes[which], texts.answers[which]
        end = np.full(len(numbers), layout.length, np.int64)
        if layout.response_length is not None:
            end = np.minimum(answer + layout.response_length, end)
        if layout.cutoff:
            kept = (size - answer)[np.random.default_rng(draw).integers(len(numbers))]
            end = np.minimum(answer + kept, end)
        if layout.padding.ids:
            end = np.minimum(whole(end, layout.block), layout.length)
        else:
            end = np.minimum(end, size)
        width = layout.length
        if layout.longest:
            step = whole(-(-layout.length // WIDTHS), layout.block)
            width = min(int(whole(np.minimum(size, end).max(), step)), width)
            end = np.minimum(end, width)
        return end, width

    def spans(self, numbers: np.ndarray, draw: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
        """The examples of these rows, and in how many columns each ends, and the width."""
        if not self.layout.packing:
            end, width = self.ends(numbers, draw)
            return self.documents[self.bounds[numbers]][:, None], end[:, None], width
        parts = [self.documents[self.bounds[n] : self.bounds[n + 1]] for n in numbers]
        most = max(map(len, parts))
        which = np.stack([np.pad(p, (0, most - len(p)), constant_values=HIDDEN) for p in parts])
        end = np.where(which < 0, 0, padded_sizes(self.texts, self.layout)[which])
        return which, end, self.layout.length

    def canvases(
        self, which_BN: np.ndarray, end_BN: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, learned and example numbers [B, width] of rows of N examples at most."""
        texts, padding = self.texts, self.layout.padding
        tokens = np.zeros((len(which_BN), width), np.int32)
        learned = np.zeros(tokens.shape, bool)
        example = np.full(tokens.shape, HIDDEN, np.int32)
        row = np.repeat(np.arange(len(which_BN)), which_BN.shape[1])
        start = (np.cumsum(end_BN, axis=1) - end_BN).ravel()
        which, end = np.maximum(which_BN, 0).ravel(), end_BN.ravel()  # 0 columns of none
        each = np.repeat(np.arange(len(which)), end)  # the example of every column of all rows
        column = np.arange(len(each)) - np.repeat(np.cumsum(end) - end, end)
        place = row[each] * width + start[each] + column
        size = texts.sizes[which]
        source = texts.offsets[which][each] + column
        is_text = column < size[each]
        source = np.where(is_text, source, 0)
        fill = column - size[each]
        if padding.first is not None:
            last = texts.ids[texts.offsets[which] + size - 1] != padding.first
            fill = fill - last[each]
        ids = np.array(padding.ids or (0,), np.int32)[np.maximum(fill, 0) % (len(padding.ids) or 1)]
        ids = np.where(fill < 0, padding.first or 0, ids)
        tokens.ravel()[place] = np.where(is_text, texts.ids[source], ids)
        learned.ravel()[place] = np.where(is_text, texts.learned[source], True)
        example.ravel()[place] = which[each]
        return tokens, learned, example

    def place(
        self,
        index: np.ndarray,
        visit: np.ndarray,
        sharding: jax.sharding.Sharding,
        draw: Sequence[int] = (0,),
    ) -> Batch:
        """The rows at `index` [A, B], seen `visit` times before, on a mesh: a Batch [A, B, T].

        A process makes only the rows of its own devices.
        """
        which, end, width = self.spans(index.ravel(), draw)
        which, end = (x.reshape(*index.shape, -1) for x in (which, end))

        @functools.cache
        def part(rows: tuple[tuple[int | None, int | None], ...]) -> tuple[np.ndarray, ...]:
            a, b = (slice(*bounds) for bounds in rows)
            shape = which[a, b].shape
            found = self.canvases(
                which[a, b].reshape(-1, shape[2]), end[a, b].reshape(-1, shape[2]), width
            )
            return tuple(x.reshape(*shape[:2], width) for x in found)

        def one(k: int) -> jax.Array:
            def read(where: Any) -> np.ndarray:
                return part(tuple((s.start, s.stop) for s in where[:2]))[k]

            return jax.make_array_from_callback((*index.shape, width), sharding, read)

        seen = visit.astype(np.int32)
        seen = jax.make_array_from_callback(index.shape, sharding, lambda where: seen[where])
        return Batch(one(0), one(1), one(2), seen, packed=self.layout.packing)


def whole(columns: Any, block: int) -> Any:
    """The next multiple of a block's columns."""
    return -(-columns // block) * block


def padded_sizes(texts: Texts, layout: Layout) -> np.ndarray:
    """int64 [n]: columns that a packed example takes, its padding included."""
    size = texts.sizes
    if layout.padding.ids:
        if layout.response_length is not None:
            size = texts.answers + layout.response_length
        size = whole(size, layout.block)
    return np.minimum(size, layout.length)


def make_rows(texts: Texts, layout: Layout, counts: Sequence[int]) -> Rows:
    """The rows of sources with so many examples each: one example per row, or packed."""
    if not layout.packing:
        whole = np.arange(len(texts.answers) + 1)
        return Rows(texts, layout, whole[:-1], whole, tuple(counts))
    sizes, first = padded_sizes(texts, layout), 0
    rows: list[list[int]] = []
    numbers = []
    for count in counts:
        found = pack(sizes[first : first + count], layout.length)
        rows += [[first + i for i in row] for row in found]
        numbers.append(len(found))
        first += count
    bounds = np.cumsum([0, *map(len, rows)])
    documents = np.array([i for row in rows for i in row], np.int64)
    return Rows(texts, layout, documents, bounds, tuple(numbers))


def pack(sizes: np.ndarray, length: int) -> list[list[int]]:
    """Puts examples of these sizes into rows of `length` columns, each into the fullest that fits.

    A row is closed when OPEN others are open and it has the least room.
    """
    done: list[list[int]] = []
    room: list[tuple[int, list[int]]] = []
    for i, size in enumerate(map(int, sizes)):
        fitting = [k for k, (left, _) in enumerate(room) if left >= size]
        if fitting:
            best = min(fitting, key=lambda k: room[k][0])
            left, row = room[best]
            row.append(i)
            room[best] = (left - size, row)
        else:
            room.append((length - size, [i]))
        if len(room) > OPEN:
            done.append(room.pop(min(range(len(room)), key=lambda k: room[k][0]))[1])
    return done + [row for _, row in room]


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """Which rows a step takes: a pure function of the step, so that a resumed run goes on alike.

    An epoch takes from each source its share, going on in it where the last epoch stopped; without
    shares that is every row once. Rows that do not fill the last batch of an epoch are left out of
    it.
    """

    sizes: tuple[int, ...]
    """Rows of every source."""
    batch: int
    seed: int
    shares: tuple[float, ...] | None = None
    lengths: np.ndarray | None = None
    """Columns of every row, where batches are grouped by length."""

    @functools.cached_property
    def taken(self) -> tuple[int, ...]:
        """Rows that an epoch takes from every source: at least a batch in all.

        With shares as many as it can without taking a row of any source twice.
        """
        sizes = self.sizes
        if self.shares is None:
            parts = [float(n) for n in sizes]
        else:
            scale = min(n / s for n, s in zip(sizes, self.shares, strict=True))
            parts = [s * scale for s in self.shares]
        factor = max(1.0, self.batch / max(sum(parts), 1))
        taken = [max(round(part * factor), 1) for part in parts]
        short = self.batch - sum(taken)  # by rounding
        return (*taken[:-1], taken[-1] + max(short, 0))

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return sum(self.taken) // self.batch

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of batch `step`, and how often each was taken before."""
        number, place = divmod(step, self.steps)
        rows, visits = epoch(self, number)
        part = slice(place * self.batch, (place + 1) * self.batch)
        return rows[part], visits[part]


@functools.lru_cache(maxsize=2)
def epoch(order: Order, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of an epoch in order, and how often each was taken before."""
    rows, visits, first = [], [], 0
    for source, (size, taken) in enumerate(zip(order.sizes, order.taken, strict=True)):
        place = np.arange(number * taken, (number + 1) * taken)
        visit = place // size
        for again in np.unique(visit):
            mixed = np.random.default_rng((order.seed, again, source)).permutation(size)
            rows.append(first + mixed[place[visit == again] % size])
        visits.append(visit)
        first += size
    row, visit = np.concatenate(rows), np.concatenate(visits)
    rng = np.random.default_rng((order.seed, number, len(order.sizes)))
    mixed = rng.permutation(len(row)) if len(order.sizes) > 1 else np.arange(len(row))
    mixed = mixed[: order.steps * order.batch]
    if order.lengths is not None:
        group = np.arange(len(mixed)) // (order.batch * GROUPED)
        mixed = mixed[np.lexsort((order.lengths[row[mixed]], group))]
        mixed = mixed.reshape(-1, order.batch)[rng.permutation(order.steps)].ravel()
    return row[mixed], visit[mixed]
