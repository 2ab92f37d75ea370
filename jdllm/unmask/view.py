"""What a rule is given, and small array helpers that several rules share."""

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
    """A second model, as a rule sees it."""

    vocab: int
    logits: Callable[[jax.Array, Any], tuple[jax.Array, Any]]
    """Drafts [B, N] and its cache -> its logits [B, N, V] of these columns, and the cache."""


@dataclasses.dataclass(frozen=True)
class View:
    """The columns in view, by row: N of them, usually a block."""

    ids_BN: jax.Array
    """The canvas there."""
    open_BN: jax.Array
    """Positions that may be unmasked."""
    settled_BN: jax.Array
    """Generated positions that hold a token; rules that edit may replace it."""
    quota_B: jax.Array
    """How many tokens the schedule wants in this step."""
    share_B: jax.Array
    """The part of the remaining masks that the schedule reveals in this step."""
    floor_B: jax.Array
    """A bar that confidence must pass whatever the rule's own threshold is."""
    draw: Draw
    full: bool = False
    """Whether this call renews the cache, where there is one: of those that open a block."""
    verify: Verify | None = None
    """The verifier model, where the request has one."""
    best: Best | None = None
    """All that the rule reads of the logits, where it says so (`Rule.special`)."""
    logits: jax.Array | None = None
    """Else these: float32 [B, N, V], those of the columns themselves (shifted models included)."""

    @property
    def logits_BNV(self) -> jax.Array:
        """The logits, for a rule that did not say it can do without."""
        assert self.logits is not None
        return self.logits


def without(logits_BNV: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """The logits with those of `ids` at -inf."""
    if not ids:
        return logits_BNV
    banned_V = jnp.isin(jnp.arange(logits_BNV.shape[-1]), jnp.array(ids))
    return jnp.where(banned_V, -jnp.inf, logits_BNV)


def rank(score_BN: jax.Array, masked_BN: jax.Array) -> jax.Array:
    """0 for the best candidate of a row, and so on; non-candidates come last.

    Lowest index wins ties. A candidate of confidence -inf or NaN still ranks before every
    non-candidate, so that any weights make progress.
    """
    known = jnp.clip(jnp.nan_to_num(score_BN, nan=LOWEST), LOWEST, -LOWEST)
    order_BN = jnp.argsort(jnp.where(masked_BN, known, -jnp.inf), descending=True, stable=True)
    return jnp.argsort(order_BN, axis=-1)


def gumbel(u: jax.Array) -> jax.Array:
    """Gumbel noise from uniform draws, in log space."""
    return -jnp.log(-jnp.log(u))
