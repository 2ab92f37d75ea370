"""The algorithm of split's kernels in plain jnp, for any device: what holds them without a GPU.

Tiles of keys, a running maximum, parts of a fixed number of columns and their folding stand here
as they do there, and so does what follows: no number of a row depends on another row.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdllm.kernels.attention import split
from jdllm.kernels.attention.reference import as_ranges

Fetch = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Columns [N] -> their keys and values [N, G, K]."""


def attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible: jax.Array
) -> jax.Array:
    """Attention as the reference defines it; a query that sees no key gets zeros."""

    def row(q_THK: jax.Array, range_: jax.Array, k_SGK: jax.Array, v_SGK: jax.Array) -> jax.Array:
        return _row(q_THK, range_, len(k_SGK), lambda at: (k_SGK[at], v_SGK[at]))

    return jax.lax.map(lambda xs: row(*xs), (q_BTHK, as_ranges(visible), k_BSGK, v_BSGK))


def paged_attention(
    q_BTHK: jax.Array,
    k_PNGK: jax.Array,
    v_PNGK: jax.Array,
    table: jax.Array,
    visible: jax.Array,
) -> jax.Array:
    """The same over keys in pages."""
    page = k_PNGK.shape[1]

    def row(q_THK: jax.Array, range_: jax.Array, pages: jax.Array) -> jax.Array:
        def fetch(at: jax.Array) -> tuple[jax.Array, jax.Array]:
            return k_PNGK[pages[at // page], at % page], v_PNGK[pages[at // page], at % page]

        return _row(q_THK, range_, len(pages) * page, fetch)

    return jax.lax.map(lambda xs: row(*xs), (q_BTHK, as_ranges(visible), table))


def _row(q_THK: jax.Array, range_: jax.Array, S: int, fetch: Fetch) -> jax.Array:
    """One row, whose queries see `range_` [T, 2] or [1, 2] of S columns."""
    (T, H, K), tiles = q_THK.shape, split.TILES
    G = jax.eval_shape(fetch, jnp.zeros(1, jnp.int32))[0].shape[1]
    q_GMK = q_THK.reshape(T, G, H // G, K).swapaxes(0, 1).reshape(G, -1, K)
    first_M, last_M = jnp.repeat(jnp.broadcast_to(range_, (T, 2)), H // G, axis=0).T
    columns = jnp.arange(-(-S // tiles.part) * tiles.part, dtype=jnp.int32)
    tile = functools.partial(_tile, q_GMK, first_M, jnp.minimum(last_M, S), S, fetch)

    def part(so_far: tuple[jax.Array, ...], keys: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        (best, total, mixed), _ = jax.lax.scan(tile, _nothing(q_GMK), keys)
        some = total > 0
        mean = mixed / jnp.where(some, total, 1.0)[..., None]
        return fold(so_far, jnp.where(some, best + jnp.log2(total), -jnp.inf), mean), None

    keys = columns.reshape(-1, tiles.part // tiles.keys, tiles.keys)
    (_, weight, found), _ = jax.lax.scan(part, _nothing(q_GMK), keys)
    found_GMK = found / jnp.maximum(weight, 1e-30)[..., None]
    found_TGRK = found_GMK.reshape(G, T, H // G, K).swapaxes(0, 1)
    return found_TGRK.reshape(T, H, K).astype(q_THK.dtype)


def _nothing(q_GMK: jax.Array) -> tuple[jax.Array, ...]:
    zero = jnp.zeros(q_GMK.shape, jnp.float32)
    return zero[..., 0] - jnp.inf, zero[..., 0], zero


def _tile(
    q_GMK: jax.Array,
    first_M: jax.Array,
    last_M: jax.Array,
    S: int,
    fetch: Fetch,
    so_far: tuple[jax.Array, ...],
    keys_N: jax.Array,
) -> tuple[tuple[jax.Array, ...], None]:
    """What a part has seen with another tile of keys."""
    best, total, mixed = so_far
    k_NGK, v_NGK = fetch(jnp.minimum(keys_N, S - 1))
    scale = 1.4426950408889634 / q_GMK.shape[-1] ** 0.5
    scores = jnp.einsum("GMK,NGK->GMN", q_GMK, k_NGK, preferred_element_type=jnp.float32) * scale
    seen = (keys_N >= first_M[:, None]) & (keys_N < last_M[:, None])
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.maximum(best, scores.max(-1))
    level = jnp.where(top > -jnp.inf, top, 0.0)
    shares, fade = jnp.exp2(scores - level[..., None]), jnp.exp2(best - level)
    low = shares.astype(v_NGK.dtype)
    more = jnp.einsum("GMN,NGK->GMK", low, v_NGK, preferred_element_type=jnp.float32)
    return (top, total * fade + shares.sum(-1), mixed * fade[..., None] + more), None


def fold(so_far: tuple[jax.Array, ...], power: jax.Array, mean: jax.Array) -> tuple[jax.Array, ...]:
    """A part is added to those before it."""
    most, weight, found = so_far
    top = jnp.maximum(most, power)
    level = jnp.where(top > -jnp.inf, top, 0.0)
    fade, share = jnp.exp2(most - level), jnp.exp2(power - level)
    return top, weight * fade + share, found * fade[..., None] + mean * share[..., None]
