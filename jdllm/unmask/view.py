"""The input of a rule, and small array functions that several rules share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdllm.model.head import Best

Draw = Callable[[tuple[int, ...]], jax.Array]
"""Uniform draws in [0, 1) for every row: draw((N,)) is [B, N], draw((N, V)) is [B, N, V]."""

LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Verify:
    """A second model that verifies drafts, as a rule uses it."""

    vocab: int
    logits: Callable[[jax.Array, Any], tuple[jax.Array, Any]]
    """Takes drafts [B, N] and a cache; returns logits [B, N, V] of these columns and the cache."""


@dataclasses.dataclass(frozen=True)
class View:
    """The N columns per row that a rule may change, usually a block."""

    ids_BN: jax.Array
    """The tokens of these columns."""
    open_BN: jax.Array
    """Positions that may be unmasked."""
    settled_BN: jax.Array
    """Generated positions that hold a token; rules that edit may replace it."""
    quota_B: jax.Array
    """How many tokens the schedule asks for in this step."""
    share_B: jax.Array
    """The share of the remaining masks that the schedule asks for in this step."""
    floor_B: jax.Array
    """The least threshold, whatever the rule's own is."""
    draw: Draw
    full: bool = False
    """Whether this call is a full pass that opens a block and renews its cache."""
    verify: Verify | None = None
    """The verifier model, where the request has one."""
    best: Best | None = None
    """Best tokens, for a rule that needs no more of the logits (`Rule.special`)."""
    logits: jax.Array | None = None
    """Logits [B, N, V] that predict these columns (shifted models included), for other rules."""

    @property
    def logits_BNV(self) -> jax.Array:
        """Returns the logits, for a rule that reads them."""
        assert self.logits is not None
        return self.logits


def without(logits_BNV: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Returns the logits with those of `ids` set to -inf."""
    if not ids:
        return logits_BNV
    banned_V = jnp.isin(jnp.arange(logits_BNV.shape[-1]), jnp.array(ids))
    return jnp.where(banned_V, -jnp.inf, logits_BNV)


def rank(score_BN: jax.Array, masked_BN: jax.Array) -> jax.Array:
    """Returns each position's rank in its row, int [B, N]: 0 is the best, non-candidates are last.

    The lowest index wins ties. A candidate with confidence -inf or NaN still ranks before every
    non-candidate, so that decoding makes progress with any weights.
    """
    known = jnp.clip(jnp.nan_to_num(score_BN, nan=LOWEST), LOWEST, -LOWEST)
    order_BN = jnp.argsort(jnp.where(masked_BN, known, -jnp.inf), descending=True, stable=True)
    return jnp.argsort(order_BN, axis=-1)


def gumbel(u: jax.Array) -> jax.Array:
    """Returns Gumbel noise from uniform draws in (0, 1)."""
    return -jnp.log(-jnp.log(u))
