"""The Triton kernels of split.py, imported where there is a GPU.

The R query heads that share a key head, and the T queries, are the rows of one tile: row t * R + r.
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    q, k, v, ranges, table, out, sums,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    OWN: tl.constexpr, PAGE: tl.constexpr, PART: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (b * G + g, p, m): the keys p * PART and on of a row and a key head, for BM queries.

    Writes the mean of the values under the softmax of these keys alone, and its log normaliser. If
    WHOLE, goes through all parts, one after the other, and writes what `combine` would make of them
    to the last bit: which of the two is chosen may depend on the batch.
    """
    R: tl.constexpr = H // G
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    width = tl.arange(0, K)
    there = row < T * R
    t = row // R
    at = (b * T + t) * H + g * R + row % R
    queries = tl.load(q + at[:, None] * K + width[None, :], mask=there[:, None], other=0.0)
    own = b * T + t if OWN else b + 0 * t
    first = tl.load(ranges + own * 2, mask=there, other=S)
    last = tl.minimum(tl.load(ranges + own * 2 + 1, mask=there, other=0), S)
    low, high = tl.min(first), tl.max(last)
    pools = (b.to(tl.int64) * S * G + g) * K if PAGE == 0 else (g * K).to(tl.int64)
    scale = 1.4426950408889634 / tl.sqrt(K * 1.0)  # exp2 is the unit's own
    most, weight, found = nothing(BM, K)
    best, total, mixed = nothing(BM, K)
    p = 0 if WHOLE else tl.program_id(1)
    end = high if WHOLE else tl.minimum((p + 1) * PART, high)
    # Tiles begin at multiples of BN whatever is seen of them: bits hang on nothing else.
    for start in range(tl.maximum(p * PART, low // BN * BN), end, BN):
        key = start + tl.arange(0, BN)
        inside = key < high
        column = columns(key, inside, table + b * (S // PAGE if PAGE else 0), PAGE)
        place = pools + column[:, None].to(tl.int64) * (G * K) + width[None, :]
        seen = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None])
        best, total, mixed = tile(
            queries, k + place, v + place, inside, seen, scale, best, total, mixed
        )
        if WHOLE:  # noqa: SIM102 (known before the program is made: the other is not)
            if (start + BN) % PART == 0:
                power, mean = part(best, total, mixed)
                most, weight, found = fold(most, weight, found, power, mean)
                best, total, mixed = nothing(BM, K)
    power, mean = part(best, total, mixed)
    if WHOLE:
        most, weight, found = fold(most, weight, found, power, mean)
        found = found / tl.maximum(weight, 1e-30)[:, None]
        place = at[:, None] * K + width[None, :]
        tl.store(out + place, found.to(out.dtype.element_ty), mask=there[:, None])
    else:
        place = (p * (tl.num_programs(0) // G) * T * H + at).to(tl.int64)
        tl.store(out + place[:, None] * K + width[None, :], mean, mask=there[:, None])
        tl.store(sums + place, power, mask=there)


@triton.jit
def columns(key, inside, pages, PAGE: tl.constexpr):
    """Where keys of a row lie in the pool, if there is one."""
    if PAGE == 0:
        found = key
    else:
        found = tl.load(pages + key // PAGE, mask=inside, other=0) * PAGE + key % PAGE
    return found


@triton.jit
def tile(queries, k, v, inside, seen, scale, best, total, mixed):
    """What queries have seen of a part with another tile of keys."""
    keys = tl.load(k, mask=inside[:, None], other=0.0)
    scores = tl.where(seen, tl.dot(queries, tl.trans(keys)) * scale, -float("inf"))
    top = tl.maximum(best, tl.max(scores, 1))
    level = tl.where(top > -float("inf"), top, 0.0)
    shares = tl.exp2(scores - level[:, None])
    fade = tl.exp2(best - level)
    values = tl.load(v, mask=inside[:, None], other=0.0)
    mixed = tl.dot(shares.to(values.dtype), values, mixed * fade[:, None])
    return top, total * fade + tl.sum(shares, 1), mixed


@triton.jit
def nothing(BM: tl.constexpr, K: tl.constexpr):
    """What BM queries have seen before the first key."""
    best = tl.full((BM,), -float("inf"), tl.float32)
    return best, tl.zeros((BM,), tl.float32), tl.zeros((BM, K), tl.float32)


@triton.jit
def part(best, total, mixed):
    """The log normaliser of a part, and the mean of its values."""
    some = total > 0
    mean = mixed / tl.where(some, total, 1.0)[:, None]
    return tl.where(some, best + tl.log2(total), -float("inf")), mean


@triton.jit
def fold(most, weight, found, power, mean):
    """A part is added to those before it; its products are rounded alike wherever this is done."""
    top = tl.maximum(most, power)
    level = tl.where(top > -float("inf"), top, 0.0)
    fade, share = tl.exp2(most - level), tl.exp2(power - level)
    found = tl.fma(found, tl.broadcast_to(fade[:, None], found.shape), mean * share[:, None])
    return top, tl.fma(weight, fade, share), found


@triton.jit
def combine(
    parts, sums, out, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr
):
    """Program n: the means of BM queries over all their parts, in the order of the parts."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    width, there = tl.arange(0, K), row < N
    most, weight, found = nothing(BM, K)
    for p in tl.static_range(PARTS):
        place = (p * N + row).to(tl.int64)
        power = tl.load(sums + place, mask=there, other=-float("inf"))
        mean = tl.load(parts + place[:, None] * K + width[None, :], mask=there[:, None], other=0.0)
        most, weight, found = fold(most, weight, found, power, mean)
    found = found / tl.maximum(weight, 1e-30)[:, None]
    place = row[:, None].to(tl.int64) * K + width[None, :]
    tl.store(out + place, found.to(out.dtype.element_ty), mask=there[:, None])
