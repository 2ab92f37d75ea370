"""The Triton kernel of split_product.py, imported where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def product(
    x, one, two, scale, scales, out,
    R: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Program (m, n, s): the part s of the products of rows m * BM and on.

    Columns n * BN and on are those of weight `one` [D, FIRST], or behind them of `two`. With a
    scale of each column, of `scale` and `scales`, weights are turned round and in 8 bits.
    """
    row, n, s = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN, tl.program_id(2)
    inner, column = s * PART + tl.arange(0, BK), tl.arange(0, BN)
    there = row < R
    from_x = x + row[:, None] * D + inner[None, :]
    wide, own, factor, first = FIRST, one, scale, n
    if WIDTH > FIRST:  # noqa: SIM102 (known before the program is made: the other is not)
        if n >= FIRST:
            wide, own, factor, first = WIDTH - FIRST, two, scales, n - FIRST
    # Where a number's neighbours among columns and among inner numbers are.
    side, deep = (D, 1) if SCALED else (1, wide)
    from_w = own + (first + column)[None, :] * side + inner[:, None] * deep
    found = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, PART, BK):
        a = tl.load(from_x, mask=there[:, None], other=0.0)
        found = tl.dot(a, tl.load(from_w).to(a.dtype), found)
        from_x += BK
        from_w += BK * deep
    if SCALED:
        found *= tl.load(factor + first + column)[None, :]
    place = out + (s * R + row)[:, None] * WIDTH + (n + column)[None, :]
    tl.store(place, found, mask=there[:, None])
