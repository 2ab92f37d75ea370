"""The product with an 8-bit weight, widened in registers by a Triton kernel; for few rows.

A step of few tokens costs what reading the weights costs. The inner axis is split over programs,
so that small products, too, keep all processors reading.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.product import reference


class Tiles(NamedTuple):
    """Sizes of a kernel's work: rows, columns, inner numbers at a time; warps, loads in flight."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    turned: bool
    """Whether the weight is the left operand."""
    split: int
    """Parts of the inner axis, each a program's."""


# Up to so many rows: the best of experiments/narrow_tiles.py on LLaDA-8B's products (H200). At 256
# rows XLA's own products were quicker.
TILES: tuple[tuple[float, Tiles], ...] = (
    (32, Tiles(32, 128, 128, 4, 4, False, 1)),
    (float("inf"), Tiles(128, 128, 64, 4, 4, False, 1)),
)
SPLITS = (1, 2, 3, 4, 6, 8)
PROGRAMS = 250  # at least so many, where the inner axis can be split for it: two per processor


def product(x_MK: jax.Array, values_NK: jax.Array, scale_N: jax.Array) -> jax.Array:
    """x times the transposed values, scaled: [M, N] in the dtype of x, as the reference says.

    Sums are float32, rounded once. A row's numbers do not depend on the others where their number
    does not change the tiles.
    """
    triton.require()
    if x_MK.dtype != jnp.bfloat16 and x_MK.dtype != jnp.float16:
        raise NotImplementedError(f"it serves 16-bit numbers, not {x_MK.dtype}")
    if values_NK.dtype != jnp.int8:
        triton.require_fp8()
    (M, K), N = x_MK.shape, len(values_NK)
    tiles = tiles_of(M, K, N)
    check()
    return run(x_MK, values_NK, scale_N, tiles).astype(x_MK.dtype)


def tiles_of(M: int, K: int, N: int) -> Tiles:
    """The tiles for M rows of K inner numbers and N columns; NotImplementedError for odd widths."""
    one = next(tiles for most, tiles in TILES if most >= M)
    if N % one.columns or K % one.inner:
        raise NotImplementedError(
            f"it serves {one.columns} columns and {one.inner} inner numbers at a time, not {N}, {K}"
        )
    programs = N // one.columns * -(-M // one.rows)
    fits = [split for split in SPLITS if K % (split * one.inner) == 0]
    split = next((split for split in fits if split * programs >= PROGRAMS), fits[-1])
    return one._replace(split=split)


def check() -> None:
    """NotImplementedError, with the reason, where the kernel cannot run or computes wrongly."""
    triton.require()
    triton.canary("product", _small_run, reference.product, *_small())


def _small_run(x_MK: jax.Array, values_NK: jax.Array, scale_N: jax.Array) -> jax.Array:
    (M, K), N = x_MK.shape, len(values_NK)
    return run(x_MK, values_NK, scale_N, tiles_of(M, K, N))


@functools.cache
def _small() -> tuple[jax.Array, ...]:
    """Inputs of the canary: 24 rows, several columns and parts."""
    M, N, K = 24, 512, 1024
    with jax.ensure_compile_time_eval():
        values = jax.random.randint(jax.random.key(1), (N, K), -127, 128, jnp.int8)
        scale = jax.random.uniform(jax.random.key(2), (N,), minval=0.5) / 127
    return triton.normal(0, (M, K)), values, scale


def run(x_MK: jax.Array, values_NK: jax.Array, scale_N: jax.Array, tiles: Tiles) -> jax.Array:
    """The scaled product [M, N], float32 where it was split and in the dtype of x where not."""
    from jdllm.kernels.product import narrow_triton as kernels

    (M, K), N, split = x_MK.shape, len(values_NK), tiles.split
    kind = jnp.float32 if split > 1 else x_MK.dtype
    found = triton.call(
        kernels.multiply, x_MK, values_NK, scale_N,
        out=jax.ShapeDtypeStruct((split, M, N), kind),
        grid=(N // tiles.columns, split, -(-M // tiles.rows)),
        warps=tiles.warps, stages=tiles.stages,
        M=M, N=N, K=K, SPLIT=split, BM=tiles.rows, BN=tiles.columns, BK=tiles.inner,
        TURNED=int(tiles.turned),
    )  # fmt: skip
    return jnp.sum(found, axis=0) if split > 1 else found[0]
