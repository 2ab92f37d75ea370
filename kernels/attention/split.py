"""Attention of a block's queries over a long cache, by Triton kernels that split the keys.

The query heads that share a key head are one tile, so that its keys are read once. Keys are taken
in parts of a fixed number of columns, which are combined in their order: what a row gets depends
neither on the batch nor on how long the others are. Few tiles work on their parts side by side;
many, or those of a short cache, go through them one after the other, which gives the same bits
without writing parts down.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.attention import reference
from jdllm.kernels.attention.reference import as_ranges


class Tiles(NamedTuple):
    """How the work is cut up; `experiments/attention_tiles.py` measures which serve best."""

    rows: int = 64
    """Queries of a tile, times the heads that share keys."""
    keys: int = 64
    part: int = 256
    """Columns whose softmax is computed apart: a multiple of `keys`."""
    warps: int = 4
    stages: int = 3


TILES = Tiles()
QUERIES = 64  # of a row: two blocks of 32; canvases are others' work
LARGEST = 256  # query rows per key head: beyond, products bind and not memory
ENOUGH = 192  # tiles: from here on each goes through all parts of its keys (attention_tiles.py)


def attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible: jax.Array
) -> jax.Array:
    """Attention as the reference defines it, where rows or queries see ranges of keys.

    A query that sees no key gets zeros. The gradient is the reference's.
    """
    require(q_BTHK, k_BSGK, v_BSGK)
    ranges = as_ranges(visible)
    check()
    return _differentiable(q_BTHK, k_BSGK, v_BSGK, ranges)


def paged_attention(
    q_BTHK: jax.Array,
    k_PNGK: jax.Array,
    v_PNGK: jax.Array,
    table: jax.Array,
    visible: jax.Array,
) -> jax.Array:
    """The same over keys in pages, which are looked up as they are read."""
    require(q_BTHK, k_PNGK, v_PNGK)
    ranges = as_ranges(visible)
    check_paged()
    return attend(q_BTHK, k_PNGK, v_PNGK, ranges, table)


def require(q_BTHK: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """NotImplementedError, with the reason, where the kernels do not serve arrays."""
    (_, T, H, K), G = q_BTHK.shape, k.shape[2]
    rows = T * H // G
    triton.require()
    kinds = {x.dtype.name for x in (q_BTHK, k, v)}
    if kinds not in ({"bfloat16"}, {"float16"}):
        raise NotImplementedError(f"it serves 16-bit numbers, not {' and '.join(sorted(kinds))}")
    if K not in (64, 128):
        raise NotImplementedError(f"it serves head dims of 64 and 128, not {K}")
    if T > QUERIES:
        raise NotImplementedError(f"{T} queries are more than {QUERIES}")
    if rows > LARGEST:
        raise NotImplementedError(f"{rows} queries per key head are more than {LARGEST}")


def _tiles(q_BTHK: jax.Array, G: int, rows: int) -> int:
    """Tiles of queries, of all rows and key heads."""
    B, T, H, _ = q_BTHK.shape
    return B * G * -(-T * (H // G) // rows)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ranges: jax.Array,
    table: jax.Array | None = None,
    tiles: Tiles | None = None,
    whole: bool | None = None,
) -> jax.Array:
    """The kernels alone. `whole` says whether a program goes through all parts of its keys."""
    from jdllm.kernels.attention import split_triton as kernels

    (B, T, H, K), (page, G), array = q.shape, k.shape[1:3], jax.ShapeDtypeStruct
    S = page if table is None else page * table.shape[1]
    tiles = tiles or TILES
    places = -(-T * (H // G) // tiles.rows)
    parts = -(-S // tiles.part)
    if whole is None:
        whole = parts == 1 or _tiles(q, G, tiles.rows) >= ENOUGH
    kind = array((1, *q.shape), q.dtype) if whole else array((parts, *q.shape), jnp.float32)
    found, sums = triton.call(
        kernels.attend, q, k, v, ranges, ranges if table is None else table,
        out=(kind, array(kind.shape[:-1], jnp.float32)),
        grid=(B * G, 1 if whole else parts, places), warps=tiles.warps, stages=tiles.stages,
        T=T, S=S, H=H, G=G, K=K, OWN=int(ranges.shape[1] > 1), PAGE=0 if table is None else page,
        PART=tiles.part, WHOLE=int(whole), BM=tiles.rows, BN=tiles.keys,
    )  # fmt: skip
    if whole:
        return found[0]
    return triton.call(
        kernels.combine, found, sums, out=array(q.shape, q.dtype),
        grid=(-(-B * T * H // 8),), warps=4, stages=1, N=B * T * H, K=K, PARTS=parts, BM=8,
    )  # fmt: skip


@jax.custom_vjp
def _differentiable(q: jax.Array, k: jax.Array, v: jax.Array, ranges: jax.Array) -> jax.Array:
    return attend(q, k, v, ranges)


def _forward(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _differentiable(*arrays), arrays


def _backward(arrays: tuple[jax.Array, ...], change: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, ranges = arrays
    _, pull = jax.vjp(lambda q, k, v: reference.attention(q, k, v, ranges), q, k, v)
    return *pull(change), None


_differentiable.defvjp(_forward, _backward)


def check() -> None:
    """NotImplementedError, with the reason, where the kernels cannot run or compute wrongly."""
    triton.require()
    triton.canary("attention", attend, reference.attention, *small())


def check_paged() -> None:
    """The same of the kernels that look pages up."""
    triton.require()
    q, k, v, ranges = small()
    k, v, table = in_pages(k, v, 32)
    canary = functools.partial(triton.canary, "paged_attention")
    canary(attend_pages, reference.paged_attention, q, k, v, table, ranges)


def attend_pages(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, ranges: jax.Array):
    """`attend` with its arguments in the order of the others."""
    return attend(q, k, v, ranges, table)


@functools.cache
def small() -> tuple[jax.Array, ...]:
    """Inputs of the canary: parts of the keys that a query sees whole, in part and not at all."""
    shapes = (3, 32, 4, 128), (3, 1120, 2, 128), (3, 1120, 2, 128)
    with jax.ensure_compile_time_eval():
        first = jnp.arange(32)[None, :] * jnp.array([[0], [3], [1]])
        last = jnp.arange(32)[None, :] + jnp.array([[1088], [777], [40]])
        ranges = jnp.stack([first, last], -1).astype(jnp.int32)
    q, k, v = (triton.normal(i, shape) for i, shape in enumerate(shapes))
    return q, k, v, ranges


def in_pages(k: jax.Array, v: jax.Array, page: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values [B, S, G, K] in pools whose pages lie backwards, and the table of them."""
    with jax.ensure_compile_time_eval():
        B, S, *rest = k.shape
        table = jnp.arange(B * S // page, 0, -1, dtype=jnp.int32).reshape(B, -1)
        pools = [jnp.zeros((B * S // page + 1, page, *rest), k.dtype) for _ in range(2)]
        k, v = (
            pool.at[table.ravel()].set(x.reshape(-1, page, *rest))
            for pool, x in zip(pools, (k, v), strict=True)
        )
        return k, v, table
