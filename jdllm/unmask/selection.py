"""Selections choose the positions that a step unmasks, by their confidence and place."""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from jdllm.unmask.view import View, rank

Edge = Literal["at_least", "above", "slack"]


class Selection(Protocol):
    """Chooses positions: score and value [B, N] -> bool [B, N], all within view.open_BN."""

    def __call__(self, score_BN: jax.Array, value_BN: jax.Array, view: View) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Quota:
    """Chooses as many of the best positions as the schedule asks for."""

    def __call__(self, score_BN: jax.Array, value_BN: jax.Array, view: View) -> jax.Array:
        return view.open_BN & (rank(score_BN, view.open_BN) < view.quota_B[:, None])


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Chooses every position that passes the threshold, and at least the quota's best.

    Edges: `at_least` is Fast-dLLM's and d3LLM's >=; `above` is LLaDA2's and SGLang's >; `slack` is
    dInfer's >= min(best - 1e-5, threshold), which also takes near-ties of the best. With a quota of
    1 the best position is always chosen. The threshold may be an array [B].
    """

    threshold: float | jax.Array
    edge: Edge = "at_least"

    def __call__(self, score_BN: jax.Array, value_BN: jax.Array, view: View) -> jax.Array:
        bar_B1 = jnp.maximum(self.threshold, view.floor_B)[:, None]
        if self.edge == "slack":
            best_B = jnp.max(jnp.where(view.open_BN, value_BN, -jnp.inf), axis=-1)
            bar_B1 = jnp.minimum(bar_B1, best_B[:, None] - 1e-5)
        passes_BN = value_BN > bar_B1 if self.edge == "above" else value_BN >= bar_B1
        sure_BN = view.open_BN & passes_BN
        enough_B = jnp.sum(sure_BN, axis=-1) >= view.quota_B
        return jnp.where(enough_B[:, None], sure_BN, Quota()(score_BN, value_BN, view))


@dataclasses.dataclass(frozen=True)
class Allowance:
    """Chooses the confident ones of the quota's best: Fast-dLLM's confidence_threshold for Dream.

    The best position is always chosen. The schedule carries over what a step leaves of its quota.
    """

    threshold: float

    def __call__(self, score_BN: jax.Array, value_BN: jax.Array, view: View) -> jax.Array:
        rank_BN = rank(score_BN, view.open_BN)
        allowed_BN = view.open_BN & (rank_BN < view.quota_B[:, None])
        return allowed_BN & ((rank_BN == 0) | (value_BN >= self.threshold))


@dataclasses.dataclass(frozen=True)
class Factor:
    """Chooses the best r positions while p of rank r >= 1 - factor/(r + 1): Fast-dLLM's factor.

    Ranks count from 1. As in the reference, rank 1 always passes, and a failure at the very last
    rank is ignored.
    """

    factor: float

    def __call__(self, score_BN: jax.Array, value_BN: jax.Array, view: View) -> jax.Array:
        rank_BN = rank(score_BN, view.open_BN)
        bar_BN = 1 - self.factor / (rank_BN + 2)
        fails_BN = view.open_BN & (rank_BN > 0) & (value_BN < bar_BN)
        last_B = jnp.sum(view.open_BN, axis=-1) - 1
        first_B = jnp.min(jnp.where(fails_BN, rank_BN, last_B[:, None]), axis=-1)
        count_B = first_B + ((first_B == 0) | (first_B == last_B))
        return view.open_BN & (rank_BN < count_B[:, None])


@dataclasses.dataclass(frozen=True)
class Hierarchy:
    """Chooses the best position of every run of masks if it is above `low`: dInfer's hierarchy.

    Every position above `threshold` is chosen, too, and always the best of all. Both comparisons
    are strict. (The reference takes all positions of a run that tie; here the lowest index wins.)
    """

    threshold: float
    low: float

    def __call__(self, score_BN: jax.Array, value_BN: jax.Array, view: View) -> jax.Array:
        masked_BN = view.open_BN
        before_BN = jnp.pad(masked_BN[:, :-1], ((0, 0), (1, 0)))
        run_BN = jnp.cumsum(masked_BN & ~before_BN, axis=-1)
        rank_BN = rank(score_BN, masked_BN)
        same_BNN = (run_BN[:, :, None] == run_BN[:, None, :]) & masked_BN[:, None, :]
        ahead_BNN = rank_BN[:, None, :] < rank_BN[:, :, None]
        best_BN = ~jnp.any(same_BNN & ahead_BNN, axis=-1)
        bar_B1 = jnp.maximum(self.threshold, view.floor_B)[:, None]
        sure_BN = (best_BN & (value_BN > self.low)) | (value_BN > bar_B1) | (rank_BN == 0)
        return masked_BN & sure_BN


@dataclasses.dataclass(frozen=True)
class EntropyBound:
    """Chooses the surest positions whose entropies sum to less than `bound`, and at least one.

    This is BlockInfer's entropy_bounded. Values are negative entropies.
    """

    bound: float

    def __call__(self, score_BN: jax.Array, value_BN: jax.Array, view: View) -> jax.Array:
        rank_BN = rank(score_BN, view.open_BN)
        entropy_BN = jnp.where(view.open_BN, -value_BN, 0.0)
        upto_BNN = (rank_BN[:, None, :] <= rank_BN[:, :, None]) & view.open_BN[:, None, :]
        total_BN = jnp.sum(jnp.where(upto_BNN, entropy_BN[:, None, :], 0.0), axis=-1)
        return view.open_BN & ((total_BN < self.bound) | (rank_BN == 0))


@dataclasses.dataclass(frozen=True)
class Share:
    """Chooses every mask on its own, with the schedule's probability: Dream's origin."""

    def __call__(self, score_BN: jax.Array, value_BN: jax.Array, view: View) -> jax.Array:
        return view.open_BN & (value_BN < view.share_B[:, None])
