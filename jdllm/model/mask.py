"""Mask: who attends to whom. The caller of a model gives it; the model only has it resolved."""

import dataclasses
from collections.abc import Callable
from typing import Literal, Self

import jax
import jax.numpy as jnp

from jdllm.kernels.attention.reference import as_ranges, by_query
from jdllm.model.config import ModelConfig

Kind = Literal["full", "causal", "blocks", "window", "two_stream"]


def causal(q: jax.Array, k: jax.Array, _: int) -> jax.Array:
    """Whether a key stands at the query's position or to its left."""
    return k <= q


def blocks(q: jax.Array, k: jax.Array, size: int) -> jax.Array:
    """Whether a key's block is the query's or an earlier one; blocks count from position 0."""
    return k // size <= q // size


def window(q: jax.Array, k: jax.Array, size: int) -> jax.Array:
    """Whether a key is fewer than `size` positions away, to either side."""
    return jnp.abs(k - q) < size


def two_stream(q: jax.Array, k: jax.Array, size: int) -> jax.Array:
    """Whether a column of [noisy ; clean] halves, each of all positions, sees another one.

    A noisy block sees itself and the clean blocks before it; a clean one sees clean blocks up to
    itself.
    """
    T, q, k = q.shape[1], q // size, k // size
    noisy_T = jnp.arange(T) < T // 2
    of_noisy = jnp.where(noisy_T, k == q, k < q)
    return jnp.where(noisy_T[:, None], of_noisy, ~noisy_T & (k <= q))


RULES: dict[Kind, Callable[[jax.Array, jax.Array, int], jax.Array]] = {
    "causal": causal,
    "blocks": blocks,
    "window": window,
    "two_stream": two_stream,
}
"""By kind: which keys at positions [B, 1, S] the queries at [B, T, 1] may see. full has no rule."""

REACHES: dict[Kind, Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]] = {
    "causal": lambda q, _: (jnp.zeros_like(q), q + 1),
    "blocks": lambda q, size: (jnp.zeros_like(q), (q // size + 1) * size),
    "window": lambda q, size: (jnp.maximum(q - size + 1, 0), q + size),
}
"""By kind: the first position that a query sees, and the one behind the last; others have none."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys there are to see, and the rule of who sees which of them."""

    visible: jax.Array
    """Of the keys: int32 [B], where rows see their first so many columns; int32 [B, 2], the first
    column that a row sees and the one behind the last (left padding); or bool [B, S]."""
    keys: jax.Array | None = None
    """int32 [B, S]: positions of a cache's columns, where column s is not position s."""
    documents: jax.Array | None = None
    """int32 [B, T] of a whole canvas that holds several: a column sees its own document alone."""
    also: jax.Array | None = None
    """bool [B, T, S]: keys that a query sees besides those that the rule shows it."""
    kind: Kind = dataclasses.field(default="full", metadata={"static": True})
    size: int = dataclasses.field(default=1, metadata={"static": True})
    """Columns of a block (blocks, two_stream), or the reach of a window."""

    def __post_init__(self):
        if self.kind != "full" and self.kind not in RULES:
            raise ValueError(f"kind={self.kind} of a mask must be full, {', '.join(RULES)}")
        if self.size < 1:
            raise ValueError(f"size={self.size} of a mask must be 1 or more")

    @classmethod
    def of(cls, config: ModelConfig, visible: jax.Array, block: int | None = None) -> Self:
        """The mask under which a model of `config` works, its blocks `block` columns long.

        `block` (default: the config's) means nothing to a model that does not attend block by
        block.
        """
        if config.causal:
            return cls(visible, kind="causal")
        if config.block_causal is None:
            return cls(visible)
        return cls(visible, kind="blocks", size=block or config.block_causal)

    def resolve(self, positions_BT: jax.Array, columns: int | None = None) -> jax.Array:
        """What attention is told, as short as it can be said: see kernels/attention/reference.py.

        The queries stand at `positions_BT`; the keys there too, or in the `columns` of a cache.
        `visible` stays what it is where every query sees the same; over a cache whose columns are
        positions every query has its range; everything else is bool [B, T, S].
        ValueError for two streams or documents over a cache.
        """
        if columns is not None and (self.kind == "two_stream" or self.documents is not None):
            kind = "document" if self.kind != "two_stream" else "two-stream"
            raise ValueError(f"a {kind} mask is for whole canvases: call without a cache")
        if self.documents is not None:
            own = dataclasses.replace(self, documents=None).resolve(positions_BT)
            own_BTS = by_query(own, positions_BT.shape[1])
            return own_BTS & (self.documents[:, :, None] == self.documents[:, None, :])
        plain = self.keys is None and self.also is None
        spans = self.visible.ndim == 2 and self.visible.dtype != bool
        visible = self.visible[:, None] if spans else self.visible
        if self.kind == "full":
            return visible
        if visible.dtype != bool and self.kind in REACHES and columns and plain:
            first_BT, last_BT = REACHES[self.kind](positions_BT, self.size)
            own = as_ranges(visible)
            first_BT = jnp.maximum(first_BT, own[..., 0])
            return jnp.stack([first_BT, jnp.minimum(last_BT, own[..., 1])], axis=-1)
        keys_BS = positions_BT if columns is None else jnp.arange(columns)[None]
        keys_BS = keys_BS if self.keys is None else self.keys
        seen = RULES[self.kind](positions_BT[:, :, None], keys_BS[:, None, :], self.size)
        seen = seen if self.also is None else seen | self.also
        return by_query(visible, keys_BS.shape[1]) & seen
