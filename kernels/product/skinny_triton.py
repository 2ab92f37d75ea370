"""The Triton kernel of skinny.py, imported where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def widened(values):
    """bfloat16 of int8, exactly, four at a time: no instruction that converts is quick enough.

    A byte under the exponent of 128 is 128 + its lower seven bits, and under the same exponent its
    sign bit alone is 128 or 256: their difference is the number.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d, minus;
        mov.b32 minus, 0xbf80bf80;
        prmt.b32 a, $2, 0x43434343, 0x4140;
        prmt.b32 b, $2, 0x43434343, 0x4342;
        and.b32 c, a, 0xff80ff80;
        and.b32 d, b, 0xff80ff80;
        and.b32 a, a, 0xff7fff7f;
        and.b32 b, b, 0xff7fff7f;
        fma.rn.bf16x2 $0, c, minus, a;
        fma.rn.bf16x2 $1, d, minus, b;
        }
        """,
        "=r,=r,r",
        [values],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def skinny(
    x, weights, scales, out, T,
    K: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, QUANTISED: tl.constexpr, KMAJOR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (n, s, m): rows m * BM and on, columns n * BN and on, of part s of the inner numbers."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    inner = part * (K // SPLIT) + tl.arange(0, BK)
    from_x = x + row[:, None] * K + inner[None, :]
    if KMAJOR:
        from_w = weights + column[None, :].to(tl.int64) * K + inner[:, None]
        step = BK
    else:
        from_w = weights + inner[:, None].to(tl.int64) * N + column[None, :]
        step = BK * N
    there = row < T
    found = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K // SPLIT, BK):
        a = tl.load(from_x, mask=there[:, None], other=0.0)
        b = tl.load(from_w)
        if QUANTISED:
            b = widened(b)
        found = tl.dot(a, b, found)
        from_x += BK
        from_w += step
    if QUANTISED:
        found *= tl.load(scales + column)[None, :]
    to = out + part * T * N + row[:, None] * N + column[None, :]
    tl.store(to, found.to(out.dtype.element_ty), mask=there[:, None])
