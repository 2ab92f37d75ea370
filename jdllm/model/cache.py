"""Cache: keys and values of every layer, preallocated and written in place.

A model knows `length`, `at`, `update`, `view` and `table` alone, so keys may lie row by row, or in
pages.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from jdllm.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One array per layer (stacking them costs 2.4x in the decode loop: XLA copies the slices).

    Keys are stored after rotary embedding. Unless `at` says otherwise, position s of a row lies in
    column s.
    """

    keys: tuple[jax.Array, ...]
    """L arrays [B, S, G, K]."""
    values: tuple[jax.Array, ...]
    """L arrays [B, S, G, K]."""
    slots: jax.Array | None = None
    """int32 [B, T]: the columns that `update` writes, of one model call alone; else None."""

    @classmethod
    def zeros(cls, config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> Self:
        """An empty cache. Zeros, not uninitialised memory: hidden keys still meet 0 * value."""
        shape = (batch, length, config.kv_heads, config.head_dim)
        keys = tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))
        values = tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))
        return cls(keys, values)

    @property
    def table(self) -> None:
        """None: columns lie in their order, and nothing has to be looked up."""

    @property
    def length(self) -> int:
        """Columns S."""
        return self.keys[0].shape[1]

    def at(self, slots_BT: jax.Array | None) -> Self:
        """This cache, whose updates write columns `slots_BT`; those at or beyond S are dropped."""
        return dataclasses.replace(self, slots=slots_BT)

    def update(self, layer: int, k_BTGK: jax.Array, v_BTGK: jax.Array) -> Self:
        """This cache with the keys and values of T columns of a layer, written at the slots.

        ValueError where nobody said which (`at`).
        """
        if self.slots is None:
            raise ValueError("a cache is written at slots: name them, cache.at(slots)")
        k = write(self.keys[layer], k_BTGK, self.slots)
        v = write(self.values[layer], v_BTGK, self.slots)
        keys = (*self.keys[:layer], k, *self.keys[layer + 1 :])
        values = (*self.values[:layer], v, *self.values[layer + 1 :])
        return dataclasses.replace(self, keys=keys, values=values)

    def view(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, G, K] of a layer, as attention reads them."""
        return self.keys[layer], self.values[layer]

    def begun(self, prefixes: Self, which_B: jax.Array) -> Self:
        """With the columns of `prefixes` ([F, P, G, K] a layer) in front; row b has which_B[b]."""

        def one(old_BSGK: jax.Array, new_FPGK: jax.Array) -> jax.Array:
            return old_BSGK.at[:, : new_FPGK.shape[1]].set(new_FPGK[which_B])

        return jax.tree.map(one, self, prefixes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys in pages of one pool; a table says in which pages the columns of a row lie.

    Rows may share pages. Page 0 stands where a row has none: nobody writes it, so that what is read
    of it, hidden though it is, stays finite.
    """

    keys: tuple[jax.Array, ...]
    """L arrays [P, N, G, K]: P pages of N columns."""
    values: tuple[jax.Array, ...]
    """L arrays [P, N, G, K]."""
    table: jax.Array
    """int32 [B, S/N]: the page of every N columns of a row."""
    slots: jax.Array | None = None
    """int32 [B, T]: the columns that `update` writes, of one model call alone; else None."""

    @property
    def page(self) -> int:
        """Columns N of a page."""
        return self.keys[0].shape[1]

    @property
    def length(self) -> int:
        """Columns S of a row, those without a page included."""
        return self.table.shape[1] * self.page

    def at(self, slots_BT: jax.Array | None) -> Self:
        """This cache, whose updates write columns `slots_BT`; those at or beyond S are dropped."""
        return dataclasses.replace(self, slots=slots_BT)

    def update(self, layer: int, k_BTGK: jax.Array, v_BTGK: jax.Array) -> Self:
        """This cache with the keys and values of T columns of a layer, written at the slots.

        What has no page is dropped. ValueError where nobody said which slots (`at`).
        """
        if (slots_BT := self.slots) is None:
            raise ValueError("a cache is written at slots: name them, cache.at(slots)")
        place_BT = jnp.minimum(slots_BT // self.page, self.table.shape[1] - 1)
        page_BT = jnp.take_along_axis(self.table, place_BT, axis=1)
        kept_BT = (slots_BT < self.length) & (page_BT > 0)
        page_BT = jnp.where(kept_BT, page_BT, len(self.keys[layer]))

        def put(old_PNGK: jax.Array, new_BTGK: jax.Array) -> jax.Array:
            at = old_PNGK.at[page_BT, slots_BT % self.page]
            return at.set(new_BTGK.astype(old_PNGK.dtype), mode="drop")

        keys, values = list(self.keys), list(self.values)
        keys[layer], values[layer] = put(keys[layer], k_BTGK), put(values[layer], v_BTGK)
        return dataclasses.replace(self, keys=tuple(keys), values=tuple(values))

    def view(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """Pools [P, N, G, K] of keys and values of a layer, which attention reads by the table."""
        return self.keys[layer], self.values[layer]


def write(old_BSGK: jax.Array, new_BTGK: jax.Array, columns_BT: jax.Array) -> jax.Array:
    """Writes T new columns of each row in place; columns at or beyond S are dropped.

    Written as a vmap, so that the batch stays a batch dimension of the scatter and shards.
    """

    def one(old_SGK: jax.Array, new_TGK: jax.Array, columns_T: jax.Array) -> jax.Array:
        return old_SGK.at[columns_T].set(
            new_TGK, mode="drop", unique_indices=True, indices_are_sorted=True
        )

    return jax.vmap(one)(old_BSGK, new_BTGK.astype(old_BSGK.dtype), columns_BT)
