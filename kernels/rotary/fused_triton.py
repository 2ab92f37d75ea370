"""The Triton kernel of fused.py, imported where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def turned(
    x, scale, sin, cos,
    K: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """HEADS heads from `x` on, normed and turned; channel c meets its partner, read anew."""
    head, c = tl.arange(0, HEADS)[:, None], tl.arange(0, K)[None, :]
    kind = x.dtype.element_ty
    low, moves = c < HALF, c < 2 * HALF
    pair = tl.where(moves, tl.where(low, c + HALF, c - HALF), c)
    own = tl.load(x + head * K + c).to(tl.float32)
    other = tl.load(x + head * K + pair).to(tl.float32)
    if NORM:
        even = tl.rsqrt(tl.sum(own * own, 1) / K + EPS)[:, None]
        own = (own * even).to(kind).to(tl.float32) * tl.load(scale + c).to(kind).to(tl.float32)
        other = (other * even).to(kind).to(tl.float32)
        other *= tl.load(scale + pair).to(kind).to(tl.float32)
        own, other = own.to(kind).to(tl.float32), other.to(kind).to(tl.float32)
    s, t = tl.load(sin + c % HALF), tl.load(cos + c % HALF)
    both = own * t + tl.where(low, -other, other) * s
    return tl.where(moves, both, own).to(kind)


@triton.jit
def turn(
    q, kv, sin, cos, q_scale, k_scale, places, _keys, _values, out, keys, values,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, ROW: tl.constexpr, COLUMNS: tl.constexpr,
    FROM_Q: tl.constexpr, FROM_KV: tl.constexpr,
    SKIP: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Program (n, m): of token n the heads m * HEADS and on: queries, then keys, then values.

    `_keys` and `_values` are the same memory as `keys` and `values`.
    """
    n, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    head, c = tl.arange(0, HEADS)[:, None], tl.arange(0, K)[None, :]
    sin += n * HALF
    cos += n * HALF
    if first < H:
        found = turned(q + n * FROM_Q + first * K, q_scale, sin, cos, K, HALF, HEADS, NORM, EPS)
        tl.store(out + (n * H + first + head) * K + c, found)
    else:
        place = tl.load(places + n).to(tl.int64)
        if place < COLUMNS:
            from_kv = kv + n * FROM_KV + SKIP + (first - H) * K
            at = (place + n // T * ROW) * G
            if first < H + G:
                found = turned(from_kv, k_scale, sin, cos, K, HALF, HEADS, NORM, EPS)
                tl.store(keys + (at + first - H + head) * K + c, found.to(keys.dtype.element_ty))
            else:
                found = tl.load(from_kv + head * K + c)
                to = values + (at + first - H - G + head) * K + c
                tl.store(to, found.to(values.dtype.element_ty))
