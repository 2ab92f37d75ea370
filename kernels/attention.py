"""Attention behind one call: the implementations in order of preference, the jnp reference last.

An implementation raises NotImplementedError where it does not serve a case; the next one is tried.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def per_query(visible_BS: jax.Array) -> jax.Array:
    """[B, 1, S] of [B, S], which is the same for every query; [B, T, S] stays."""
    return visible_BS[:, None] if visible_BS.ndim == 2 else visible_BS


def reference(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible_BS: jax.Array
) -> jax.Array:
    """Grouped-query attention in plain jnp; softmax in float32.

    Scores are scaled by 1/sqrt(K). `visible_BS` is bool: keys that are False get no weight; it may
    be [B, T, S], one row for each query. A query that sees no key at all gets the mean of the
    values instead of NaN.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    floor = jnp.finfo(jnp.float32).min
    seen = per_query(visible_BS)[:, None, None]
    scores = jnp.where(seen, scores * K**-0.5, floor)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    return jnp.einsum("BGRTS,BSGK->BTGRK", weights, v_BSGK).reshape(B, T, H, K)


def xla(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible_BS: jax.Array
) -> jax.Array:
    """jax.nn's own attention, which XLA may fuse; serves GPUs."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("on a CPU it is no faster than the reference")
    mask = per_query(visible_BS)[:, None]
    return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, mask=mask, implementation="xla")


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"xla": xla, "reference": reference}


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visible_BS: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of T queries over S keys, by the first implementation that serves the case.

    Shapes and meaning as in `reference`; the result is [B, T, H, K] in the dtype of the values.
    Raises ValueError for a name that is not in IMPLEMENTATIONS.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be one of {', '.join(IMPLEMENTATIONS)}")
    names = [implementation] if implementation else list(IMPLEMENTATIONS)
    for name in names:
        try:
            return IMPLEMENTATIONS[name](q_BTHK, k_BSGK, v_BSGK, visible_BS)
        except NotImplementedError:
            if name == names[-1]:
                raise
    raise AssertionError("unreachable: the reference serves every case")
