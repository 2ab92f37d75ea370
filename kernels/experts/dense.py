"""The experts of a layer, each for every token: the reference, and the default.

Letters besides those of model.py: T tokens of all rows, P picks of a token, M expert mlp.
"""

import jax
import jax.numpy as jnp

from jdllm.kernels.quantised import Quantised, wide


def experts(
    x_TD: jax.Array,
    gate_up_EDCM: jax.Array | Quantised,
    down_EMD: jax.Array | Quantised,
    picks_TP: jax.Array,
    weights_TP: jax.Array,
) -> jax.Array:
    """Sum over a token's picks of weight * down(silu(gate x) * up x): [T, D] in the dtype of x.

    `picks_TP` are int32 experts, `weights_TP` float32; a weight mostly is 0. Picks outside 0 to
    E - 1 add nothing: those experts are on other devices.
    """
    kind, E = x_TD.dtype, gate_up_EDCM.shape[0]
    weights_TE = jnp.einsum("TPE,TP->TE", jax.nn.one_hot(picks_TP, E), weights_TP)
    gate_up = jnp.einsum("TD,EDCM->CTEM", x_TD, wide(gate_up_EDCM, kind))
    hidden_TEM = jax.nn.silu(gate_up[0]) * gate_up[1] * weights_TE[:, :, None].astype(kind)
    return jnp.einsum("TEM,EMD->TD", hidden_TEM, wide(down_EMD, kind))
