"""Conversion tables as data: which Hugging Face tensors make which of our parameters, and back.

A row names our parameter, its source tensors and a rule such as "(HK)D->DHK", whose letters are
the sizes of the model; C on the right side, as in "(HK)D->DCHK", is the axis along which several
sources are stacked. Because a rule is data it is applied, checked and undone by the same few
lines, whatever the family.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from jdllm.checkpoint import Index, LazyArray, unit_of
from jdllm.configs import ModelConfig
from jdllm.convert.shards import Shards

ANY = object()  # a key whose value cannot matter
STACK = "C"  # the axis of a parameter along which its sources are stacked


class ConversionError(ValueError):
    """A checkpoint that cannot be converted, in one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters and where it comes from."""

    name: str
    sources: tuple[str, ...]
    rule: str

    def __post_init__(self):
        if len(self.sources) > 1 and stack_axis(self.rule) is None:
            raise ValueError(f"{self.name}: the rule {self.rule} says not where to stack sources")


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that conversion knows about one family."""

    architecture: str
    """The name in the `architectures` key of config.json."""
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
    """The size of every letter that rules may use."""
    return {
        "D": config.embed,
        "H": config.heads,
        "G": config.kv_heads,
        "K": config.head_dim,
        "F": config.mlp,
        "V": config.vocab,
    }


def _letters(rule: str) -> tuple[str, str]:
    """The axes of one source, and of its part in our parameter."""
    left, right = rule.split("->")
    return left.replace("(", "").replace(")", ""), right.replace(STACK, "")


def stack_axis(rule: str) -> int | None:
    """The axis of our parameter along which its sources are stacked; None where it has but one."""
    right = rule.split("->")[1]
    return right.index(STACK) if STACK in right else None


def source_shape(rule: str, size: dict[str, int]) -> tuple[int, ...]:
    """The shape that a source tensor must have: "(HK)D" is (H*K, D)."""
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


def apply(rule: str, array: np.ndarray, size: dict[str, int]) -> np.ndarray:
    """A source tensor in our layout, before it is stacked (a view)."""
    left, right = _letters(rule)
    return array.reshape([size[x] for x in left]).transpose([left.index(x) for x in right])


def undo(rule: str, array: np.ndarray, size: dict[str, int]) -> np.ndarray:
    """The inverse of `apply`, bit for bit."""
    left, right = _letters(rule)
    return array.transpose([right.index(x) for x in left]).reshape(source_shape(rule, size))


def check(family: Family, config: ModelConfig, shards: Shards) -> None:
    """Compares names and shapes with the table before any weight is read; ConversionError."""
    rows, size = family.rows(config), sizes(config)
    expected = {source: source_shape(row.rule, size) for row in rows for source in row.sources}
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


def stream(
    family: Family, config: ModelConfig, shards: Shards
) -> Iterator[tuple[str, dict[str, LazyArray]]]:
    """Yields our parameters in the config's dtype as (unit, {name: array}), nothing read yet."""
    size, dtype = sizes(config), np.dtype(config.dtype)
    grouped: dict[str, dict[str, LazyArray]] = {}
    for row in family.rows(config):
        stacked = size | {STACK: len(row.sources)}
        shape = tuple(stacked[letter] for letter in row.rule.split("->")[1])
        read = partial(_read, row, shards, size, dtype)
        grouped.setdefault(unit_of(row.name), {})[row.name] = LazyArray(shape, dtype, read)
    yield from grouped.items()


def _read(
    row: Row, shards: Shards, size: dict[str, int], dtype: np.dtype, index: Index
) -> np.ndarray:
    """One piece of a parameter; one source is mapped at a time."""
    axis = stack_axis(row.rule)
    if axis is None:
        whole = apply(row.rule, shards.map(row.sources[0]), size)
        return np.array(whole[index], dtype, order="C")
    parts = []
    for source in row.sources[index[axis]]:
        whole = apply(row.rule, shards.map(source), size)
        parts.append(np.array(whole[index[:axis] + index[axis + 1 :]], dtype))
    return np.stack(parts, axis)


def restore_sources(
    family: Family, config: ModelConfig, arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Hugging Face tensors, by name, of the parameters in `arrays`: the inverse of `stream`."""
    size = sizes(config)
    tensors: dict[str, np.ndarray] = {}
    for row in family.rows(config):
        if row.name not in arrays:
            continue
        axis = stack_axis(row.rule)
        parts = np.expand_dims(arrays[row.name], 0)
        if axis is not None:
            parts = np.moveaxis(arrays[row.name], axis, 0)
        for source, part in zip(row.sources, parts, strict=True):
            tensors[source] = np.ascontiguousarray(undo(row.rule, part, size))
    return tensors
