"""Weights in 8 bits with a float32 scale per output channel: half of bfloat16's bytes.

int8 rounds to whole numbers, fp8 to floating-point ones of 4 bits of exponent and 3 of mantissa
(e4m3). bfloat16 holds either exactly, so that a product is made with the values and scaled after.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Kind(NamedTuple):
    """A way to hold 8 bits."""

    dtype: Any
    largest: float
    """What the largest weight of a channel becomes."""


KINDS: dict[str, Kind] = {
    "int8": Kind(jnp.int8, 127.0),
    "fp8": Kind(jnp.float8_e4m3fn, 448.0),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A weight that is values * scale."""

    values: jax.Array
    """Of a dtype of KINDS: the axes of the weight, those of `inputs` moved to the end."""
    scale: jax.Array
    """float32: the same axes without those of `inputs`."""
    inputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """The axes of the weight over which products sum."""

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the weight as they stand in `values`."""
        return order(self.values.ndim, self.inputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        sizes = dict(zip(self.order, self.values.shape, strict=True))
        return tuple(sizes[axis] for axis in range(len(sizes)))

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.values.size

    @property
    def dtype(self) -> Any:
        """That of the values."""
        return self.values.dtype

    def matrix(self) -> "Quantised":
        """The same [inputs, outputs], which must be the order of its axes."""
        values = self.values.reshape(self.scale.size, -1)
        return Quantised(values, self.scale.reshape(-1), (0,))

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The weight as an array."""
        scale = self.scale.reshape(*self.scale.shape, *[1] * len(self.inputs))
        found = (self.values.astype(jnp.float32) * scale).astype(dtype)
        return jnp.transpose(found, np.argsort(self.order).tolist())

    def placed(self, axes: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What `axes` says of the weight's axes, for those of values and of scale."""
        own = tuple(axes[axis] for axis in self.order)
        return own, own[: self.scale.ndim]


def order(axes: int, inputs: Sequence[int]) -> tuple[int, ...]:
    """Numbers of axes, those of `inputs` moved to the end."""
    return (*(axis for axis in range(axes) if axis not in inputs), *inputs)


@partial(jax.jit, static_argnames=("inputs", "kind"))
def quantise(weight: jax.Array, inputs: tuple[int, ...], kind: str = "int8") -> Quantised:
    """The nearest values; `inputs` are the axes over which products sum."""
    weight = jnp.transpose(weight, order(weight.ndim, inputs)).astype(jnp.float32)
    summed = tuple(range(weight.ndim - len(inputs), weight.ndim))
    dtype, largest = KINDS[kind]
    top = jnp.max(jnp.abs(weight), axis=summed, keepdims=True)
    scale = jnp.where(top == 0, 1.0, top * np.float32(1 / largest))
    values = weight / scale
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return Quantised(values.astype(dtype), jnp.squeeze(scale, summed), inputs)


def matrix(weight: jax.Array | Quantised, width: int) -> jax.Array | Quantised:
    """A weight of either form as [width, outputs]; the first axes are its inputs."""
    return weight.matrix() if isinstance(weight, Quantised) else weight.reshape(width, -1)


def cast(weight: jax.Array | Quantised, dtype: Any) -> jax.Array | Quantised:
    """An array in `dtype`; one in 8 bits as it is."""
    return weight if isinstance(weight, Quantised) else weight.astype(dtype)


def taken_apart(weight: jax.Array | Quantised) -> tuple[jax.Array, jax.Array]:
    """What a kernel is handed of a weight: its numbers, and a scale, which it reads of one in 8
    bits alone."""
    return (weight.values, weight.scale) if isinstance(weight, Quantised) else (weight, weight)


def wide(weight: jax.Array | Quantised, dtype: Any) -> jax.Array:
    """A weight of either form as an array of `dtype`."""
    return weight.dense(dtype) if isinstance(weight, Quantised) else weight.astype(dtype)
