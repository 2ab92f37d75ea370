"""The Triton kernels of split.py, imported where there is a GPU."""

import triton
import triton.language as tl


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
