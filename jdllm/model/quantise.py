"""Weights as int8 with one float32 scale per output channel: half of bfloat16's bytes.

The product is computed with the whole numbers, which bfloat16 holds exactly, and scaled after it.
Only linear maps of the layers are quantised: neither embedding, head and norms nor the router.
"""

import dataclasses
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


def product(spec: str, x: jax.Array, weight: Quantised, **options: Any) -> jax.Array:
    """The product with a quantised weight, in the dtype of `x`.

    A backward pass keeps the whole numbers of it, neither `x` nor the weight in another dtype.
    """
    return _product(spec, tuple(options.items()), x, weight.values, weight.scale)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    spec: str, options: tuple[Any, ...], x: jax.Array, values: jax.Array, scale: jax.Array
) -> jax.Array:
    letters, out = spec.split("->")[0].split(",")[1], spec.split("->")[1]
    # Tied to x, so that no loop of XLA's widens all weights beforehand.
    x, values = jax.lax.optimization_barrier((x, values))
    found = jnp.einsum(spec, x, values.astype(x.dtype), **dict(options))
    return _scaled(found, scale, letters, out)


def _scaled(found: jax.Array, scale: jax.Array, letters: str, out: str) -> jax.Array:
    """`found` [out] times the scale of its output channels."""
    summed = tuple(i for i, letter in enumerate(letters) if letter not in out)
    kept = "".join(letter for letter in letters if letter in out)
    factor = jnp.squeeze(scale, summed).astype(found.dtype)
    return jnp.einsum(f"{out},{kept}->{out}", found, factor)


def _forward(
    spec: str, options: tuple[Any, ...], x: jax.Array, values: jax.Array, scale: jax.Array
) -> tuple[jax.Array, Any]:
    return _product(spec, options, x, values, scale), (values, scale)


def _backward(spec: str, options: tuple[Any, ...], kept: Any, change: jax.Array) -> Any:
    (values, scale), (operands, out) = kept, spec.split("->")
    before, letters = operands.split(",")
    change = _scaled(change, scale, letters, out)
    change, values = jax.lax.optimization_barrier((change, values))
    precision = dict(options).get("precision")
    wide = values.astype(change.dtype)
    return jnp.einsum(f"{out},{letters}->{before}", change, wide, precision=precision), None, None


_product.defvjp(_forward, _backward)


def quantise_params(params: nnx.State) -> nnx.State:
    """The parameters with their linear maps as int8; the others stay as they are."""

    def one(leaf: nnx.Variable) -> nnx.Variable:
        name = leaf.get_metadata("name")
        linear = linear_of(name)
        if linear is None or linear.parts == KEPT:
            return leaf
        return leaf.replace(quantise(leaf.get_value(), linear.axes(linear.inputs)))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
