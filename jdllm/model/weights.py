"""How a weight is made: an array with the names of its axes, which sharding.RULES places."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def initial(key: jax.Array, shape: Sequence[int], dtype: str, fan_in: int | None) -> jax.Array:
    """First values: truncated normal of variance 1/fan_in, ones for fan_in 0, zeros for None."""
    if not fan_in:
        return jnp.zeros(shape, dtype) if fan_in is None else jnp.ones(shape, dtype)
    normal = jax.random.truncated_normal(key, -3, 3, tuple(shape), jnp.float32)
    return (normal / math.sqrt(fan_in)).astype(dtype)


def weight(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], dtype: str, fan_in: int
) -> nnx.Param:
    """A weight with its logical axes, and with what `initial` makes of it."""
    value = initial(rngs.params(), shape, dtype, fan_in)
    return nnx.Param(value, axes=tuple(axes), fan_in=fan_in)


def bias(shape: Sequence[int], axes: Sequence[str], dtype: str) -> nnx.Param:
    """A bias with its logical axes; it starts at zero."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=tuple(axes), fan_in=None)
