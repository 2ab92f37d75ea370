"""The inner numbers of a SwiGLU feed-forward, in plain jnp."""

import jax
import jax.numpy as jnp


def gated(x_BTD: jax.Array, gate_up_DCF: jax.Array) -> jax.Array:
    """silu(gate x) * up x: [B, T, F] in the dtype of x; gate and up are one weight [D, 2, F]."""
    gate_up = jnp.einsum("BTD,DCF->CBTF", x_BTD, gate_up_DCF.astype(x_BTD.dtype))
    return jax.nn.silu(gate_up[0]) * gate_up[1]
