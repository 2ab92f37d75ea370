"""cuDNN's flash attention; serves 16-bit numbers on GPUs.

Where rows see their first keys, it stops at the last of them; where every query of a whole canvas
sees keys of its own, as in training, it reads the mask as numbers to add, [B, 1, T, T].

It reads keys as the cache holds them. XLA's batched products, left alone with a batch of rows, turn
the whole cache round, and then write its columns one number at a time. But it gives each head's
QUERIES to one processor: too few of those leave the card idle.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jdllm.kernels.attention.reference import by_query

QUERIES = 64  # of a tile of the kernel
PROCESSORS = 128  # about as many as a data centre's GPU has


def attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible: jax.Array
) -> jax.Array:
    """Attention as the reference defines it."""
    T, S = q_BTHK.shape[1], k_BSGK.shape[1]
    if jax.default_backend() != "gpu":
        raise NotImplementedError("it needs a GPU")
    if q_BTHK.dtype.itemsize != 2:
        raise NotImplementedError(f"it serves 16-bit numbers, not {q_BTHK.dtype}")
    if visible.ndim == 2 or visible.ndim == 3 and visible.shape[1] != T:
        raise NotImplementedError("it serves rows that see their first keys, or masks per query")
    if visible.ndim == 3 and (T != S or T % 2):
        raise NotImplementedError(
            f"under masks per query it serves whole canvases of even width, not {T} of {S} columns"
        )
    seen: dict[str, Any] = {"key_value_seq_lengths": jnp.minimum(visible, S)}
    if visible.ndim == 3:
        seen = {"mask": by_query(visible, S)[:, None]}
    try:
        return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, implementation="cudnn", **seen)
    except RuntimeError as error:
        raise NotImplementedError("cuDNN is not installed") from error


def prefer(q_BTHK: jax.Array, *_: object) -> None:
    """NotImplementedError where there are too few tiles for all processors."""
    B, T, H = q_BTHK.shape[:3]
    if B * H * -(-T // QUERIES) < PROCESSORS:
        raise NotImplementedError("too little work to go round")
