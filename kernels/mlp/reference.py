"""The inner numbers of a SwiGLU feed-forward, in plain jnp."""

import jax

from jdllm.kernels.product import reference as plain
from jdllm.kernels.product.reference import Times
from jdllm.kernels.quantised import Quantised


def gated(
    x_BTD: jax.Array, gate_up_DCF: jax.Array | Quantised, times: Times = plain.times
) -> jax.Array:
    """silu(gate x) * up x: [B, T, F] in the dtype of x; gate and up are one weight [D, 2, F].

    `times` makes the product.
    """
    # The halves stand beside each other, as the product makes them: in training what goes back is
    # summed over both at once, and would have to be turned round otherwise.
    gate_up = times(x_BTD, gate_up_DCF)
    return jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
