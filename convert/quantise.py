"""Weights in 8 bits as they are converted, a piece at a time, and back to plain ones.

A weight is read twice: once for the scales, whose channels are few, and once for the values.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from jdllm.kernels.quantised import KINDS, Kind, order
from jdllm.model.config import ModelConfig
from jdllm.model.linear import Linear
from jdllm.model.model import PARTS
from jdllm.model.quantise import quantised_linear
from jdllm.store.checkpoint import PIECE_BYTES, Index, LazyArray, pieces

type Units = Iterable[tuple[str, dict[str, LazyArray]]]

WIDTH = 4  # bytes of float32, in which scales are found and values rounded


def quantised(units: Units, kind: str) -> Iterator[tuple[str, dict[str, LazyArray]]]:
    """The units with values and scales in place of the weights that are held in 8 bits."""
    for unit, arrays in units:
        found: dict[str, LazyArray] = {}
        for name, lazy in arrays.items():
            linear = quantised_linear(name)
            found |= {name: lazy} if linear is None else _parts(name, lazy, linear, KINDS[kind])
        yield unit, found


def _parts(name: str, lazy: LazyArray, linear: Linear, kind: Kind) -> dict[str, LazyArray]:
    """The two arrays of a weight, by dotted name."""
    inputs = linear.axes(linear.inputs)
    places = order(len(lazy.shape), inputs)
    shape = tuple(lazy.shape[axis] for axis in places)
    kept = len(shape) - len(inputs)

    def turned(index: Index) -> np.ndarray:
        """A piece of the weight in float32, its inputs at the end."""
        own = dict(zip(places, index, strict=True))
        piece = lazy.read(tuple(own[axis] for axis in range(len(shape))))
        return piece.astype(np.float32).transpose(places)

    @functools.cache  # a weight is written in pieces, one after the other
    def scale() -> np.ndarray:
        found = np.empty(shape[:kept], np.float32)
        limit = max(PIECE_BYTES // WIDTH, math.prod(shape[kept:]))
        for index in pieces(shape, (*[1] * kept, *shape[kept:]), limit):
            top = np.abs(turned(index)).max(axis=tuple(range(kept, len(shape))))
            found[index[:kept]] = np.where(top == 0, 1, top * np.float32(1 / kind.largest))
        return found

    def values(index: Index) -> np.ndarray:
        own = scale()[index[:kept]]
        piece = turned(index) / own.reshape(*own.shape, *[1] * len(inputs))
        if np.issubdtype(kind.dtype, np.integer):
            piece = np.round(piece)
        return np.ascontiguousarray(piece.astype(kind.dtype))

    def scales(index: Index) -> np.ndarray:
        return np.ascontiguousarray(scale()[index])

    return {
        f"{name}.{PARTS[0]}": LazyArray(shape, np.dtype(kind.dtype), values),
        f"{name}.{PARTS[1]}": LazyArray(shape[:kept], np.dtype(np.float32), scales),
    }


def widened(units: Units, config: ModelConfig) -> Iterator[tuple[str, dict[str, LazyArray]]]:
    """The units with one weight, in the config's dtype, in place of values and scale."""
    for unit, arrays in units:
        found: dict[str, LazyArray] = {}
        for name, lazy in arrays.items():
            weight, _, part = name.rpartition(".")
            linear = quantised_linear(weight)
            if linear is None:
                found[name] = lazy
            elif part == PARTS[0]:
                scale = arrays[f"{weight}.{PARTS[1]}"]
                found[weight] = _weight(lazy, scale, linear, np.dtype(config.dtype))
        yield unit, found


def _weight(values: LazyArray, scale: LazyArray, linear: Linear, dtype: np.dtype) -> LazyArray:
    inputs = linear.axes(linear.inputs)
    places = order(len(values.shape), inputs)
    sizes = dict(zip(places, values.shape, strict=True))

    def read(index: Index) -> np.ndarray:
        own = tuple(index[axis] for axis in places)
        factor = scale.read(own[: len(scale.shape)])
        piece = values.read(own).astype(np.float32)
        piece *= factor.reshape(*factor.shape, *[1] * len(inputs))
        return np.ascontiguousarray(piece.transpose(np.argsort(places)).astype(dtype))

    return dataclasses.replace(
        values, shape=tuple(sizes[axis] for axis in range(len(sizes))), dtype=dtype, read=read
    )
