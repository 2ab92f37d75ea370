"""Plan: which keys and values are reused, and so which columns a call feeds.

The strategies differ only in which columns are computed again in each step, and when all are.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

CachePlan = Literal["none", "prefix", "dual", "block"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step recomputes, and when a full pass, which also decodes, renews the cache.

    none: every step is a full pass; exact. prefix and dual (Fast-dLLM): a full pass opens each
    block, then a step feeds the block and all behind it, or the block alone, against keys that are
    stale; both are approximations for a bidirectional model. block: finished columns are fed
    once, when they are final, and later columns stay unseen; exact for a block-causal model.
    """

    kind: CachePlan = "none"
    refresh_every: int | None = None
    """A full pass also comes before every so many steps (prefix and dual)."""
    warmup: int = 0
    """So many full passes come before the first step (dInfer's vicinity refresh)."""
    before: int = 0
    """Columns before the block that a step also feeds; a model of shifted logits needs one."""
    after: int = 0
    """Columns behind the block that a step also feeds (dual)."""
    window: int | None = None
    """apd: a step feeds so many columns before the first open one, and what was accepted last."""

    @property
    def refreshes(self) -> bool:
        """Whether a full pass opens each block."""
        return self.kind in ("prefix", "dual")

    @property
    def cached(self) -> bool:
        """Whether keys and values are kept from call to call."""
        return self.kind != "none" or self.window is not None

    @property
    def varies(self) -> bool:
        """Whether calls behind the one that opens a block may be full ones, too."""
        return bool(self.refresh_every or self.warmup or self.window)

    def full(self, step_B: jax.Array, block_B: jax.Array) -> jax.Array:
        """Rows whose coming call should feed every column [B]."""
        full_B = jnp.zeros(step_B.shape, bool)
        if self.refresh_every:
            full_B |= step_B % self.refresh_every == 0
        if self.warmup:  # the pass behind the last warm one is full as well: the cache's first
            full_B |= (block_B == 0) & (step_B < self.warmup)
        return full_B | (step_B == 0) if self.window else full_B
