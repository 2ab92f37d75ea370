"""The experts of a layer in training, each for its own tokens only: the value, and all gradients.

All of it is made of two products over pairs of a token and one of its picks, which lie sorted by
expert: `times` multiplies the rows of an expert with its weights, `outer` sums the outer products
of its rows. `PLAIN` are these two in jnp; Triton's stand in grouped_triton_grad.py. Letters besides
those of dense.py: N pairs, F both halves of gate-up, K and J the widths of a product.

With frozen weights nobody asks for their gradients, and XLA leaves `outer` out.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.triton_call import Tiles


class Pairs(NamedTuple):
    """Pairs of a token and a pick, sorted by expert; those of no expert here come last."""

    order_N: jax.Array
    """Which pair stands in each sorted row: token * P + pick."""
    token_N: jax.Array
    """Its token."""
    counts_E: jax.Array
    """How many pairs an expert has."""
    starts: jax.Array
    """[E + 1]: where the rows of an expert begin."""

    @property
    def here_N(self) -> jax.Array:
        """Which sorted rows belong to an expert."""
        return jnp.arange(self.order_N.size) < self.starts[-1]


class Products(NamedTuple):
    """The two products."""

    times: Callable[..., jax.Array]
    """(rows, weights_EKJ, pairs, tokens=, turned=, scatter=): [N, J]; [N, K] where `turned`.

    Rows are sorted, or by token where `tokens` says so; the results are sorted, or by pair where
    `scatter` says so. Rows of no expert may be anything.
    """
    outer: Callable[..., jax.Array]
    """(left, right, pairs, tokens=): [E, K, J] in their dtype; the side `tokens` is by token."""


def sort(picks_TP: jax.Array, experts: int) -> Pairs:
    """The pairs by expert, in their order."""
    here_TP = (picks_TP >= 0) & (picks_TP < experts)
    picks_N = jnp.where(here_TP, picks_TP, experts).reshape(-1)
    order_N = jnp.argsort(picks_N, stable=True).astype(jnp.int32)
    counts_E = jnp.sum(picks_N[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    starts = jnp.pad(jnp.cumsum(counts_E), (1, 0))
    return Pairs(order_N, order_N // picks_TP.shape[1], counts_E, starts)


def mixed(each_ND: jax.Array, picks_TP: jax.Array, experts: int, weights_TP: jax.Array | None):
    """The float32 sum over a token's picks [T, D] of what its pairs gave, in their order."""
    each_TPD = each_ND.reshape(*picks_TP.shape, -1)
    here_TP = (picks_TP >= 0) & (picks_TP < experts)  # nobody has written the rows of other picks
    each_TPD = jnp.where(here_TP[..., None], each_TPD.astype(jnp.float32), 0)
    return jnp.sum(each_TPD if weights_TP is None else each_TPD * weights_TP[..., None], axis=1)


def forward(
    products: Products,
    x_TD: jax.Array,
    gate_up_EDCM: jax.Array,
    down_EMD: jax.Array,
    picks_TP: jax.Array,
    weights_TP: jax.Array,
) -> tuple[jax.Array, tuple[Pairs, jax.Array]]:
    """The mixed outputs [T, D] as dense.py defines them, and what `backward` wants to keep."""
    (E, M, D), kind = down_EMD.shape, x_TD.dtype
    pairs = sort(picks_TP, E)
    gate_up_EDF = gate_up_EDCM.reshape(E, D, 2 * M)
    both_NF = products.times(x_TD, gate_up_EDF, pairs, tokens=True)
    hidden_NM = jax.nn.silu(both_NF[:, :M]) * both_NF[:, M:]
    each_ND = products.times(hidden_NM, down_EMD, pairs, scatter=True)
    return mixed(each_ND, picks_TP, E, weights_TP).astype(kind), (pairs, both_NF)


def backward(
    products: Products, arrays: tuple[jax.Array, ...], kept: tuple[Pairs, jax.Array], change_TD
) -> tuple[jax.Array | None, ...]:
    """What a change of the outputs means for the tokens, both weights, no picks, and the factors.

    A factor's share is that of a pair's output, <hidden down, change> = <hidden, change down'>: so
    the outputs of pairs need not be kept.
    """
    x_TD, gate_up_EDCM, down_EMD, picks_TP, weights_TP = arrays
    (pairs, both_NF), (E, M, D) = kept, down_EMD.shape
    gate_up_EDF = gate_up_EDCM.reshape(E, D, 2 * M)
    back_NM = products.times(change_TD, down_EMD, pairs, tokens=True, turned=True)
    gate, up, back = (x.astype(jnp.float32) for x in (both_NF[:, :M], both_NF[:, M:], back_NM))
    factor_N1 = weights_TP.reshape(-1)[pairs.order_N][:, None]
    slope, sigmoid = back * factor_N1, jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    dgate = slope * up * (sigmoid + silu * (1 - sigmoid))
    dboth_NF = jnp.concatenate([dgate, slope * silu], axis=-1).astype(both_NF.dtype)
    each_ND = products.times(dboth_NF, gate_up_EDF, pairs, turned=True, scatter=True)
    dfactor_N = jnp.where(pairs.here_N, jnp.sum(silu * up * back, axis=-1), 0)
    dweights = jnp.zeros_like(dfactor_N).at[pairs.order_N].set(dfactor_N)
    weighted_NM = (silu * up * factor_N1).astype(both_NF.dtype)
    dgate_up = products.outer(x_TD, dboth_NF, pairs, tokens="left")
    ddown = products.outer(weighted_NM, change_TD, pairs, tokens="right")
    return (
        mixed(each_ND, picks_TP, E, None).astype(x_TD.dtype),
        dgate_up.reshape(gate_up_EDCM.shape).astype(gate_up_EDCM.dtype),
        ddown.astype(down_EMD.dtype),
        None,
        dweights.reshape(weights_TP.shape).astype(weights_TP.dtype),
    )


def _times(
    rows: jax.Array,
    weights_EKJ: jax.Array,
    pairs: Pairs,
    tokens: bool = False,
    turned: bool = False,
    scatter: bool = False,
) -> jax.Array:
    rows_NK = rows[pairs.token_N] if tokens else rows
    weights = jnp.swapaxes(weights_EKJ, 1, 2) if turned else weights_EKJ
    found_NJ = jax.lax.ragged_dot(rows_NK, weights, pairs.counts_E)
    return jnp.zeros_like(found_NJ).at[pairs.order_N].set(found_NJ) if scatter else found_NJ


def _outer(left: jax.Array, right: jax.Array, pairs: Pairs, tokens: str) -> jax.Array:
    left, right = (
        x[pairs.token_N] if side == tokens else x for side, x in (("left", left), ("right", right))
    )
    experts = pairs.counts_E.size
    number_N = jnp.searchsorted(pairs.starts, jnp.arange(len(left)), side="right") - 1
    own_NE = jax.nn.one_hot(number_N, experts, dtype=left.dtype) * pairs.here_N[:, None]
    return jnp.einsum("NE,NK,NJ->EKJ", own_NE, left, right)


PLAIN = Products(_times, _outer)


# Triton's


class Work(NamedTuple):
    """Tiles of sorted rows, each of one expert; as many as there could be."""

    expert: jax.Array
    first: jax.Array
    """Its first row; the number of all rows where there is no such tile."""


def work(pairs: Pairs, rows: int) -> Work:
    """Cuts the rows of every expert into tiles of `rows`."""
    experts, pairs_N = pairs.counts_E.size, pairs.order_N.size
    tiles_E = -(-pairs.counts_E // rows)
    ends_E = jnp.cumsum(tiles_E)
    number = jnp.arange(pairs_N // rows + min(experts, pairs_N), dtype=jnp.int32)
    # Compared with all of them: a search would be a loop of small kernels.
    expert = jnp.sum(number[:, None] >= ends_E, axis=1, dtype=jnp.int32)
    there, expert = expert < experts, jnp.minimum(expert, experts - 1)
    first = pairs.starts[expert] + (number - ends_E[expert] + tiles_E[expert]) * rows
    return Work(expert, jnp.where(there, first, pairs_N).astype(jnp.int32))


# Of products with the weights as they lie, with turned ones, and of outer products.
STRAIGHT = Tiles(64, 128, 64, 4, 3)
TURNED = Tiles(64, 128, 64, 4, 3)
OUTER = Tiles(128, 128, 32, 8, 3)


def _triton_times(
    rows: jax.Array,
    weights_EKJ: jax.Array,
    pairs: Pairs,
    tokens: bool = False,
    turned: bool = False,
    scatter: bool = False,
) -> jax.Array:
    from jdllm.kernels.experts import grouped_grad_triton as kernels

    _, one, two = weights_EKJ.shape
    K, J, tiles = (two, one, TURNED) if turned else (one, two, STRAIGHT)
    plan = work(pairs, tiles.rows)
    return triton.call(
        kernels.times, rows, weights_EKJ, pairs.order_N, pairs.token_N, *plan, pairs.starts,
        out=jax.ShapeDtypeStruct((pairs.order_N.size, J), rows.dtype),
        grid=(J // tiles.columns, plan.first.size), warps=tiles.warps, stages=tiles.stages,
        K=K, J=J, TO_K=1 if turned else J, TO_J=K if turned else 1,
        TOKENS=tokens, SCATTER=scatter, BM=tiles.rows, BN=tiles.columns, BK=tiles.inner,
    )  # fmt: skip


def _triton_outer(left: jax.Array, right: jax.Array, pairs: Pairs, tokens: str) -> jax.Array:
    from jdllm.kernels.experts import grouped_grad_triton as kernels

    E, K, J, tiles = pairs.counts_E.size, left.shape[1], right.shape[1], OUTER
    return triton.call(
        kernels.outer, left, right, pairs.token_N, pairs.starts,
        out=jax.ShapeDtypeStruct((E, K, J), left.dtype),
        grid=(K // tiles.rows, J // tiles.columns, E), warps=tiles.warps, stages=tiles.stages,
        K=K, J=J, LEFT=tokens == "left", RIGHT=tokens == "right",
        BM=tiles.rows, BN=tiles.columns, BK=tiles.inner,
    )  # fmt: skip


TRITON = Products(_triton_times, _triton_outer)
