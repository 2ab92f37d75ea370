"""The Triton kernel of fused.py, imported where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def number(
    x, bias, at, kind: tl.constexpr,
    PARTS: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """What a product gave at a place: the sum of its parts, rounded, and with a bias once more."""
    found = tl.load(x + at).to(tl.float32)
    for s in tl.static_range(1, PARTS):
        found += tl.load(x + s * STRIDE + at)
    found = found.to(kind).to(tl.float32)
    if BIASED:
        found = (found + tl.load(bias + at).to(tl.float32)).to(kind).to(tl.float32)
    return found


@triton.jit
def turned(
    x, bias, scale, sin, cos, kind: tl.constexpr,
    K: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    PARTS: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """HEADS heads from `x` on, normed and turned; channel c meets its partner, read anew."""
    head, c = tl.arange(0, HEADS)[:, None], tl.arange(0, K)[None, :]
    low, moves = c < HALF, c < 2 * HALF
    pair = tl.where(moves, tl.where(low, c + HALF, c - HALF), c)
    own = number(x, bias, head * K + c, kind, PARTS, STRIDE, BIASED)
    other = number(x, bias, head * K + pair, kind, PARTS, STRIDE, BIASED)
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
    q, kv, q_bias, kv_bias, sin, cos, q_scale, k_scale, places, _keys, _values, out, keys, values,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, ROW: tl.constexpr, COLUMNS: tl.constexpr,
    FROM_Q: tl.constexpr, FROM_KV: tl.constexpr,
    SKIP: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    PARTS: tl.constexpr, STRIDE: tl.constexpr, BIASED: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """Program (n, m): of token n the heads m * HEADS and on: queries, then keys, then values.

    `_keys` and `_values` are the same memory as `keys` and `values`. The biases of keys begin
    PAST numbers behind `kv_bias`.
    """
    kind: tl.constexpr = out.dtype.element_ty
    n, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    head, c = tl.arange(0, HEADS)[:, None], tl.arange(0, K)[None, :]
    sin += n * HALF
    cos += n * HALF
    if first < H:
        found = turned(
            q + n * FROM_Q + first * K, q_bias + first * K, q_scale, sin, cos, kind,
            K, HALF, HEADS, NORM, EPS, PARTS, STRIDE, BIASED,
        )  # fmt: skip
        tl.store(out + (n * H + first + head) * K + c, found)
    else:
        place = tl.load(places + n).to(tl.int64)
        if place < COLUMNS:
            from_kv = kv + n * FROM_KV + SKIP + (first - H) * K
            bias = kv_bias + PAST + (first - H) * K
            at = (place + n // T * ROW) * G
            if first < H + G:
                found = turned(
                    from_kv, bias, k_scale, sin, cos, kind,
                    K, HALF, HEADS, NORM, EPS, PARTS, STRIDE, BIASED,
                )  # fmt: skip
                tl.store(keys + (at + first - H + head) * K + c, found.to(keys.dtype.element_ty))
            else:
                found = number(from_kv, bias, head * K + c, kind, PARTS, STRIDE, BIASED).to(kind)
                to = values + (at + first - H - G + head) * K + c
                tl.store(to, found.to(values.dtype.element_ty))
