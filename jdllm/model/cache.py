"""Cache: keys and values of every layer, preallocated and written in place."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from jdllm.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One array per layer (stacking them costs 2.4x in the decode loop: XLA copies the slices).

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

    @property
    def length(self) -> int:
        """Columns S."""
        return self.keys[0].shape[1]

    def begun(self, prefixes: Self, which_B: jax.Array) -> Self:
        """With the columns of `prefixes` ([F, P, G, K] a layer) in front; row b has which_B[b]."""

        def one(old_BSGK: jax.Array, new_FPGK: jax.Array) -> jax.Array:
            return old_BSGK.at[:, : new_FPGK.shape[1]].set(new_FPGK[which_B])

        return jax.tree.map(one, self, prefixes)


def write(old_BSGK: jax.Array, new_BTGK: jax.Array, columns_BT: jax.Array) -> jax.Array:
    """Writes T new columns of each row in place; columns at or beyond S are dropped.

    Written as a vmap, so that the batch stays a batch dimension of the scatter and shards.
    """

    def one(old_SGK: jax.Array, new_TGK: jax.Array, columns_T: jax.Array) -> jax.Array:
        return old_SGK.at[columns_T].set(
            new_TGK, mode="drop", unique_indices=True, indices_are_sorted=True
        )

    return jax.vmap(one)(old_BSGK, new_BTGK.astype(old_BSGK.dtype), columns_BT)
