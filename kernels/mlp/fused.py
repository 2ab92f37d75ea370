"""Gate, up and their product in one Triton kernel, for the few rows of a block step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.mlp import reference

WIDTH = 128  # what widths must be multiples of


class Tiles(NamedTuple):
    """Sizes of a kernel's work: rows, columns, inner numbers at a time; warps, loads in flight."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# Up to so many rows; beyond them products bind, and XLA's are better at those.
TILES: tuple[tuple[int, Tiles], ...] = (
    (16, Tiles(16, 64, 64, 4, 4)),
    (32, Tiles(32, 64, 32, 4, 6)),
    (64, Tiles(64, 64, 64, 4, 4)),
)
MOST = max(row[0] for row in TILES)


def gated(x_BTD: jax.Array, gate_up_DCF: jax.Array) -> jax.Array:
    """The inner numbers as the reference defines them, rounded once. The gradient is its own."""
    triton.require()
    for array in (x_BTD, gate_up_DCF):
        if array.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"it serves 16-bit numbers, not {array.dtype}")
    (B, T, D), F = x_BTD.shape, gate_up_DCF.shape[2]
    if D % WIDTH or F % WIDTH:
        raise NotImplementedError(f"it serves widths in multiples of {WIDTH}, not {D} and {F}")
    if B * T > MOST:
        raise NotImplementedError(f"{B * T} rows are more than {MOST}")
    check()
    return _fused(x_BTD, gate_up_DCF.astype(x_BTD.dtype))


def check() -> None:
    """NotImplementedError, with the reason, where the kernel cannot run or computes wrongly."""
    triton.require()
    x, weight = triton.normal(0, (1, 24, 256)), triton.normal(1, (256, 2, 128), 256**-0.5)
    triton.canary("mlp", _fused, reference.gated, x, weight)


@jax.custom_vjp
def _fused(x_BTD: jax.Array, gate_up_DCF: jax.Array) -> jax.Array:
    from jdllm.kernels.mlp import fused_triton as kernels

    (B, T, D), F = x_BTD.shape, gate_up_DCF.shape[2]
    tiles = next(tiles for most, tiles in TILES if most >= B * T)
    return triton.call(
        kernels.gated, x_BTD, gate_up_DCF, out=jax.ShapeDtypeStruct((B, T, F), x_BTD.dtype),
        grid=(-(-B * T // tiles.rows), F // tiles.columns), warps=tiles.warps, stages=tiles.stages,
        R=B * T, D=D, F=F, BM=tiles.rows, BN=tiles.columns, BK=tiles.inner,
    )  # fmt: skip


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _fused(x, weight), (x, weight)


def _backward(arrays: tuple[jax.Array, jax.Array], change: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(reference.gated, *arrays)[1](change)


_fused.defvjp(_forward, _backward)
