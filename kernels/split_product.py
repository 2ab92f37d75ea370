"""A product of few rows in parts: its inner numbers are split, so that few columns, too, keep all
processors reading. Whoever reads the parts sums them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton


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


def parts(x_BTD: jax.Array, *weights: jax.Array) -> jax.Array:
    """Float32 parts [S, B * T, N] of the products with one weight [D, N], or with two side by side.

    D must be a multiple of 64, and so must be the columns of each weight.
    """
    from jdllm.kernels import split_product_triton as kernels

    (B, T, D), first = x_BTD.shape, weights[0].shape[1]
    rows, width = B * T, sum(weight.shape[1] for weight in weights)
    tiles = next(tiles for most, tiles in TILES if most >= rows)
    count = triton.power_of_2(-(-tiles.programs * tiles.columns // width))
    while D % (count * tiles.inner):
        count //= 2
    return triton.call(
        kernels.product, x_BTD, weights[0], weights[-1],
        out=jax.ShapeDtypeStruct((count, rows, width), jnp.float32),
        grid=(-(-rows // tiles.rows), width // tiles.columns, count),
        warps=tiles.warps, stages=tiles.stages,
        R=rows, D=D, FIRST=first, WIDTH=width, PART=D // count,
        BM=tiles.rows, BN=tiles.columns, BK=tiles.inner,
    )  # fmt: skip
