"""The inner numbers of a SwiGLU feed-forward, in plain jnp."""

import jax
import jax.numpy as jnp


def gated(x_BTD: jax.Array, gate_up_DCF: jax.Array) -> jax.Array:
    """silu(gate x) * up x: [B, T, F] in the dtype of x; gate and up are one weight [D, 2, F]."""
    # The halves stand beside each other, as the product makes them: in training what goes back is
    # summed over both at once, and would have to be turned round otherwise.
    gate_up = jnp.einsum("BTD,DCF->BTCF", x_BTD, gate_up_DCF.astype(x_BTD.dtype))
    return jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
