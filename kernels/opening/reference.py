"""The products that open attention, and what they are for: queries, and the cache's new columns."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.kernels.rotary import reference
from jdllm.kernels.rotary.reference import Facts, Target

Turn = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class Projection(NamedTuple):
    """A linear map of the inputs to heads."""

    weight: jax.Array
    """[D, 3, H, K] of queries, keys and values; or [D, H, K] of queries and [D, 2, G, K]."""
    bias: jax.Array | None
    """Without D; None where there is none."""


def project(
    x_BTD: jax.Array,
    projections: tuple[Projection, ...],
    norms: tuple[jax.Array, ...],
    positions_BT: jax.Array,
    target: Target,
    facts: Facts,
    turn: Turn = reference.turn,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, K] and the cache with new keys and values, of normed inputs.

    `turn` does what follows the products where they stand alone.
    """

    def mapped(one: Projection) -> jax.Array:
        found = jnp.einsum("BTD,D...->BT...", x_BTD, one.weight.astype(x_BTD.dtype))
        return found if one.bias is None else found + one.bias.astype(found.dtype)

    return turn(tuple(map(mapped, projections)), norms, positions_BT, target, facts)
