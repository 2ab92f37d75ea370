"""The Triton kernels of split.py, imported where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def product(
    x, weights, out,
    R: tl.constexpr, D: tl.constexpr, F: tl.constexpr, PART: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (m, n, s): the part s of the product of rows m * BM and columns n * BN and on."""
    row, column = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    s = tl.program_id(2)
    inner = s * PART + tl.arange(0, BK)
    there = row < R
    from_x = x + row[:, None] * F + inner[None, :]
    from_w = weights + inner[:, None] * D + column[None, :]
    found = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, PART, BK):
        a = tl.load(from_x, mask=there[:, None], other=0.0)
        found = tl.dot(a, tl.load(from_w), found)
        from_x += BK
        from_w += BK * D
    tl.store(out + (s * R + row)[:, None] * D + column[None, :], found, mask=there[:, None])


@triton.jit
def sum_norm(
    parts, x, scale, total, normed,
    R: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Program n: row n. The product is rounded before the sum, that before its norm, and so on."""
    n, d = tl.program_id(0), tl.arange(0, BLOCK)
    there = d < D
    kind = total.dtype.element_ty
    factor = tl.load(scale + d, mask=there, other=0.0).to(kind).to(tl.float32)
    own = tl.load(x + n * D + d, mask=there, other=0.0).to(tl.float32)
    branch = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(PARTS):
        branch += tl.load(parts + (s * R + n) * D + d, mask=there, other=0.0)
    own = (own + branch.to(kind).to(tl.float32)).to(kind)
    tl.store(total + n * D + d, own, mask=there)
    own = own.to(tl.float32)
    even = (own * tl.rsqrt(tl.sum(own * own) / D + EPS)).to(kind).to(tl.float32)
    tl.store(normed + n * D + d, (even * factor).to(kind), mask=there)
