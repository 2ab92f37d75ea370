"""jax.nn's own attention, which XLA may fuse; serves GPUs."""

import jax

from jdllm.kernels.attention.reference import by_query


def attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible: jax.Array
) -> jax.Array:
    """Attention as the reference defines it."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("without a GPU it is no faster than the reference")
    mask = by_query(visible, k_BSGK.shape[1])[:, None]
    return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, mask=mask, implementation="xla")
