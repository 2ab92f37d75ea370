"""Gate, up and their product in one Triton kernel, for the block step of one row."""

import jax

from jdllm.kernels import triton_call as triton
from jdllm.kernels.mlp import reference
from jdllm.kernels.product.reference import Times
from jdllm.kernels.quantised import Quantised, cast, quantise, taken_apart
from jdllm.kernels.triton_call import Tiles

WIDTH = 128  # what widths must be multiples of


# Up to so many rows: for 32 the best of experiments/layer_tiles.py at LLaDA-8B's widths.
TILES: tuple[tuple[float, Tiles], ...] = (
    (32, Tiles(32, 64, 32, 4, 6)),
    (float("inf"), Tiles(64, 64, 64, 4, 4)),
)
# The same of weights in 8 bits: as in the product of few rows (experiments/narrow_tiles.py).
NARROW: tuple[tuple[float, Tiles], ...] = (
    (32, Tiles(32, 64, 128, 4, 4)),
    (float("inf"), Tiles(64, 64, 128, 4, 3)),
)
ROWS = 32  # up to which it is measured to pay
# A layer's columns make so many tiles, or XLA's kernels are as quick: one to two for each of a
# Hopper's 132 processors. LLaDA-8B's 192 are measured to pay; a shared expert's 8 would leave most
# idle.
FEWEST, MOST = 128, 264


def gated(
    x_BTD: jax.Array,
    gate_up_DCF: jax.Array | Quantised,
    times: Times | None = None,
) -> jax.Array:
    """The inner numbers as the reference defines them, rounded once. The gradient is its own."""
    del times
    triton.require()
    triton.require_kinds(x_BTD, gate_up_DCF)
    D, F = x_BTD.shape[2], gate_up_DCF.shape[2]
    if D % WIDTH or F % WIDTH:
        raise NotImplementedError(f"it serves widths in multiples of {WIDTH}, not {D} and {F}")
    check()
    if isinstance(gate_up_DCF, Quantised):
        check_narrow()
    return _fused(x_BTD, cast(gate_up_DCF, x_BTD.dtype))


def prefer(x_BTD: jax.Array, gate_up_DCF: jax.Array | Quantised) -> None:
    """NotImplementedError, with the reason, where XLA's product is as quick."""
    triton.require()
    if isinstance(gate_up_DCF, Quantised):
        raise NotImplementedError("with weights in 8 bits it is not measured")
    (B, T, _), F = x_BTD.shape, gate_up_DCF.shape[2]
    if ROWS < B * T:
        raise NotImplementedError(f"{B * T} rows are more than {ROWS}")
    if not FEWEST <= (found := F // tiles_of(B * T).columns) <= MOST:
        raise NotImplementedError(f"{found} tiles of columns are not {FEWEST} to {MOST}")


def tiles_of(rows: int, narrow: bool = False) -> Tiles:
    """The tiles for so many rows, and weights in 8 bits or in 16."""
    return next(tiles for most, tiles in (NARROW if narrow else TILES) if most >= rows)


def check() -> None:
    """NotImplementedError, with the reason, where the kernel cannot run or computes wrongly."""
    triton.require()
    x, weight = triton.normal(0, (1, 24, 256)), triton.normal(1, (256, 2, 128), 256**-0.5)
    triton.canary("mlp", _fused, reference.gated, x, weight)


def check_narrow() -> None:
    """The same of weights in 8 bits."""
    triton.require()
    x, weight = triton.normal(0, (1, 24, 256)), triton.normal(1, (256, 2, 128), 256**-0.5)
    with jax.ensure_compile_time_eval():
        small = quantise(weight, (0,))
    triton.canary("mlp in 8 bits", _fused, reference.gated, x, small)


@jax.custom_vjp
def _fused(x_BTD: jax.Array, gate_up_DCF: jax.Array | Quantised) -> jax.Array:
    from jdllm.kernels.mlp import fused_triton as kernels

    (B, T, D), F, narrow = x_BTD.shape, gate_up_DCF.shape[2], isinstance(gate_up_DCF, Quantised)
    tiles, out = tiles_of(B * T, narrow), jax.ShapeDtypeStruct((B, T, F), x_BTD.dtype)
    return triton.call(
        kernels.gated, x_BTD, *taken_apart(gate_up_DCF), out=out,
        grid=(-(-B * T // tiles.rows), F // tiles.columns), warps=tiles.warps, stages=tiles.stages,
        R=B * T, D=D, F=F, BM=tiles.rows, BN=tiles.columns, BK=tiles.inner, SCALED=int(narrow),
    )  # fmt: skip


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _fused(x, weight), (x, weight)


def _backward(arrays: tuple[jax.Array, jax.Array], change: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(reference.gated, *arrays)[1](change)


_fused.defvjp(_forward, _backward)
