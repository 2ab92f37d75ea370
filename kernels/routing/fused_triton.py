"""The Triton kernels of fused.py, imported where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def product(
    x, router, out,
    T: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PART: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (m, n, s): part s of the logits of tokens m * BM and on, experts n * BN and on.

    It multiplies in float32: the matrix units would round.
    """
    row, column = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    s = tl.program_id(2)
    inner = s * PART + tl.arange(0, BK)
    there = row < T
    from_x = x + row[:, None] * D + inner[None, :]
    from_w = router + inner[:, None] * E + column[None, :]
    found = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, PART, BK):
        a = tl.load(from_x, mask=there[:, None], other=0.0).to(tl.float32)
        found = tl.dot(a, tl.load(from_w), found, input_precision="ieee")
        from_x += BK
        from_w += BK * E
    tl.store(out + (s * T + row)[:, None] * E + column[None, :], found, mask=there[:, None])


@triton.jit
def pick(
    parts, bias, picks, factors,
    T: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Program t: the picks of token t, best first, and of equal ones the lower expert."""
    SIZE: tl.constexpr = E // GROUPS
    NONE: tl.constexpr = float("-inf")
    t, group, lane = tl.program_id(0), tl.arange(0, GROUPS), tl.arange(0, LANES)
    expert = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    score = tl.zeros((GROUPS, SIZE), tl.float32)
    for s in tl.static_range(PARTS):
        score += tl.load(parts + (s * T + t) * E + expert)
    if SIGMOID:
        score = tl.sigmoid(score)
    else:
        score = tl.exp(score - tl.max(tl.max(score, 1), 0))
        score = score / tl.sum(tl.sum(score, 1), 0)
    ranked = score
    if BIAS > 0:
        ranked = score + tl.load(bias + expert)
    if BIAS > 1:
        score = ranked
    if KEPT < GROUPS:
        quality = tl.max(ranked, 1)
        if SIZE > 1:
            at = tl.min(tl.where(ranked == quality[:, None], expert, E), 1)
            quality += tl.max(tl.where(expert == at[:, None], NONE, ranked), 1)
        kept = tl.zeros((GROUPS,), tl.int32)
        for _ in tl.static_range(KEPT):
            best = tl.min(tl.where(quality == tl.max(quality, 0), group, GROUPS), 0)
            kept = tl.where(group == best, 1, kept)
            quality = tl.where(group == best, NONE, quality)
        ranked = tl.where(kept[:, None] > 0, ranked, NONE)
    found = tl.zeros((LANES,), tl.float32)
    for p in tl.static_range(P):
        best = tl.max(tl.max(ranked, 1), 0)
        chosen = tl.min(tl.min(tl.where(ranked == best, expert, E), 1), 0)
        own = tl.sum(tl.sum(tl.where(expert == chosen, score, 0.0), 1), 0)
        found = tl.where(lane == p, own, found)
        tl.store(picks + t * P + p, chosen)
        ranked = tl.where(expert == chosen, NONE, ranked)
    if EVEN:
        found = found / (tl.sum(found, 0) + 1e-20)
    tl.store(factors + t * P + lane, found * SCALE, mask=lane < P)
