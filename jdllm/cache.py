"""Cache: keys and values of every layer, preallocated and written in place.

The strategies (none, prefix, dual) differ only in which columns are written again each step.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from jdllm.configs import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One array a layer (stacking them costs 2.4x in the decode loop: XLA copies the slices).

    Keys are stored after rotary embedding, so column s of a row always means position s.
    """

    keys: tuple[jax.Array, ...]
    """L arrays [B, S, G, K]."""
    values: tuple[jax.Array, ...]
    """L arrays [B, S, G, K]."""

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> Self:
        """An empty cache. Zeros, not uninitialised memory: hidden keys still meet 0 * value."""
        shape = (batch, length, config.kv_heads, config.head_dim)
        keys = tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))
        values = tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))
        return cls(keys, values)


def write(old_BSGK: jax.Array, new_BTGK: jax.Array, columns_BT: jax.Array) -> jax.Array:
    """Writes T new columns of each row in place; columns at or beyond S are dropped.

    Written as a vmap, so that the batch stays a batch dimension of the scatter and shards.
    """

    def one(old_SGK: jax.Array, new_TGK: jax.Array, columns_T: jax.Array) -> jax.Array:
        return old_SGK.at[columns_T].set(
            new_TGK, mode="drop", unique_indices=True, indices_are_sorted=True
        )

    return jax.vmap(one)(old_BSGK, new_BTGK.astype(old_BSGK.dtype), columns_BT)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step recomputes, and what it reads from the cache."""

    window: str
    """Columns fed in a step: the whole canvas, the block and all behind it, or the block."""
    refresh: bool
    """Whether a full pass, which also decodes, fills the cache when a block opens."""


# none: exact. prefix: keys left of the block are those of the pass that opened it. dual: so are
# those right of it (Fast-dLLM). Both are approximations for a bidirectional model.
PLANS: dict[str, Plan] = {
    "none": Plan(window="canvas", refresh=False),
    "prefix": Plan(window="suffix", refresh=True),
    "dual": Plan(window="block", refresh=True),
}
