"""The product with an 8-bit weight as XLA makes it: the reference, which serves every case."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdllm.kernels.quantised import Quantised

Times = Callable[[jax.Array, jax.Array | Quantised], jax.Array]
"""How inputs [B, T, D] meet a weight [D, ...] in 8 bits or in more; `times` is the plain one."""


def product(x_MK: jax.Array, values_NK: jax.Array, scale_N: jax.Array) -> jax.Array:
    """x times the transposed values, then scaled in float32: [M, N] in the dtype of x."""
    # Tied to x, so that no loop of XLA's widens all weights beforehand.
    x_MK, values_NK = jax.lax.optimization_barrier((x_MK, values_NK))
    found_MN = jnp.einsum("MK,NK->MN", x_MK, values_NK.astype(x_MK.dtype))
    return (found_MN.astype(jnp.float32) * scale_N).astype(x_MK.dtype)


def times(x_BTD: jax.Array, weight: jax.Array | Quantised) -> jax.Array:
    """The product [B, T, ...] with a weight [D, ...] in 8 bits or in more, in the dtype of x."""
    if not isinstance(weight, Quantised):
        return jnp.einsum("BTD,D...->BT...", x_BTD, weight.astype(x_BTD.dtype))
    flat, (B, T, D) = weight.matrix(), x_BTD.shape
    found = product(x_BTD.reshape(B * T, D), flat.values, flat.scale)
    return found.reshape(B, T, *weight.scale.shape)
