"""The product with an 8-bit weight, widened in registers by a Triton kernel; for few rows.

A step of few tokens costs what reading the weights costs. The inner axis is split over programs,
so that small products, too, keep all processors reading.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton


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
