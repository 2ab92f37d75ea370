"""The experts of a layer behind one call, each token by those that were picked for it.

Letters besides those of model.py: T tokens of all rows, P picks of a token, M expert mlp.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def dense(
    x_TD: jax.Array,
    gate_up_EDCM: jax.Array,
    down_EMD: jax.Array,
    picks_TP: jax.Array,
    weights_TP: jax.Array,
) -> jax.Array:
    """The reference: every expert for every token, times its weight, which mostly is 0."""
    kind, E = x_TD.dtype, gate_up_EDCM.shape[0]
    weights_TE = jnp.einsum("TPE,TP->TE", jax.nn.one_hot(picks_TP, E), weights_TP)
    gate_up = jnp.einsum("TD,EDCM->CTEM", x_TD, gate_up_EDCM.astype(kind))
    hidden_TEM = jax.nn.silu(gate_up[0]) * gate_up[1] * weights_TE[:, :, None].astype(kind)
    return jnp.einsum("TEM,EMD->TD", hidden_TEM, down_EMD.astype(kind))


def ragged(
    x_TD: jax.Array,
    gate_up_EDCM: jax.Array,
    down_EMD: jax.Array,
    picks_TP: jax.Array,
    weights_TP: jax.Array,
) -> jax.Array:
    """Tokens sorted by expert, so that each expert multiplies only its own.

    What XLA makes of a ragged product depends on the device; on a CPU it is a masked dense one.
    The sum over a token's experts runs in the order of its picks, whoever its batch mates are.
    """
    (T, P), (E, D, _, M), kind = picks_TP.shape, gate_up_EDCM.shape, x_TD.dtype
    here_TP = (picks_TP >= 0) & (picks_TP < E)
    picks = jnp.where(here_TP, picks_TP, E).reshape(-1)  # of no expert: sorted to the end
    order = jnp.argsort(picks, stable=True)
    sizes_E = jnp.bincount(picks, length=E)
    gate_up = jax.lax.ragged_dot(
        x_TD[order // P], gate_up_EDCM.reshape(E, D, 2 * M).astype(kind), sizes_E
    )
    hidden = jax.nn.silu(gate_up[:, :M]) * gate_up[:, M:]
    sorted_by_expert = jax.lax.ragged_dot(hidden, down_EMD.astype(kind), sizes_E)
    mixed_TPD = sorted_by_expert[jnp.argsort(order)].reshape(T, P, D)
    mixed_TPD = jnp.where(here_TP[..., None], mixed_TPD, 0)
    return jnp.einsum("TPD,TP->TD", mixed_TPD, weights_TP.astype(kind))


# Until they have been compared on GPUs, ragged serves by name only.
IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"dense": dense, "ragged": ragged}


def experts(
    x_TD: jax.Array,
    gate_up_EDCM: jax.Array,
    down_EMD: jax.Array,
    picks_TP: jax.Array,
    weights_TP: jax.Array,
    implementation: str = "dense",
) -> jax.Array:
    """Sum over a token's picks of weight * down(silu(gate x) * up x).

    `picks_TP` are int32 experts, `weights_TP` float32; the result is [T, D] in the dtype of x.
    Picks outside 0 to E - 1 add nothing: those experts are on other devices.
    Raises ValueError for a name that is not in IMPLEMENTATIONS.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation](x_TD, gate_up_EDCM, down_EMD, picks_TP, weights_TP)
