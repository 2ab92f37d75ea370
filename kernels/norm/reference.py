"""Root-mean-square norm, alone and behind a residual sum, in plain jnp."""

import jax
import jax.numpy as jnp


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm: float32 statistics, cast back, then the scale (LLaDA's order)."""
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x.astype(x_BTD.dtype) * scale_D.astype(x_BTD.dtype)


def add_norm(
    x_BTD: jax.Array, branch_BTD: jax.Array, scale_D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The residual stream with a branch added to it, rounded, and the norm of that."""
    total_BTD = x_BTD + branch_BTD
    return total_BTD, rms_norm(total_BTD, scale_D, eps)
