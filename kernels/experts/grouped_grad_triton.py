"""The two products of grouped_grad.py as Triton kernels, imported where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def times(
    rows, weights, order, tokens, expert, first, starts, out,
    K: tl.constexpr, J: tl.constexpr, TO_K: tl.constexpr, TO_J: tl.constexpr,
    TOKENS: tl.constexpr, SCATTER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (n, g): tile g, at most BM rows of one expert, times columns n * BN and on of it.

    A number of the weights is TO_K further for the next of what is summed, TO_J for the next
    column. Rows are by token where TOKENS, results by pair where SCATTER.
    """
    n, tile = tl.program_id(0) * BN, tl.program_id(1)
    e = tl.load(expert + tile).to(tl.int64)
    start, last = tl.load(first + tile), tl.load(starts + e + 1)
    if start < last:
        row = start + tl.arange(0, BM)
        there = row < last
        source, target = row, row
        if TOKENS:
            source = tl.load(tokens + row, mask=there, other=0)
        if SCATTER:
            target = tl.load(order + row, mask=there, other=0)
        column, inner = n + tl.arange(0, BN), tl.arange(0, BK)
        from_a = rows + source[:, None].to(tl.int64) * K + inner[None, :]
        from_w = weights + e * (K * J) + inner[:, None] * TO_K + column[None, :] * TO_J
        found = tl.zeros((BM, BN), tl.float32)
        for _ in range(0, K, BK):
            a = tl.load(from_a, mask=there[:, None], other=0.0)
            found = tl.dot(a, tl.load(from_w), found)
            from_a += BK
            from_w += BK * TO_K
        to = out + target[:, None].to(tl.int64) * J + column[None, :]
        tl.store(to, found.to(out.dtype.element_ty), mask=there[:, None])


@triton.jit
def outer(
    left, right, tokens, starts, out,
    K: tl.constexpr, J: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (k, n, e): BM by BN numbers of the sum of outer products over the rows of expert e.

    BK rows are taken at a time; those of the side LEFT or RIGHT are by token.
    """
    e = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    start, last = tl.load(starts + e), tl.load(starts + e + 1)
    found = tl.zeros((BM, BN), tl.float32)
    for at in range(start, last, BK):
        row = at + tl.arange(0, BK)
        there = row < last
        token = tl.load(tokens + row, mask=there, other=0)
        to_left = (token if LEFT else row).to(tl.int64)
        to_right = (token if RIGHT else row).to(tl.int64)
        a = tl.load(left + to_left[None, :] * K + k[:, None], mask=there[None, :], other=0.0)
        b = tl.load(right + to_right[:, None] * J + n[None, :], mask=there[:, None], other=0.0)
        found = tl.dot(a, b, found)
    tl.store(out + e * (K * J) + k[:, None] * J + n[None, :], found.to(out.dtype.element_ty))
