"""The products that open attention, and what they are for: queries, and the cache's new columns."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jdllm.kernels.product import reference as plain
from jdllm.kernels.product.reference import Times
from jdllm.kernels.quantised import Quantised
from jdllm.kernels.rotary import reference
from jdllm.kernels.rotary.reference import Facts, Target

Turn = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class Projection(NamedTuple):
    """A linear map of the inputs to heads."""

    weight: jax.Array | Quantised
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
    times: Times = plain.times,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, K] and the cache with new keys and values, of normed inputs.

    `times` makes the products, and `turn` does what follows them.
    """

    def mapped(one: Projection) -> jax.Array:
        found = times(x_BTD, one.weight)
        return found if one.bias is None else found + one.bias.astype(found.dtype)

    return turn(tuple(map(mapped, projections)), norms, positions_BT, target, facts)
