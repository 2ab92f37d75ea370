"""The experts of a layer, each for its own tokens only, which are sorted by expert."""

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
    """The mixed outputs [T, D], as the dense reference defines them.

    What XLA makes of a ragged product depends on the device; on a CPU it is a masked dense one.
    The sum over a token's experts runs in the order of its picks, whoever its batch mates are.
    """
    (T, P), (E, D, _, M), kind = picks_TP.shape, gate_up_EDCM.shape, x_TD.dtype
    here_TP = (picks_TP >= 0) & (picks_TP < E)
    picks = jnp.where(here_TP, picks_TP, E).reshape(-1)  # of no expert: sorted to the end
    order = jnp.argsort(picks, stable=True)
    sizes_E = jnp.bincount(picks, length=E)
    gate_up = jax.lax.ragged_dot(
        x_TD[order // P], wide(gate_up_EDCM, kind).reshape(E, D, 2 * M), sizes_E
    )
    hidden = jax.nn.silu(gate_up[:, :M]) * gate_up[:, M:]
    sorted_by_expert = jax.lax.ragged_dot(hidden, wide(down_EMD, kind), sizes_E)
    mixed_TPD = sorted_by_expert[jnp.argsort(order)].reshape(T, P, D)
    mixed_TPD = jnp.where(here_TP[..., None], mixed_TPD, 0)
    return jnp.einsum("TPD,TP->TD", mixed_TPD, weights_TP.astype(kind))
