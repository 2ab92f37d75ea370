"""Conversion tables as data: they map Hugging Face tensors to our parameters, and back.

A row names our parameter, its source tensors and a rule such as "(HK)D->DHK", whose letters are
the sizes of the model. A letter only on the right side is an axis along which several sources are
stacked: "FD->DCF" for gate and up, "MD->EDCM" for those of every expert. Because a rule is data it
is applied, checked and undone by the same few lines, whatever the family.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import numpy as np

from jdllm.convert.shards import Shards
from jdllm.model.config import ModelConfig
from jdllm.store.checkpoint import Index, LazyArray, unit_of

ANY = object()  # a key whose value cannot matter
# What any config.json may say, and no forward pass reads. (Dropout acts in training only, and ours
# has none.)
BOOKKEEPING: dict[str, Any] = dict.fromkeys(
    [
        "_name_or_path",
        "architectures",
        "_attn_implementation_autoset",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ],
    ANY,
)


class ConversionError(ValueError):
    """A checkpoint that cannot be converted, in one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters and where it comes from."""

    name: str
    sources: tuple[str, ...]
    """In row-major order of the stacking axes."""
    rule: str
    spans: tuple[tuple[int, int], ...] = ()
    """First and last + 1 leading row of each source that is ours; empty where all of them are."""
    dtype: str | None = None
    """What our parameter is kept in, where that is not the config's dtype."""
    stored: str | None = None
    """What its sources are exported in, where that is not ours."""
    instead: tuple["Row", ...] = ()
    """Other forms in which files may hold the same parameter. Only reading knows them."""

    def __post_init__(self):
        if len(self.sources) > 1 and not _stacking(self.rule):
            raise ValueError(f"{self.name}: the rule {self.rule} says not where to stack sources")

    def held(self, names: Collection[str]) -> "Row":
        """Returns this row, or the one of `instead` that has a source in `names`."""
        forms = (self, *self.instead)
        return next((row for row in forms if any(s in names for s in row.sources)), self)


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that conversion knows about one family."""

    architectures: tuple[str, ...]
    """Names in the `architectures` key of config.json; the first is written on export."""
    source: str
    """The Hugging Face id that is converted by default."""
    facts: Callable[[dict[str, Any], dict[str, int]], ModelConfig]
    """(config.json, special tokens by text) -> ModelConfig."""
    rows: Callable[[ModelConfig], list[Row]]
    used: frozenset[str]
    """Keys of config.json that `facts` reads."""
    inert: dict[str, Any]
    """Keys that change nothing, with the values for which that is true (ANY: all)."""
    hf_config: Callable[[ModelConfig], dict[str, Any]]
    """The inverse of `facts`, for exporting."""


def sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the size of every letter in rules, except C, which counts sources; P is a pair."""
    size = {
        "D": config.embed,
        "H": config.heads,
        "G": config.kv_heads,
        "K": config.head_dim,
        "F": config.mlp,
        "V": config.vocab,
        "P": 2,
    }
    if config.moe:
        size |= {"E": config.moe.experts, "M": config.moe.expert_mlp, "U": config.moe.shared_mlp}
    return size


def _letters(rule: str) -> tuple[str, str]:
    """Returns the letters of one source, theirs and ours, without the stacking axes."""
    left, right = rule.split("->")
    left = left.replace("(", "").replace(")", "")
    return left, "".join(x for x in right if x in left)


def _stacking(rule: str) -> list[int]:
    """Returns our axes along which sources are stacked."""
    left, right = rule.split("->")
    return [axis for axis, letter in enumerate(right) if letter not in left]


def shape_of(row: Row, size: dict[str, int]) -> tuple[int, ...]:
    """Returns the shape of our parameter; C is what the number of sources leaves for it."""
    right = row.rule.split("->")[1]
    others = math.prod(size[right[axis]] for axis in _stacking(row.rule) if right[axis] != "C")
    return tuple(({"C": len(row.sources) // others} | size)[letter] for letter in right)


def source_shape(rule: str, size: dict[str, int]) -> tuple[int, ...]:
    """Returns the shape that a source tensor must have: "(HK)D" is (H*K, D)."""
    shape, inside = [], False
    left = rule.split("->")[0]
    for letter in left:
        if letter == "(":
            shape.append(1)
        if letter in "()":
            inside = letter == "("
        elif inside:
            shape[-1] *= size[letter]
        else:
            shape.append(size[letter])
    return tuple(shape)


def source_shapes(rows: list[Row], size: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every source tensor; one with spans reaches to its last span."""
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        shape = source_shape(row.rule, size)
        for i, source in enumerate(row.sources):
            end = row.spans[i][1] if row.spans else shape[0]
            shapes[source] = (max(end, shapes.get(source, (0,))[0]), *shape[1:])
    return shapes


def apply(rule: str, array: np.ndarray, size: dict[str, int]) -> np.ndarray:
    """Returns a source tensor in our layout, stacking axes apart (a view)."""
    left, right = _letters(rule)
    return array.reshape([size[x] for x in left]).transpose([left.index(x) for x in right])


def undo(rule: str, array: np.ndarray, size: dict[str, int]) -> np.ndarray:
    """Returns the inverse of `apply`, bit for bit."""
    left, right = _letters(rule)
    return array.transpose([right.index(x) for x in left]).reshape(source_shape(rule, size))


def rows_held(family: Family, config: ModelConfig, shards: Shards) -> list[Row]:
    """Returns the family's table, each row in the form in which `shards` holds its sources."""
    return [row.held(shards.shapes) for row in family.rows(config)]


def check(family: Family, config: ModelConfig, shards: Shards) -> None:
    """Raises ConversionError where names or shapes of tensors differ from the table."""
    rows, size = rows_held(family, config, shards), sizes(config)
    expected = source_shapes(rows, size)
    if missing := sorted(set(expected) - set(shards.shapes)):
        raise ConversionError(f"{shards.folder} lacks {_some(missing)}, which the model needs")
    if extra := sorted(set(shards.shapes) - set(expected)):
        raise ConversionError(
            f"{shards.folder} holds {_some(extra)}, which no parameter of the model takes"
        )
    for name, shape in expected.items():
        if shards.shapes[name] != shape:
            raise ConversionError(
                f"{name} has shape {shards.shapes[name]}, but config.json asks for {shape}"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor(s): {', '.join(names[:3])}{more}"


def kept(family: Family, config: ModelConfig, shards: Shards) -> set[str]:
    """Returns source tensors whose parameters have a dtype of their own."""
    rows = rows_held(family, config, shards)
    return {source for row in rows if row.dtype for source in row.sources}


def stream(
    family: Family, config: ModelConfig, shards: Shards
) -> Iterator[tuple[str, dict[str, LazyArray]]]:
    """Yields our parameters in the config's dtype as (unit, {name: array}), nothing read yet."""
    size = sizes(config)
    grouped: dict[str, dict[str, LazyArray]] = {}
    for row in rows_held(family, config, shards):
        shape, dtype = shape_of(row, size), np.dtype(row.dtype or config.dtype)
        read = partial(_read, row, shards, size, dtype)
        grouped.setdefault(unit_of(row.name), {})[row.name] = LazyArray(shape, dtype, read)
    yield from grouped.items()


def _read(
    row: Row, shards: Shards, size: dict[str, int], dtype: np.dtype, index: Index
) -> np.ndarray:
    """Returns one piece of a parameter; one source is mapped at a time."""
    shape, axes = shape_of(row, size), _stacking(row.rule)
    within = tuple(part for axis, part in enumerate(index) if axis not in axes)
    ranges = [range(n)[part] for n, part in zip(shape, index, strict=True)]
    piece = np.empty([len(r) for r in ranges], dtype)
    for at in np.ndindex(*(len(ranges[axis]) for axis in axes)):
        place: list[int | slice] = [slice(None)] * len(shape)
        number = 0
        for axis, i in zip(axes, at, strict=True):
            place[axis] = i
            number = number * shape[axis] + ranges[axis][i]
        tensor = shards.map(row.sources[number])
        if row.spans:
            tensor = tensor[slice(*row.spans[number])]
        piece[tuple(place)] = apply(row.rule, tensor, size)[within]
    return piece


def restore_sources(
    family: Family, config: ModelConfig, arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the Hugging Face tensors of the parameters in `arrays`: the inverse of `stream`.

    A tensor that is cut into spans must have all of them in `arrays`.
    """
    size = sizes(config)
    rows = [row for row in family.rows(config) if row.name in arrays]
    shapes, tensors = source_shapes(rows, size), dict[str, np.ndarray]()
    for row in rows:
        array, axes = arrays[row.name], _stacking(row.rule)
        apart = np.moveaxis(array, axes, range(len(axes)))
        for i, at in enumerate(np.ndindex(apart.shape[: len(axes)])):
            source, part = row.sources[i], undo(row.rule, apart[at], size)
            part = part.astype(row.stored or array.dtype, copy=False)
            if not row.spans:
                tensors[source] = np.ascontiguousarray(part)
                continue
            whole = tensors.setdefault(source, np.empty(shapes[source], part.dtype))
            whole[slice(*row.spans[i])] = part
    return tensors
