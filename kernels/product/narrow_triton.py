"""The Triton kernel of narrow.py, imported where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def multiply(
    x, values, scale, out,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Program (n, s, m): rows m * BM and on times columns n * BN and on, over part s of K.

    `values` are [N, K]: what a thread widens lies side by side. TURNED makes them the left operand,
    which the matrix units of Hopper take from registers; it needs 64 columns.
    """
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    PART: tl.constexpr = K // SPLIT
    inner = tl.program_id(1) * PART + tl.arange(0, BK)
    there = row < M
    at = (tl.program_id(1) * M + row) * N
    factor = tl.load(scale + column)
    from_x = x + row[:, None] * K + inner[None, :]
    if TURNED:
        from_w = values + column[:, None].to(tl.int64) * K + inner[None, :]
        turned = tl.zeros((BN, BM), tl.float32)
        for _ in range(0, PART, BK):
            a = tl.load(from_x, mask=there[:, None], other=0.0)
            turned = tl.dot(tl.load(from_w).to(a.dtype), tl.trans(a), turned)
            from_x += BK
            from_w += BK
        found = tl.trans(turned)
    else:
        from_w = values + column[None, :].to(tl.int64) * K + inner[:, None]
        found = tl.zeros((BM, BN), tl.float32)
        for _ in range(0, PART, BK):
            a = tl.load(from_x, mask=there[:, None], other=0.0)
            found = tl.dot(a, tl.load(from_w).to(a.dtype), found)
            from_x += BK
            from_w += BK
    found *= factor[None, :]
    place = out + at[:, None] + column[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=there[:, None])
