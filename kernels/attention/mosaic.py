"""Split's attention in Pallas for Hopper: keys come by the bulk copy engine, `depth` tiles ahead.

One warpgroup per program goes through a part of the keys for 64 queries; XLA folds the parts, in
their order, together with whatever comes behind. A tile of fewer queries is filled up.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.attention import reference, split
from jdllm.kernels.attention.reference import as_ranges
from jdllm.kernels.attention.tiled import fold

ROWS = 64  # of a tile: what a warpgroup multiplies at once


class Tiles(NamedTuple):
    """How the work is cut up."""

    keys: int = 64
    part: int = 256
    depth: int = 2
    """Tiles of keys that are on their way at once."""


TILES = Tiles()


def attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible: jax.Array
) -> jax.Array:
    """Attention as the reference defines it; a query that sees no key gets zeros."""
    split.require(q_BTHK, k_BSGK, v_BSGK)
    ranges = as_ranges(visible)
    check()
    return attend(q_BTHK, k_BSGK, v_BSGK, ranges)


def paged_attention(
    q_BTHK: jax.Array,
    k_PNGK: jax.Array,
    v_PNGK: jax.Array,
    table: jax.Array,
    visible: jax.Array,
) -> jax.Array:
    """The same over keys in pages."""
    split.require(q_BTHK, k_PNGK, v_PNGK)
    if max(k_PNGK.shape[1], TILES.keys) % min(k_PNGK.shape[1], TILES.keys):
        raise NotImplementedError(f"pages of {k_PNGK.shape[1]} do not fit tiles of {TILES.keys}")
    ranges = as_ranges(visible)
    check_paged()
    return attend(q_BTHK, k_PNGK, v_PNGK, ranges, table)


def check() -> None:
    """NotImplementedError, with the reason, where the kernel cannot run or computes wrongly."""
    _check("mosaic attention", attend, reference.attention, *split.small())


def check_paged() -> None:
    """The same of the kernel that looks pages up."""
    q, k, v, ranges = split.small()
    k, v, table = split.in_pages(k, v, 32)
    run = functools.partial(_check, "mosaic paged_attention", attend_pages)
    run(reference.paged_attention, q, k, v, table, ranges)


def attend_pages(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, ranges: jax.Array):
    """`attend` with its arguments in the order of the others."""
    return attend(q, k, v, ranges, table)


def _check(*case: Any) -> None:
    triton.require()
    if (found := triton.capability()) != 9.0:
        raise NotImplementedError(f"it needs compute capability 9.0 (Hopper), not {found}")
    try:
        triton.canary(*case)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, NotImplementedError):
            raise
        raise NotImplementedError(f"it cannot be compiled: {str(error)[:200]}") from error


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ranges: jax.Array,
    table: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> jax.Array:
    """The kernel, and the folding of its parts."""
    _, gpu = _pallas()
    tiles = tiles or TILES
    (B, T, H, K), (page, G) = q.shape, k.shape[1:3]
    S = page if table is None else page * table.shape[1]
    chunk = tiles.keys if table is None else min(page, tiles.keys)
    R, places, parts = H // G, -(-T * (H // G) // ROWS), -(-S // tiles.part)
    M = places * ROWS
    q_BGMK = q.reshape(B, T, G, R, K).swapaxes(1, 2).reshape(B, G, T * R, K)
    q_BGMK = jnp.pad(q_BGMK, ((0, 0), (0, 0), (0, M - T * R), (0, 0)))
    own_BT2 = jnp.broadcast_to(jnp.minimum(ranges, S), (B, T, 2))
    own_BM2 = jnp.repeat(own_BT2, R, axis=1)
    first_BM = jnp.pad(own_BM2[..., 0], ((0, 0), (0, M - T * R)), constant_values=S)
    last_BM = jnp.pad(own_BM2[..., 1], ((0, 0), (0, M - T * R)))
    by_tile = (B, places, ROWS)
    low, high = first_BM.reshape(by_tile).min(2), last_BM.reshape(by_tile).max(2)
    swizzle = gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128)
    tile = gpu.SMEM((tiles.depth, tiles.keys, K), q.dtype, transforms=swizzle)
    run = gpu.kernel(
        functools.partial(_program, G, tiles, chunk, PLAIN if interpret else UNITS),
        out_type=[
            jax.ShapeDtypeStruct((parts, B, G, M, K), jnp.float32),
            jax.ShapeDtypeStruct((parts, B, G, M), jnp.float32),
        ],
        scratch_types=[
            gpu.SMEM((ROWS, K), q.dtype, transforms=swizzle), tile, tile,
            gpu.SMEM((ROWS,), jnp.int32), gpu.SMEM((ROWS,), jnp.int32),
            gpu.SMEM((ROWS, K), jnp.float32), gpu.SMEM((ROWS,), jnp.float32),
            gpu.Barrier(num_arrivals=3),
            gpu.Barrier(num_arrivals=tiles.keys // chunk, num_barriers=tiles.depth),
            gpu.Barrier(num_arrivals=tiles.keys // chunk, num_barriers=tiles.depth),
        ],
        grid=(B * G, parts, places), grid_names=("head", "part", "place"),
        compiler_params=gpu.CompilerParams(approx_math=True), interpret=interpret,
    )  # fmt: skip
    pages = [] if table is None else [table]
    means, powers = run(q_BGMK, k, v, first_BM, last_BM, low, high, *pages)
    zero = jnp.zeros(means.shape[1:], jnp.float32)
    so_far = zero[..., 0] - jnp.inf, zero[..., 0], zero
    for part in range(parts):
        so_far = fold(so_far, powers[part], means[part])
    found = (so_far[2] / jnp.maximum(so_far[1], 1e-30)[..., None])[:, :, : T * R]
    return found.reshape(B, G, T, R, K).swapaxes(1, 2).reshape(B, T, H, K).astype(q.dtype)


def _pallas() -> tuple[Any, Any]:
    """Pallas, and what it has for GPUs: imported where they are used, for it takes its time."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as gpu

    return pl, gpu


def _score(q: Any, k: Any) -> jax.Array:
    pl, gpu = _pallas()

    def multiply(sums: Any) -> jax.Array:
        gpu.wgmma(sums, q, k.T)
        return sums[...]

    return pl.run_scoped(multiply, gpu.ACC((q.shape[0], k.shape[0]), jnp.float32))


def _mix(mixed: jax.Array, shares: jax.Array, v: Any) -> jax.Array:
    pl, gpu = _pallas()
    return pl.run_state(lambda sums: gpu.wgmma(sums, shares, v))(gpu.ACC.init(mixed))


UNITS = _score, _mix
PLAIN = (
    lambda q, k: jnp.dot(q[...], k[...].T, preferred_element_type=jnp.float32),
    lambda mixed, shares, v: mixed + jnp.dot(shares, v[...], preferred_element_type=jnp.float32),
)
"""Both products of a tile: by the matrix units, and as the interpreter of a CPU can follow them."""


def _place(b: Any, g: Any, at: Any, chunk: int, page: int, table: Any = None) -> tuple[Any, ...]:
    """Where so many columns of a row and a head lie. Behind the last one nothing is seen."""
    pl, _ = _pallas()
    if table is None:
        return b, pl.ds(at, chunk), g
    number = jnp.minimum(jax.lax.div(at, page), table.shape[1] - 1)
    return table[b, number], pl.ds(jax.lax.rem(at, page), chunk), g


def _shares(scores: jax.Array, seen: jax.Array, best: jax.Array, total: jax.Array) -> Any:
    """The shares of a tile's keys; and what a part has seen with it, and how what it had fades."""
    scores = jnp.where(seen, scores, -1e30)
    top = jnp.maximum(best, scores.max(axis=1))
    shares = jnp.exp2(scores - jax.lax.broadcast_in_dim(top, scores.shape, [0]))
    shares = jnp.where(seen, shares, 0.0)
    fade = jnp.exp2(best - top)
    return (top, total * fade + shares.sum(axis=1), fade), shares


def _program(G: int, tiles: Tiles, chunk: int, products: tuple[Any, Any], *refs: Any) -> None:
    """Program (b * G + g, part, place): a part of a row's keys of a head, for ROWS queries."""
    pl, gpu = _pallas()
    q, k, v, firsts, lasts, lows, highs, *table, means, powers = refs[:-10]
    q_here, k_here, v_here, first_here, last_here, mean_here, power_here = refs[-10:-3]
    begun, k_come, v_come = refs[-3:]
    b, g = jax.lax.div(jax.lax.axis_index("head"), G), jax.lax.rem(jax.lax.axis_index("head"), G)
    part, place = jax.lax.axis_index("part"), jax.lax.axis_index("place")
    score, mix = products
    N, depth, (_, K) = tiles.keys, tiles.depth, q_here.shape
    rows = pl.ds(place * ROWS, ROWS)
    of_rows, of_all = gpu.Layout.WGMMA.reduce(1), gpu.Layout.WGMMA
    gpu.copy_gmem_to_smem(q.at[b, g, rows], q_here, begun)
    gpu.copy_gmem_to_smem(firsts.at[b, rows], first_here, begun)
    gpu.copy_gmem_to_smem(lasts.at[b, rows], last_here, begun)
    begin = jnp.maximum(jax.lax.div(lows[b, place], N) * N, part * tiles.part)
    end = jnp.minimum(highs[b, place], (part + 1) * tiles.part)
    count = jax.lax.div(jnp.maximum(end - begin, 0) + N - 1, N)

    def fetch(number: Any, slot: Any) -> None:
        for i in range(N // chunk):
            at = begin + number * N + i * chunk
            keys = _place(b, g, at, chunk, k.shape[1], *table)
            there = slot, pl.ds(i * chunk, chunk)
            gpu.copy_gmem_to_smem(k.at[keys], k_here.at[there], k_come.at[slot])
            gpu.copy_gmem_to_smem(v.at[keys], v_here.at[there], v_come.at[slot])

    for slot in range(depth):
        pl.when(slot < count)(lambda slot=slot: fetch(slot, slot))
    gpu.barrier_wait(begun)
    first, last = (gpu.load(x, layout=of_rows) for x in (first_here, last_here))
    scale = 1.4426950408889634 / K**0.5

    def tile(number: Any, so_far: Any) -> Any:
        best, total, mixed = so_far
        slot = jax.lax.rem(number, depth)
        gpu.barrier_wait(k_come.at[slot])
        scores = score(q_here, k_here.at[slot]) * scale
        key = gpu.broadcasted_iota(jnp.int32, (ROWS, N), 1, layout=of_all) + begin + number * N
        seen = (key >= jax.lax.broadcast_in_dim(first, (ROWS, N), [0])) & (
            key < jax.lax.broadcast_in_dim(last, (ROWS, N), [0])
        )
        (top, total, fade), shares = _shares(scores, seen, best, total)
        mixed = mixed * jax.lax.broadcast_in_dim(fade, (ROWS, K), [0])
        low = shares.astype(q_here.dtype)
        gpu.barrier_wait(v_come.at[slot])
        mixed = mix(mixed, low, v_here.at[slot])
        pl.when(number + depth < count)(lambda: fetch(number + depth, slot))
        return top, total, mixed

    nothing = (-1e30, (ROWS,), of_rows), (0.0, (ROWS,), of_rows), (0.0, (ROWS, K), of_all)
    start = [gpu.layout_cast(jnp.full(n, x, jnp.float32), layout) for x, n, layout in nothing]
    best, total, mixed = jax.lax.fori_loop(0, count, tile, tuple(start))
    some = jnp.maximum(total, 1e-30)
    mean_here[...] = mixed / jax.lax.broadcast_in_dim(some, (ROWS, K), [0])
    power_here[...] = best + jnp.log(some) * 1.4426950408889634
    gpu.commit_smem()
    gpu.copy_smem_to_gmem(mean_here, means.at[part, b, g, rows])
    gpu.copy_smem_to_gmem(power_here, powers.at[part, b, g, rows])
    gpu.wait_smem_to_gmem(0)
