"""cuDNN's flash attention; serves 16-bit numbers on GPUs, where rows see their first keys.

It reads keys as the cache holds them. XLA's batched products, left alone with a batch of rows, turn
the whole cache round, and then write its columns one number at a time. But it gives each head's
QUERIES to one processor: too few of those leave the card idle.
"""

import jax
import jax.numpy as jnp

QUERIES = 64  # of a tile of the kernel
PROCESSORS = 128  # about as many as a data centre's GPU has


def attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """Attention as the reference defines it, of the first `lengths_B` keys of each row."""
    B, T, H, _ = q_BTHK.shape
    if jax.default_backend() != "gpu":
        raise NotImplementedError("it needs a GPU")
    if q_BTHK.dtype.itemsize != 2:
        raise NotImplementedError(f"it serves 16-bit numbers, not {q_BTHK.dtype}")
    if lengths_B.ndim != 1:
        raise NotImplementedError("it serves rows that see their first keys, not other masks")
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
