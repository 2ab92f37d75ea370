"""Attention in plain jnp, which serves every case: what the other implementations must equal."""

import jax
import jax.numpy as jnp


def attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible: jax.Array
) -> jax.Array:
    """Grouped-query attention [B, T, H, K] in the dtype of the values; softmax in float32.

    Scores are scaled by 1/sqrt(K). `visible` is int32 [B]: a row sees its first so many keys; or
    bool [B, S], or [B, T, S] where every query sees keys of its own: keys that are False get no
    weight. A query that sees no key at all gets the mean of the values instead of NaN.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    floor = jnp.finfo(jnp.float32).min
    mask = by_query(visible, k_BSGK)[:, None, None]
    scores = jnp.where(mask, scores * K**-0.5, floor)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    return jnp.einsum("BGRTS,BSGK->BTGRK", weights, v_BSGK).reshape(B, T, H, K)


def as_mask(visible: jax.Array, columns: int) -> jax.Array:
    """What rows see as bool [B, S] or [B, T, S], whichever form it has."""
    return visible if visible.ndim > 1 else jnp.arange(columns) < visible[:, None]


def by_query(visible: jax.Array, k_BSGK: jax.Array) -> jax.Array:
    """What queries see as bool [B, T, S], or [B, 1, S] where all of them see the same keys."""
    mask = as_mask(visible, k_BSGK.shape[1])
    return mask if mask.ndim == 3 else mask[:, None]
