"""How a weight is made: an array with the names of its axes, which sharding.RULES places."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


def weight(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], dtype: str, fan_in: int
) -> nnx.Param:
    """A weight with its logical axes; truncated normal of variance 1/fan_in, ones for fan_in 0."""
    if fan_in == 0:
        return nnx.Param(jnp.ones(shape, dtype), axes=tuple(axes))
    init = jax.random.truncated_normal(rngs.params(), -3, 3, tuple(shape), jnp.float32)
    return nnx.Param((init / math.sqrt(fan_in)).astype(dtype), axes=tuple(axes))


def bias(shape: Sequence[int], axes: Sequence[str], dtype: str) -> nnx.Param:
    """A bias with its logical axes; it starts at zero."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=tuple(axes))
