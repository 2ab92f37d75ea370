"""Schedules: how many tokens a step should reveal, from the masks a block began with and has left.

A schedule that has `steps` bounds the steps of a block; the others are bounded by its length.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Pace(NamedTuple):
    """How far each row's block has come."""

    opened_B: jax.Array
    """Columns that were open at its start."""
    open_B: jax.Array
    """Columns in view that are open now."""
    step_B: jax.Array
    """Calls made for it."""
    block_B: jax.Array
    """Its number."""


class Schedule(Protocol):
    """Says how many tokens the coming step should reveal [B], and which share of the open [B]."""

    @property
    def steps(self) -> int | None:
        """The steps of a block, where the schedule bounds them."""
        ...

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]: ...


def split_quota(masks_B: jax.Array, steps: int, step_B: jax.Array) -> jax.Array:
    """How many of a block's `masks_B` masks go in a step of `steps`: the remainder goes first."""
    base_B, rest_B = masks_B // steps, masks_B % steps
    return jnp.where(step_B < steps, base_B + (step_B < rest_B), 0)


@dataclasses.dataclass(frozen=True)
class Each:
    """The same number every step."""

    tokens: int = 1
    steps: int | None = None

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]:
        return jnp.full_like(pace.open_B, self.tokens), jnp.ones(pace.open_B.shape)


@dataclasses.dataclass(frozen=True)
class Masks:
    """The masks that a block began with, spread over its steps (LLaDA, Fast-dLLM)."""

    steps: int

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]:
        quota_B = split_quota(pace.opened_B, self.steps, pace.step_B)
        return quota_B, jnp.ones(quota_B.shape)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The block's length, prompt or not, spread over its steps (LLaDA2, BlockInfer)."""

    length: int
    steps: int

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]:
        columns_B = jnp.full_like(pace.open_B, self.length)
        return split_quota(columns_B, self.steps, pace.step_B), jnp.ones(columns_B.shape)


@dataclasses.dataclass(frozen=True)
class CarryOver:
    """Masks spread over the steps; what earlier steps left over is added (Fast-dLLM's Dream).

    At least one is due, so that no step is idle. Behind the last step everything is due. The
    reference then also runs as many steps as that step dropped tokens, some of them idle; here the
    block ends when it is clean.
    """

    per_block: int

    @property
    def steps(self) -> int | None:
        return None

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]:
        opened_B, now_B = pace.opened_B, pace.step_B + 1
        due_B = jnp.minimum(now_B, self.per_block) * (opened_B // self.per_block)
        due_B = jnp.where(now_B >= self.per_block, opened_B, due_B)
        return jnp.maximum(due_B - (opened_B - pace.open_B), 1), jnp.ones(due_B.shape)


@dataclasses.dataclass(frozen=True)
class Timesteps:
    """Dream's: from time t to s, int(masks * (1 - s/t)) go; the last step takes the rest.

    Times run from 1 to `eps`, to the last bit those of torch.linspace, because the truncation is
    sensitive to it. With `mean` every row uses the batch's average count, as the reference does;
    rows that began with no mask only fill the batch up and are not in it.
    """

    steps: int
    eps: float
    mean: bool = False

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]:
        share_B = jnp.asarray(self.shares())[jnp.minimum(pace.step_B, self.steps - 1)]
        masks_B = pace.open_B.astype(jnp.float32)
        if self.mean:
            rows = jnp.maximum(jnp.sum(pace.opened_B > 0), 1)
            masks_B = jnp.full_like(masks_B, jnp.sum(masks_B) / rows)
        return (masks_B * share_B).astype(jnp.int32), share_B

    def shares(self) -> np.ndarray:
        """1 - s/t of every step [steps], float32, the last one 1."""
        times = linspace(self.eps, self.steps)
        shares = np.float32(1) - times[1:] / times[:-1]
        shares[-1] = 1
        return shares


def linspace(end: float, steps: int) -> np.ndarray:
    """Times from 1 to `end` in so many steps, float32 [steps + 1], as torch.linspace has them.

    It counts a float32 step from whichever end is nearer, in fused multiply-adds: products and sums
    are exact in float64, and rounded once.
    """
    last = np.float32(end)
    step = np.float64((last - np.float32(1)) / np.float32(steps))
    i = np.arange(steps + 1)
    times = np.where(i < (steps + 1) // 2, 1 + i * step, np.float64(last) - (steps - i) * step)
    return times.astype(np.float32)
