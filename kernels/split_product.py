"""A product of few rows in parts: its inner numbers are split, so that few columns, too, keep all
processors reading. Whoever reads the parts sums them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.product import reference
from jdllm.kernels.quantised import Quantised, quantise, taken_apart


class Tiles(NamedTuple):
    """Sizes of a kernel's work: rows, columns, inner numbers at a time; how many programs there are
    at least, for which inner numbers are cut into parts; warps, loads in flight."""

    rows: int
    columns: int
    inner: int
    programs: int
    warps: int
    stages: int


# Up to so many rows: for 32 the best of experiments/layer_tiles.py for what closes LLaDA-8B's
# branches.
TILES: tuple[tuple[float, Tiles], ...] = (
    (32, Tiles(32, 64, 64, 128, 4, 6)),
    (float("inf"), Tiles(64, 64, 64, 128, 4, 4)),
)
# The same of weights in 8 bits, of which twice as many lie in a stretch of memory: the best of
# experiments/narrow_tiles.py with so few columns.
NARROW: tuple[tuple[float, Tiles], ...] = (
    (32, Tiles(32, 64, 128, 250, 4, 4)),
    (float("inf"), Tiles(64, 64, 128, 250, 4, 4)),
)


def parts(x_BTD: jax.Array, *weights: jax.Array | Quantised) -> jax.Array:
    """Float32 parts [S, B * T, N] of the products with one weight [D, N], or with two side by side.

    D must be a multiple of 128, and the columns of each weight one of 64. Either all weights are in
    8 bits or none; their parts are scaled.
    """
    from jdllm.kernels import split_product_triton as kernels

    (B, T, D), first = x_BTD.shape, weights[0].shape[1]
    rows, width = B * T, sum(weight.shape[1] for weight in weights)
    narrow = isinstance(weights[0], Quantised)
    tiles = next(tiles for most, tiles in (NARROW if narrow else TILES) if most >= rows)
    numbers, scales = zip(*map(taken_apart, weights), strict=True)
    count = triton.power_of_2(-(-tiles.programs * tiles.columns // width))
    while D % (count * tiles.inner):
        count //= 2
    return triton.call(
        kernels.product, x_BTD, numbers[0], numbers[-1], scales[0], scales[-1],
        out=jax.ShapeDtypeStruct((count, rows, width), jnp.float32),
        grid=(-(-rows // tiles.rows), width // tiles.columns, count),
        warps=tiles.warps, stages=tiles.stages,
        R=rows, D=D, FIRST=first, WIDTH=width, PART=D // count,
        BM=tiles.rows, BN=tiles.columns, BK=tiles.inner, SCALED=int(narrow),
    )  # fmt: skip


def check_narrow() -> None:
    """NotImplementedError where parts with weights in 8 bits are computed wrongly."""
    triton.require()
    x, two = triton.normal(0, (1, 24, 1024)), [triton.normal(i, (1024, 128)) for i in (1, 2)]
    with jax.ensure_compile_time_eval():
        small = [quantise(weight, (0,)) for weight in two]

    def ours(x: jax.Array, *small: Quantised) -> jax.Array:
        return jnp.sum(parts(x, *small), axis=0)

    def theirs(x: jax.Array, *small: Quantised) -> jax.Array:
        return jnp.concatenate([reference.times(x, one)[0] for one in small], axis=1)

    triton.canary("product in 8 bits, in parts", ours, theirs, x, *small)
