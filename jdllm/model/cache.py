"""Cache: keys and values of every layer, preallocated and written in place.

A model knows `length`, `at`, `target`, `holding`, `view`, `table` and `axes` alone, so keys may lie
row by row, or in pages.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from jdllm.kernels.rotary.reference import Target, write_pages, write_rows
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
    axes: ClassVar = ("batch", None, "kv_heads", None)
    """Logical axes of its arrays."""

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
        return _written(self, layer, k_BTGK, v_BTGK, write_rows)

    def view(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, G, K] of a layer, as attention reads them."""
        return self.keys[layer], self.values[layer]

    def target(self, layer: int) -> Target:
        """The arrays of a layer, and where in them the slots are: for a kernel that writes them."""
        return Target(self.keys[layer], self.values[layer], _named(self.slots))

    def holding(self, layer: int, keys: jax.Array, values: jax.Array) -> Self:
        """This cache with other arrays of a layer."""
        return _holding(self, layer, keys, values)

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
    axes: ClassVar = (None, None, "kv_heads", None)
    """Logical axes of its arrays."""

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
        return _written(self, layer, k_BTGK, v_BTGK, write_pages)

    def target(self, layer: int) -> Target:
        """The arrays of a layer, and where in them the slots are: for a kernel that writes them."""
        slots_BT = _named(self.slots)
        place_BT = jnp.minimum(slots_BT // self.page, self.table.shape[1] - 1)
        page_BT = jnp.take_along_axis(self.table, place_BT, axis=1)
        there_BT = (slots_BT < self.length) & (page_BT > 0)
        page_BT = jnp.where(there_BT, page_BT, len(self.keys[layer]))
        places_BT = page_BT * self.page + slots_BT % self.page
        return Target(self.keys[layer], self.values[layer], places_BT)

    def holding(self, layer: int, keys: jax.Array, values: jax.Array) -> Self:
        """This cache with other arrays of a layer."""
        return _holding(self, layer, keys, values)

    def view(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """Pools [P, N, G, K] of keys and values of a layer, which attention reads by the table."""
        return self.keys[layer], self.values[layer]


def _named(slots_BT: jax.Array | None) -> jax.Array:
    if slots_BT is None:
        raise ValueError("a cache is written at slots: name them, cache.at(slots)")
    return slots_BT


def _written[T: (Cache, PagedCache)](
    cache: T, layer: int, k: jax.Array, v: jax.Array, write: Callable[..., jax.Array]
) -> T:
    keys, values, places = cache.target(layer)
    return cache.holding(layer, write(keys, k, places), write(values, v, places))


def _holding[T: (Cache, PagedCache)](cache: T, layer: int, k: jax.Array, v: jax.Array) -> T:
    keys = (*cache.keys[:layer], k, *cache.keys[layer + 1 :])
    values = (*cache.values[:layer], v, *cache.values[layer + 1 :])
    return dataclasses.replace(cache, keys=keys, values=values)
