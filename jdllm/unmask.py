"""Unmasking rules: which masked positions take which tokens, given the block's logits.

A rule is a composition of a candidate (which token), a confidence (how sure) and a selection (which
positions). They know arrays only; rows never depend on each other. Lowest index wins on ties.

Confidence is kept as log-odds, log(p / (1 - p)), in float32: it ranks like the probability p, but
does not saturate where float32 p rounds to 1, so float64 is not needed.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

Draw = Callable[[tuple[int, ...]], jax.Array]
"""Uniform draws in [0, 1) for every row: draw((N,)) is [B, N], draw((N, V)) is [B, N, V]."""

LOWEST = float(jnp.finfo(jnp.float32).min)


class Candidate(Protocol):
    """Chooses a token for every position: logits [B, N, V] -> ids [B, N]."""

    def __call__(self, logits_BNV: jax.Array, draw: Draw) -> jax.Array: ...


class Confidence(Protocol):
    """Rates the chosen tokens: logits [B, N, V], ids [B, N] -> log-odds [B, N]."""

    def __call__(self, logits_BNV: jax.Array, ids_BN: jax.Array, draw: Draw) -> jax.Array: ...


class Selection(Protocol):
    """Picks positions: log-odds [B, N], candidates bool [B, N], quota [B] -> bool [B, N]."""

    def __call__(
        self, odds_BN: jax.Array, masked_BN: jax.Array, quota_B: jax.Array
    ) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Argmax:
    """The most likely token that is not [MASK].

    Excluding [MASK] is ours: the references would leave such a position masked, and their
    while-loops would spin on it for ever.
    """

    mask_id: int

    def __call__(self, logits_BNV: jax.Array, draw: Draw) -> jax.Array:
        return jnp.argmax(_without(logits_BNV, (self.mask_id,)), axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Gumbel:
    """LLaDA's sampling: argmax of logits - T log(-log u), [MASK] excluded.

    The references compute exp(logits) / (-log u)^T in float64; the logarithm of that is the same
    rule without overflow, so float32 does. Note that T scales the noise, not the logits.
    """

    mask_id: int
    temperature: float

    def __call__(self, logits_BNV: jax.Array, draw: Draw) -> jax.Array:
        noise = -jnp.log(-jnp.log(draw(logits_BNV.shape[1:])))
        noisy = logits_BNV + self.temperature * noise
        return jnp.argmax(_without(noisy, (self.mask_id,)), axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Probability:
    """Log-odds of the chosen token under the softmax of the noise-free logits.

    Ids in `suppressed` leave the softmax; a position that chose one of them gets the lowest
    confidence but stays a candidate (LLaDA's confidence_eos_eot_inf).
    """

    suppressed: tuple[int, ...] = ()

    def __call__(self, logits_BNV: jax.Array, ids_BN: jax.Array, draw: Draw) -> jax.Array:
        logits = _without(logits_BNV, self.suppressed)
        chosen = ids_BN[..., None] == jnp.arange(logits.shape[-1])
        own = jnp.max(jnp.where(chosen, logits, -jnp.inf), axis=-1)
        rest = jax.nn.logsumexp(jnp.where(chosen, -jnp.inf, logits), axis=-1)
        return jnp.where(own == -jnp.inf, -jnp.inf, own - rest)


@dataclasses.dataclass(frozen=True)
class Random:
    """Uniform random confidence (LLaDA's remasking='random'), as log-odds."""

    def __call__(self, logits_BNV: jax.Array, ids_BN: jax.Array, draw: Draw) -> jax.Array:
        u_BN = draw(ids_BN.shape[1:])
        return jnp.log(u_BN) - jnp.log1p(-u_BN)


@dataclasses.dataclass(frozen=True)
class Quota:
    """The `quota` best candidates of each row."""

    def __call__(self, odds_BN: jax.Array, masked_BN: jax.Array, quota_B: jax.Array) -> jax.Array:
        return masked_BN & (_rank(odds_BN, masked_BN) < quota_B[:, None])


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Candidates whose probability is at least `threshold`, and always the best (Fast-dLLM)."""

    threshold: float

    def __call__(self, odds_BN: jax.Array, masked_BN: jax.Array, quota_B: jax.Array) -> jax.Array:
        best_BN = _rank(odds_BN, masked_BN) == 0
        return masked_BN & (best_BN | (jax.nn.sigmoid(odds_BN) >= self.threshold))


@dataclasses.dataclass(frozen=True)
class Factor:
    """Fast-dLLM's dynamic count: rank r needs p >= 1 - factor/(r + 1), up to the first failure.

    As in the reference, rank 1 always passes, and a failure at the very last rank is overlooked.
    """

    factor: float

    def __call__(self, odds_BN: jax.Array, masked_BN: jax.Array, quota_B: jax.Array) -> jax.Array:
        rank_BN = _rank(odds_BN, masked_BN)
        p_BN = jax.nn.sigmoid(odds_BN)
        bar_BN = 1 - self.factor / (rank_BN + 2)
        fails_BN = masked_BN & (rank_BN > 0) & (p_BN < bar_BN)
        last_B = jnp.sum(masked_BN, axis=-1) - 1
        first_B = jnp.min(jnp.where(fails_BN, rank_BN, last_B[:, None]), axis=-1)
        count_B = first_B + ((first_B == 0) | (first_B == last_B))
        return masked_BN & (rank_BN < count_B[:, None])


@dataclasses.dataclass(frozen=True)
class Unmasker:
    """One complete rule."""

    candidate: Candidate
    confidence: Confidence
    selection: Selection
    forbidden: tuple[int, ...] = ()
    """Ids whose logits are -inf from the start (LLaDA's logits_eos_inf)."""

    def __call__(
        self, logits_BNV: jax.Array, masked_BN: jax.Array, quota_B: jax.Array, draw: Draw
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens [B, N] for all positions, and which of the masked ones take theirs [B, N]."""
        logits = _without(logits_BNV.astype(jnp.float32), self.forbidden)
        ids_BN = self.candidate(logits, draw)
        odds_BN = self.confidence(logits, ids_BN, draw)
        return ids_BN, self.selection(odds_BN, masked_BN, quota_B)


def split_quota(masks_B: jax.Array, steps: int, step: jax.Array) -> jax.Array:
    """How many of a block's `masks_B` masks go in `step` of `steps`: the remainder goes first."""
    base_B, rest_B = masks_B // steps, masks_B % steps
    return jnp.where(step < steps, base_B + (step < rest_B), 0)


def _without(logits_BNV: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    if not ids:
        return logits_BNV
    banned_V = jnp.isin(jnp.arange(logits_BNV.shape[-1]), jnp.array(ids))
    return jnp.where(banned_V, -jnp.inf, logits_BNV)


def _rank(odds_BN: jax.Array, masked_BN: jax.Array) -> jax.Array:
    """0 for the best candidate of a row, and so on; non-candidates come last.

    A candidate of confidence -inf or NaN still ranks before every non-candidate, so that any
    weights make progress.
    """
    known = jnp.clip(jnp.nan_to_num(odds_BN, nan=LOWEST), LOWEST, -LOWEST)
    order_BN = jnp.argsort(jnp.where(masked_BN, known, -jnp.inf), descending=True, stable=True)
    return jnp.argsort(order_BN, axis=-1)
