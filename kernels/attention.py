"""Attention behind one call: the implementations in order of preference, the jnp reference last.

An implementation raises NotImplementedError where it does not serve a case; the next one is tried.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

QUERIES = 64  # of a tile of cuDNN's kernel
PROCESSORS = 128  # about as many as a data centre's GPU has


def reference(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible: jax.Array
) -> jax.Array:
    """Grouped-query attention in plain jnp; softmax in float32.

    Scores are scaled by 1/sqrt(K). `visible` is int32 [B]: a row sees its first so many keys; or
    bool [B, S], or [B, T, S] where every query sees keys of its own: keys that are False get no
    weight. A query that sees no key at all gets the mean of the values instead of NaN.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    floor = jnp.finfo(jnp.float32).min
    mask = _by_query(visible, k_BSGK)[:, None, None]
    scores = jnp.where(mask, scores * K**-0.5, floor)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSGK.dtype)
    return jnp.einsum("BGRTS,BSGK->BTGRK", weights, v_BSGK).reshape(B, T, H, K)


def xla(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible: jax.Array) -> jax.Array:
    """jax.nn's own attention, which XLA may fuse; serves GPUs."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("on a CPU it is no faster than the reference")
    mask = _by_query(visible, k_BSGK)[:, None]
    return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, mask=mask, implementation="xla")


def cudnn(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """cuDNN's flash attention; serves 16-bit numbers on GPUs, where rows see their first keys.

    It reads keys as the cache holds them. XLA's batched products, left alone with a batch of rows,
    turn the whole cache round, and then write its columns one number at a time. But it gives each
    head's QUERIES to one processor: too few of those leave the card idle.
    """
    B, T, H, _ = q_BTHK.shape
    if jax.default_backend() != "gpu" or q_BTHK.dtype.itemsize != 2 or lengths_B.ndim != 1:
        raise NotImplementedError("it serves 16-bit numbers and lengths, on GPUs")
    if B * H * -(-T // QUERIES) < PROCESSORS:
        raise NotImplementedError("too little work to go round")
    try:
        return jax.nn.dot_product_attention(
            q_BTHK,
            k_BSGK,
            v_BSGK,
            key_value_seq_lengths=jnp.minimum(lengths_B, k_BSGK.shape[1]),
            implementation="cudnn",
        )
    except RuntimeError as error:
        raise NotImplementedError("cuDNN is not installed") from error


def as_mask(visible: jax.Array, columns: int) -> jax.Array:
    """What rows see as bool [B, S] or [B, T, S], whichever form it has."""
    return visible if visible.ndim > 1 else jnp.arange(columns) < visible[:, None]


def _by_query(visible: jax.Array, k_BSGK: jax.Array) -> jax.Array:
    """bool [B, T, S], or [B, 1, S] where all queries see the same keys."""
    mask = as_mask(visible, k_BSGK.shape[1])
    return mask if mask.ndim == 3 else mask[:, None]


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "cudnn": cudnn,
    "xla": xla,
    "reference": reference,
}


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    visible: jax.Array,
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
            return IMPLEMENTATIONS[name](q_BTHK, k_BSGK, v_BSGK, visible)
        except NotImplementedError:
            if name == names[-1]:
                raise
    raise AssertionError("unreachable: the reference serves every case")
