"""The Triton kernel of fused.py, imported where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def gated(
    x, weights, scale, hidden,
    R: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Program (m, n): rows m * BM and on, columns n * BN and on of silu(gate x) * up x.

    One product makes both halves: its columns are BN of gate, then BN of up. Weights are [D, 2, F];
    with a scale [2, F] they are [2, F, D] and in 8 bits.
    """
    SIDE: tl.constexpr = D if SCALED else 1
    DEEP: tl.constexpr = 1 if SCALED else 2 * F
    row, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN
    column, inner = tl.arange(0, 2 * BN), tl.arange(0, BK)
    there = row < R
    from_x = x + row[:, None] * D + inner[None, :]
    channel = (column // BN) * F + n + column % BN
    from_w = weights + channel[None, :] * SIDE + inner[:, None] * DEEP
    both = tl.zeros((BM, 2 * BN), tl.float32)
    for _ in range(0, D, BK):
        a = tl.load(from_x, mask=there[:, None], other=0.0)
        both = tl.dot(a, tl.load(from_w).to(a.dtype), both)
        from_x += BK
        from_w += BK * DEEP
    if SCALED:
        both *= tl.load(scale + channel)[None, :]
    gate, up = tl.split(tl.permute(tl.reshape(both, (BM, 2, BN)), (0, 2, 1)))
    found = gate * tl.sigmoid(gate) * up
    out = hidden + row[:, None] * F + n + tl.arange(0, BN)[None, :]
    tl.store(out, found.to(hidden.dtype.element_ty), mask=there[:, None])
