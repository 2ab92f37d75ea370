"""Attention in plain jnp, which serves every case: what the other implementations must equal."""

import jax
import jax.numpy as jnp


def attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible: jax.Array
) -> jax.Array:
    """Grouped-query attention [B, T, H, K] in the dtype of the values; softmax in float32.

    Scores are scaled by 1/sqrt(K). `visible` is int32 [B]: a row sees its first so many keys; int32
    [B, T, 2] or [B, 1, 2]: a query sees keys from the first number on and before the second; or
    bool [B, S], or [B, T, S] where every query sees keys of its own: keys that are False get no
    weight. A query that sees no key at all gets the mean of the values instead of NaN.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    floor = jnp.finfo(jnp.float32).min
    mask = by_query(visible, k_BSGK.shape[1])[:, None, None]
    scores = jnp.where(mask, scores * K**-0.5, floor)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    return jnp.einsum("BGRTS,BSGK->BTGRK", weights, v_BSGK).reshape(B, T, H, K)


def paged_attention(
    q_BTHK: jax.Array,
    k_PNGK: jax.Array,
    v_PNGK: jax.Array,
    table: jax.Array,
    visible: jax.Array,
) -> jax.Array:
    """Attention to keys in pages: `table` int32 [B, S/N] says where every N keys of a row lie."""
    return attention(q_BTHK, gathered(k_PNGK, table), gathered(v_PNGK, table), visible)


def gathered(pool_PNGK: jax.Array, table: jax.Array) -> jax.Array:
    """The rows [B, S, G, K] whose pages a table tells."""
    return pool_PNGK[table].reshape(len(table), -1, *pool_PNGK.shape[2:])


def as_ranges(visible: jax.Array) -> jax.Array:
    """What queries see as int32 [B, T, 2] or [B, 1, 2], of lengths or of ranges.

    NotImplementedError for a mask: no two numbers say it.
    """
    if visible.dtype == bool:
        raise NotImplementedError("it serves rows and queries that see ranges of keys, not masks")
    return visible if visible.ndim == 3 else jnp.stack([0 * visible, visible], -1)[:, None]


def by_query(visible: jax.Array, columns: int) -> jax.Array:
    """What queries see as bool [B, T, S], or [B, 1, S] where all of them see the same keys."""
    if visible.dtype == bool:
        return visible if visible.ndim == 3 else visible[:, None]
    first, last = jnp.moveaxis(as_ranges(visible), -1, 0)[..., None]
    return (jnp.arange(columns) >= first) & (jnp.arange(columns) < last)
