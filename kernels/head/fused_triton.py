"""The Triton kernels of fused.py, imported where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def mixed(x, y, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, E: tl.constexpr):
    """Four rounds of threefry, with these rotations."""
    x += y
    y = ((y << A) | (y >> (32 - A))) ^ x
    x += y
    y = ((y << B) | (y >> (32 - B))) ^ x
    x += y
    y = ((y << C) | (y >> (32 - C))) ^ x
    x += y
    y = ((y << E) | (y >> (32 - E))) ^ x
    return x, y


@triton.jit
def uniform(one, two, number):
    """Draws in [0, 1): what jax.random.uniform makes of the key (one, two), by their numbers."""
    three = one ^ two ^ 0x1BD11BDA
    x, y = tl.zeros_like(number) + one, number + two
    x, y = mixed(x, y, 13, 15, 26, 6)
    x, y = mixed(x + two, y + three + 1, 17, 29, 16, 24)
    x, y = mixed(x + three, y + one + 2, 13, 15, 26, 6)
    x, y = mixed(x + one, y + two + 3, 17, 29, 16, 24)
    x, y = mixed(x + two, y + three + 4, 13, 15, 26, 6)
    bits = (x + three) ^ (y + one + 5)
    return ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def search(
    hidden, head, flags, keys, offset, scale, heat, ids, score, own, rest, second,
    R: tl.constexpr, V: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
    BY_D: tl.constexpr, BY_V: tl.constexpr, NOISE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (m, p): rows m * BM and on, the tokens of part p.

    Programs of one part follow each other, so that its weights are read from memory once.
    """
    row, p = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    token = p * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    there, known = row < R, token < V
    from_x = hidden + row[:, None] * D + inner[None, :]
    from_w = head + token[None, :].to(tl.int64) * BY_V + inner[:, None].to(tl.int64) * BY_D
    logits = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, D, BK):
        a = tl.load(from_x, mask=there[:, None], other=0.0)
        b = tl.load(from_w, mask=known[None, :], other=0.0)
        logits = tl.dot(a, b, logits)
        from_x += BK
        from_w += BK * BY_D
    flag = tl.load(flags + token, mask=known, other=0)
    usable, counted = (flag & 1) > 0, (flag & 2) > 0
    ranked = logits
    if NOISE:
        one = tl.load(keys + 2 * row, mask=there, other=0)
        two = tl.load(keys + 2 * row + 1, mask=there, other=0)
        number = tl.load(offset + row, mask=there, other=0)[:, None] + token.to(tl.uint32)[None, :]
        drawn = -tl.log(-tl.log(uniform(one[:, None], two[:, None], number)))
        logits = logits / tl.load(heat + row, mask=there, other=1.0)[:, None]
        ranked = logits + tl.load(scale + row, mask=there, other=0.0)[:, None] * drawn
    scores = tl.where(usable[None, :], ranked, -float("inf"))
    best = tl.max(scores, 1)
    some = best > -float("inf")
    # The lowest of equal ones; where none is usable the first, and then no token is left out.
    chosen = tl.min(tl.where(scores == best[:, None], token[None, :], 2147483647), 1)
    left = (token[None, :] != chosen[:, None]) | (some == 0)[:, None]
    others = tl.where(counted[None, :] & left, logits, -float("inf"))
    most = tl.max(others, 1)
    base = tl.where(most > -float("inf"), most, 0.0)
    summed = tl.sum(tl.exp(others - base[:, None]), 1)
    at = row * PARTS + p
    tl.store(ids + at, chosen, mask=there)
    tl.store(score + at, best, mask=there)
    mine = tl.max(
        tl.where(left == 0, tl.where(counted[None, :], logits, -float("inf")), -float("inf")), 1
    )
    tl.store(own + at, mine, mask=there)
    tl.store(rest + at, base + tl.log(summed), mask=there)
    tl.store(second + at, tl.max(tl.where(left, scores, -float("inf")), 1), mask=there)


@triton.jit
def combine(
    ids, score, own, rest, second, ids_out, score_out, own_out, rest_out, second_out,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program n: the best of the parts of row n."""
    n, p = tl.program_id(0), tl.arange(0, BLOCK)
    at, there = n * PARTS + p, p < PARTS
    low = -float("inf")
    scores = tl.load(score + at, mask=there, other=low)
    best = tl.max(scores, 0)
    winner = tl.min(tl.where((scores == best) & there, p, BLOCK), 0)
    won = p == winner
    owns = tl.load(own + at, mask=there, other=low)
    rests = tl.load(rest + at, mask=there, other=low)
    lost = tl.where(won, low, owns)
    most = tl.maximum(tl.max(rests, 0), tl.max(lost, 0))
    base = tl.where(most > low, most, 0.0)
    summed = tl.sum(tl.exp(rests - base), 0) + tl.sum(tl.exp(lost - base), 0)
    seconds = tl.load(second + at, mask=there, other=low)
    tl.store(ids_out + n, tl.sum(tl.where(won, tl.load(ids + at, mask=there, other=0), 0), 0))
    tl.store(score_out + n, best)
    tl.store(own_out + n, tl.max(tl.where(won, owns, low), 0))
    tl.store(rest_out + n, base + tl.log(summed))
    tl.store(second_out + n, tl.max(tl.where(won, seconds, scores), 0))
