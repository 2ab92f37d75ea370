"""The Triton kernel of fused.py, imported where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def add_norm(
    x, branch, scale, total, normed, D: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr
):
    """Program n: row n. The sum is rounded before its norm, and the norm before its scale."""
    n = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    there = d < D
    kind = total.dtype.element_ty
    own = tl.load(x + n + d, mask=there, other=0.0).to(tl.float32)
    factor = tl.load(scale + d, mask=there, other=0.0).to(kind).to(tl.float32)
    own += tl.load(branch + n + d, mask=there, other=0.0).to(tl.float32)
    own = own.to(kind)
    tl.store(total + n + d, own, mask=there)
    own = own.to(tl.float32)
    even = (own * tl.rsqrt(tl.sum(own * own) / D + EPS)).to(kind).to(tl.float32)
    tl.store(normed + n + d, (even * factor).to(kind), mask=there)
