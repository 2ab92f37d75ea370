"""The product with an 8-bit weight as XLA makes it: the reference, which serves every case."""

import jax
import jax.numpy as jnp


def product(x_MK: jax.Array, values_NK: jax.Array, scale_N: jax.Array) -> jax.Array:
    """x times the transposed values, then scaled in float32: [M, N] in the dtype of x."""
    # Tied to x, so that no loop of XLA's widens all weights beforehand.
    x_MK, values_NK = jax.lax.optimization_barrier((x_MK, values_NK))
    found_MN = jnp.einsum("MK,NK->MN", x_MK, values_NK.astype(x_MK.dtype))
    return (found_MN.astype(jnp.float32) * scale_N).astype(x_MK.dtype)
