"""The Triton kernels of grouped.py, imported where there is a GPU.

A pair is a token and one of its picks, numbered token * P + pick. Pairs are sorted by expert, and a
program takes those of one expert, BM at a time, so that only the weights of experts that somebody
picked are read, and each of them once. Every sum runs in one order, whoever the batch mates are.
"""

import triton
import triton.language as tl


@triton.jit
def sort(picks, order, starts, N: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr):
    """Program e: the pairs of expert e, in their order, from starts[e] on; others are left out.

    Every program counts for itself: that is quicker than to wait for each other.
    """
    e = tl.program_id(0)
    place = 0
    for start in range(0, N, CHUNK):
        at = start + tl.arange(0, CHUNK)
        pick = tl.load(picks + at, mask=at < N, other=E)
        place += tl.sum(((pick >= 0) & (pick < e)).to(tl.int32))
    tl.store(starts + e, place)
    for start in range(0, N, CHUNK):
        at = start + tl.arange(0, CHUNK)
        own = (tl.load(picks + at, mask=at < N, other=E) == e).to(tl.int32)
        tl.store(order + place + tl.cumsum(own) - 1, at, mask=own > 0)
        place += tl.sum(own)
    if e == E - 1:
        tl.store(starts + E, place)


@triton.jit
def gate_up(
    x, weights, scale, order, starts, hidden,
    D: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Program (e, n): silu(gate x) * up x of the pairs of expert e, columns n * BN and on.

    One product makes both halves: its columns are BN of gate, then BN of up. Weights are
    [E, D, 2, M]; with a scale [E, 2, M] they are [E, 2, M, D] and in 8 bits.
    """
    SIDE: tl.constexpr = D if SCALED else 1
    DEEP: tl.constexpr = 1 if SCALED else 2 * M
    e, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN
    column = tl.arange(0, 2 * BN)
    channel = (column // BN) * M + n + column % BN
    own = weights + e * (D * 2 * M) + channel * SIDE
    inner = tl.arange(0, BK)
    last = tl.load(starts + e + 1)
    for first in range(tl.load(starts + e), last, BM):
        row = first + tl.arange(0, BM)
        there = row < last
        token = tl.load(order + row, mask=there, other=0) // P
        from_x = x + token[:, None] * D + inner[None, :]
        from_w = own[None, :] + inner[:, None] * DEEP
        both = tl.zeros((BM, 2 * BN), tl.float32)
        for _ in range(0, D, BK):
            a = tl.load(from_x, mask=there[:, None], other=0.0)
            both = tl.dot(a, tl.load(from_w).to(a.dtype), both)
            from_x += BK
            from_w += BK * DEEP
        if SCALED:
            both *= tl.load(scale + e * 2 * M + channel)[None, :]
        gate, up = tl.split(tl.permute(tl.reshape(both, (BM, 2, BN)), (0, 2, 1)))
        found = gate * tl.sigmoid(gate) * up
        out = hidden + row[:, None] * M + n + tl.arange(0, BN)[None, :]
        tl.store(out, found.to(hidden.dtype.element_ty), mask=there[:, None])


@triton.jit
def down(
    hidden, weights, scale, order, starts, out,
    D: tl.constexpr, M: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Program (e, n): down of the hidden rows of expert e, columns n * BN and on, to its pairs.

    Weights are [E, M, D]; with a scale [E, D] they are [E, D, M] and in 8 bits.
    """
    SIDE: tl.constexpr = M if SCALED else 1
    DEEP: tl.constexpr = 1 if SCALED else D
    e, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN
    column, inner = n + tl.arange(0, BN), tl.arange(0, BK)
    last = tl.load(starts + e + 1)
    for first in range(tl.load(starts + e), last, BM):
        row = first + tl.arange(0, BM)
        there = row < last
        pair = tl.load(order + row, mask=there, other=0)
        from_h = hidden + row[:, None] * M + inner[None, :]
        from_w = weights + e * (M * D) + inner[:, None] * DEEP + column[None, :] * SIDE
        found = tl.zeros((BM, BN), tl.float32)
        for _ in range(0, M, BK):
            a = tl.load(from_h, mask=there[:, None], other=0.0)
            found = tl.dot(a, tl.load(from_w).to(a.dtype), found)
            from_h += BK
            from_w += BK * DEEP
        if SCALED:
            found *= tl.load(scale + e * D + column)[None, :]
        tl.store(
            out + pair[:, None] * D + column[None, :],
            found.to(out.dtype.element_ty),
            mask=there[:, None],
        )
