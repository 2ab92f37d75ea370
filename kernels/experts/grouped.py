"""The experts of a layer, each for its own tokens only, by Triton kernels; serves 16-bit numbers,
and weights in 8 bits, which are widened in registers.

Only the weights of experts that somebody picked are read: what a step of few tokens costs.
Training takes the kernels of grouped_grad.py, forwards and backwards.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdllm.kernels import triton_call as triton
from jdllm.kernels.experts import dense, grouped_grad
from jdllm.kernels.quantised import Quantised, quantise, taken_apart
from jdllm.kernels.triton_call import Tiles

WIDTH = 128  # what the widths of tokens and experts must be multiples of


# Up to so many pairs per expert: tiles of gate_up and of down. Measured on an H100 with LLaDA2's
# 256 experts of 2048 x 512.
TILES: tuple[tuple[float, Tiles, Tiles], ...] = (
    (4, Tiles(16, 128, 64, 4, 3), Tiles(16, 128, 64, 4, 4)),
    (8, Tiles(32, 128, 64, 4, 3), Tiles(32, 128, 64, 4, 4)),
    (float("inf"), Tiles(64, 128, 64, 4, 3), Tiles(64, 128, 64, 4, 4)),
)
# The same of weights in 8 bits, measured up to 4 pairs.
NARROW: tuple[tuple[float, Tiles, Tiles], ...] = (
    (4, Tiles(16, 64, 128, 4, 4), Tiles(16, 64, 128, 4, 4)),
    (8, Tiles(32, 64, 128, 4, 4), Tiles(32, 128, 128, 4, 4)),
    (float("inf"), Tiles(64, 64, 128, 4, 3), Tiles(64, 128, 128, 4, 3)),
)


def experts(
    x_TD: jax.Array,
    gate_up_EDCM: jax.Array | Quantised,
    down_EMD: jax.Array | Quantised,
    picks_TP: jax.Array,
    weights_TP: jax.Array,
) -> jax.Array:
    """The mixed outputs [T, D], as the dense reference defines them.

    Products are summed in float32 and rounded once between gate-up and down; the sum over a token's
    experts is float32, in the order of its picks. A token's numbers do not depend on its batch
    mates where their number does not change the tiles.
    """
    triton.require()
    kind, widths = x_TD.dtype, down_EMD.shape[1:]
    narrow = [w.dtype for w in (gate_up_EDCM, down_EMD) if isinstance(w, Quantised)]
    if any(dtype != jnp.int8 for dtype in narrow):
        triton.require_fp8()
    check_kinds(widths, kind, *([kind] if narrow else [gate_up_EDCM.dtype, down_EMD.dtype]))
    check()
    if isinstance(gate_up_EDCM, Quantised):
        check_narrow()
    ready = (
        weight if isinstance(weight, Quantised) else weight.astype(kind)
        for weight in (gate_up_EDCM, down_EMD)
    )
    return _grouped(x_TD, *ready, picks_TP, weights_TP)


def check_kinds(widths: Sequence[int], *dtypes: Any) -> None:
    """NotImplementedError, with the reason, for numbers or widths that the kernels do not serve."""
    for name, dtype in zip(("tokens", "weights", "weights"), dtypes, strict=False):
        if dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"it serves 16-bit {name}, not {dtype}")
    if any(width % WIDTH for width in widths):
        one, two = widths
        raise NotImplementedError(f"it serves widths in multiples of {WIDTH}, not {two} and {one}")


def check() -> None:
    """NotImplementedError, with the reason, where the kernels cannot run or compute wrongly."""
    triton.require()
    triton.canary("experts", _grouped, dense.experts, *_small())


def check_training() -> None:
    """NotImplementedError where the kernels of the gradient cannot run or compute wrongly."""
    triton.require()
    for number, name in SLOPES.items():
        pair = slope(_grouped, number), slope(dense.experts, number)
        triton.canary(f"experts, gradient of {name}", *pair, *_small())


SLOPES = {0: "tokens", 1: "gate-up", 2: "down", 4: "factors"}
"""What has a gradient, by its number among the arguments."""


def slope(experts: Callable[..., jax.Array], number: int) -> Callable[..., jax.Array]:
    """The gradient, by one argument, of the sum of squared outputs."""

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(experts(*arrays).astype(jnp.float32)))

    return jax.grad(loss, number)


def check_narrow() -> None:
    """The same of weights in 8 bits, with each of their tiles."""
    triton.require()
    x, gate_up, down, picks, weights = _small()
    with jax.ensure_compile_time_eval():
        small = quantise(gate_up, (1,)), quantise(down, (1,))
        for count in range(1, picks.shape[1] + 1):  # 3, 6 and 9 pairs per expert
            pairs = picks[:, :count], weights[:, :count]
            name = f"experts in 8 bits, {count}"
            triton.canary(name, _grouped, dense.experts, x, *small, *pairs)


@jax.custom_vjp
def _grouped(
    x_TD: jax.Array,
    gate_up_EDCM: jax.Array | Quantised,
    down_EMD: jax.Array | Quantised,
    picks_TP: jax.Array,
    weights_TP: jax.Array,
) -> jax.Array:
    from jdllm.kernels.experts import grouped_triton as kernels

    (T, P), (E, M, D), kind = picks_TP.shape, down_EMD.shape, x_TD.dtype
    N, array = T * P, jax.ShapeDtypeStruct
    order_N, starts = triton.call(
        kernels.sort,
        picks_TP.reshape(-1),
        out=(array((N,), jnp.int32), array((E + 1,), jnp.int32)),
        grid=(E,),
        warps=4,
        stages=1,
        N=N,
        E=E,
        CHUNK=min(triton.power_of_2(N), 1024),
    )
    scaled = isinstance(gate_up_EDCM, Quantised)
    _, first, second = next(row for row in (NARROW if scaled else TILES) if row[0] * E >= N)
    hidden_NM = triton.call(
        kernels.gate_up, x_TD, *taken_apart(gate_up_EDCM), order_N, starts, out=array((N, M), kind),
        grid=(E, M // first.columns), warps=first.warps, stages=first.stages,
        D=D, M=M, P=P, BM=first.rows, BN=first.columns, BK=first.inner, SCALED=int(scaled),
    )  # fmt: skip
    each_ND = triton.call(
        kernels.down, hidden_NM, *taken_apart(down_EMD), order_N, starts,
        out=array((N, D), jnp.float32),
        grid=(E, D // second.columns), warps=second.warps, stages=second.stages,
        D=D, M=M, BM=second.rows, BN=second.columns, BK=second.inner, SCALED=int(scaled),
    )  # fmt: skip
    here_TP = (picks_TP >= 0) & (picks_TP < E)  # nobody has written the rows of other picks
    each_TPD = jnp.where(here_TP[..., None], each_ND.reshape(T, P, D), 0)
    return jnp.sum(each_TPD * weights_TP[..., None], axis=1).astype(kind)


def _forward(
    x_TD: jax.Array, gate_up_EDCM: Any, down_EMD: Any, picks_TP: jax.Array, weights_TP: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
    """What differentiation runs: of many tokens at once, whose gate-up is kept."""
    arrays = (x_TD, gate_up_EDCM, down_EMD, picks_TP, weights_TP)
    if isinstance(gate_up_EDCM, Quantised):
        return _grouped(*arrays), (arrays, None)
    found, kept = grouped_grad.forward(grouped_grad.TRITON, *arrays)
    return found, (arrays, kept)


def _backward(saved: tuple[Any, ...], change_TD: jax.Array) -> tuple[Any, ...]:
    arrays, kept = saved
    x, gate_up, down, picks, weights = arrays
    if isinstance(gate_up, Quantised):  # frozen; the gradient is the dense reference's
        _, pull = jax.vjp(lambda x, w: dense.experts(x, gate_up, down, picks, w), x, weights)
        dx, dweights = pull(change_TD)
        return dx, None, None, None, dweights
    return grouped_grad.backward(grouped_grad.TRITON, arrays, kept, change_TD)


_grouped.defvjp(_forward, _backward)


@functools.cache
def _small() -> tuple[jax.Array, ...]:
    """Inputs of the canary: 24 tokens with 3 picks of 8 experts, one of them elsewhere."""
    T, E, D, M = 24, 8, 256, 128
    rng = np.random.default_rng(3)
    order, factors = np.argsort(rng.random((T, E + 1)), axis=1), rng.random((T, 3), np.float32)
    with jax.ensure_compile_time_eval():
        picks, weights = jnp.asarray(order[:, :3], jnp.int32), jnp.asarray(factors)
    gate_up, down = triton.normal(1, (E, D, 2, M), D**-0.5), triton.normal(2, (E, M, D), M**-0.5)
    return triton.normal(0, (T, D)), gate_up, down, picks, weights
