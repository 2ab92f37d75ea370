"""Weights as int8 with one float32 scale per output channel: half of bfloat16's bytes.

The product is computed with the whole numbers, which bfloat16 holds exactly, and scaled after it.
Only linear maps of the layers are quantised: neither embedding, head and norms nor the router.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdllm.model.linear import linear_of

LARGEST = 127
KEPT = ("router",)  # its choices are discrete: rounding would send tokens to other experts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A weight that is values * scale."""

    values: jax.Array
    """int8, with the axes of the weight."""
    scale: jax.Array
    """float32; the same axes, of size 1 where a product sums over them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.values.shape

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """The weight as an array."""
        return (self.values * self.scale).astype(dtype)


@partial(jax.jit, static_argnames=("inputs",))
def quantise(weight: jax.Array, inputs: tuple[int, ...]) -> Quantised:
    """The nearest values; `inputs` are the axes over which products sum."""
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=inputs, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / LARGEST)
    return Quantised(jnp.round(weight / scale).astype(jnp.int8), scale)


def product(
    multiply: Callable[..., jax.Array], spec: str, x: jax.Array, weight: Quantised, **options: Any
) -> jax.Array:
    """The product with a quantised weight; `multiply` makes one with an array."""
    operands, out = spec.split("->")
    letters = operands.split(",")[1]
    kept = "".join(letter for letter in letters if letter in out)
    summed = tuple(i for i, letter in enumerate(letters) if letter not in out)
    found = multiply(spec, x, weight.values, **options)
    scale = jnp.squeeze(weight.scale, summed).astype(found.dtype)
    return jnp.einsum(f"{out},{kept}->{out}", found, scale)


def quantise_params(params: nnx.State) -> nnx.State:
    """The parameters with their linear maps as int8; the others stay as they are."""

    def one(leaf: nnx.Variable) -> nnx.Variable:
        name = leaf.get_metadata("name")
        linear = linear_of(name)
        if linear is None or linear.parts == KEPT:
            return leaf
        return leaf.replace(quantise(leaf.get_value(), linear.axes(linear.inputs)))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
