"""Schedules say how many tokens a step should unmask, by the masks at the block's start and now.

A schedule with `steps` bounds the steps of a block; otherwise the block's length bounds them.
"""

import dataclasses
import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Pace(NamedTuple):
    """The progress of each row's block."""

    opened_B: jax.Array
    """Columns that were open when the block began."""
    open_B: jax.Array
    """Columns in view that are open now."""
    step_B: jax.Array
    """Calls made for the block."""
    block_B: jax.Array
    """The block's number."""


class Schedule(Protocol):
    """Says how many tokens the next step should unmask [B], and what share of the open ones [B]."""

    @property
    def steps(self) -> int | None:
        """Returns the steps of a block, or None where the schedule does not bound them."""
        ...

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]: ...


def split_quota(masks_B: jax.Array, steps: int, step_B: jax.Array) -> jax.Array:
    """Returns how many of a block's masks one of `steps` steps fills; early steps take one more."""
    base_B, rest_B = masks_B // steps, masks_B % steps
    return jnp.where(step_B < steps, base_B + (step_B < rest_B), 0)


@dataclasses.dataclass(frozen=True)
class Each:
    """A schedule of the same number of tokens per step."""

    tokens: int = 1
    steps: int | None = None

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]:
        return jnp.full_like(pace.open_B, self.tokens), jnp.ones(pace.open_B.shape)


@dataclasses.dataclass(frozen=True)
class Masks:
    """Spreads the masks that a block began with over its steps (LLaDA, Fast-dLLM)."""

    steps: int

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]:
        quota_B = split_quota(pace.opened_B, self.steps, pace.step_B)
        return quota_B, jnp.ones(quota_B.shape)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Spreads the block's length, prompt included, over its steps (LLaDA2, BlockInfer)."""

    length: int
    steps: int

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]:
        columns_B = jnp.full_like(pace.open_B, self.length)
        return split_quota(columns_B, self.steps, pace.step_B), jnp.ones(columns_B.shape)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Spreads a block's masks over its steps by a Gaussian of each block's own (EDIT).

    The weight of step s of n is exp(-((s/n - peak) / width)^2 / 2). Each step takes the whole part
    of its share of the masks; the rest goes one each to the largest fractions, the earlier step
    first. EDIT truncates the float32 sum of the fractions instead, and so loses a token of some
    blocks; `jdllm.parity.edit` has its counts.
    """

    steps_of: tuple[int, ...]
    """Steps of every block; the last one serves all that follow, here and below."""
    peaks: tuple[float, ...]
    widths: tuple[float, ...]
    longest: int
    """Columns of the longest block."""

    @property
    def steps(self) -> int | None:
        return max(self.steps_of)

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]:
        table = jnp.asarray(self.table())
        known_B = pace.step_B < table.shape[2]
        block_B = jnp.minimum(pace.block_B, table.shape[0] - 1)
        quota_B = table[block_B, pace.opened_B, jnp.minimum(pace.step_B, table.shape[2] - 1)]
        return jnp.where(known_B, quota_B, 0), jnp.ones(quota_B.shape)

    def table(self) -> np.ndarray:
        """Returns the tokens of every step, int32 [blocks, masks at the start, step]."""
        blocks = max(map(len, (self.steps_of, self.peaks, self.widths)))
        found = np.zeros((blocks, self.longest + 1, max(self.steps_of)), np.int32)
        for i in range(blocks):
            steps, peak, width = (
                values[min(i, len(values) - 1)]
                for values in (self.steps_of, self.peaks, self.widths)
            )
            for masks in range(self.longest + 1):
                found[i, masks, :steps] = split_by_gaussian(masks, steps, peak, width)
        return found


@functools.cache
def split_by_gaussian(masks: int, steps: int, peak: float, width: float) -> tuple[int, ...]:
    """Returns how many of `masks` tokens each of `steps` steps takes; they sum to `masks`."""
    weight = np.exp(-0.5 * ((np.arange(steps) / steps - peak) / width) ** 2)
    # Shares that mirror each other are equal; rounding must not tell them apart.
    share = np.round(weight / weight.sum() * masks, 9)
    count = np.floor(share).astype(int)
    order = np.argsort(-np.round(share - count, 9), kind="stable")
    count[order[: masks - count.sum()]] += 1
    return tuple(count.tolist())


@dataclasses.dataclass(frozen=True)
class CarryOver:
    """Spreads masks over the steps and adds what earlier steps left over (Fast-dLLM's Dream).

    At least one token is due, so that no step is idle; from the last step on, all are. The
    reference then also runs as many steps as that step dropped tokens, some of them idle; here the
    block ends when nothing in it is open.
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
    """Dream's schedule: the step from time t to s fills int(masks * (1 - s/t)), the last one all.

    Times run from 1 to `eps` and equal torch.linspace's to the last bit, because the truncation is
    sensitive to it. With `mean` every row uses the batch's average count of masks, as the reference
    does; rows that began without masks are padding and do not count.
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
        """Returns 1 - s/t of every step, float32 [steps]; the last one is 1."""
        times = linspace(self.eps, self.steps)
        shares = np.float32(1) - times[1:] / times[:-1]
        shares[-1] = 1
        return shares


def linspace(end: float, steps: int) -> np.ndarray:
    """Returns times from 1 to `end`, float32 [steps + 1], equal to torch.linspace's.

    torch counts float32 steps from the nearer end, in fused multiply-adds. Float64 computes these
    products and sums exactly, and rounding happens once.
    """
    last = np.float32(end)
    step = np.float64((last - np.float32(1)) / np.float32(steps))
    i = np.arange(steps + 1)
    times = np.where(i < (steps + 1) // 2, 1 + i * step, np.float64(last) - (steps - i) * step)
    return times.astype(np.float32)
