"""The Triton kernels of split.py, imported where there is a GPU.

The R query heads that share a key head, and the T queries, are the rows of one tile: row t * R + r.
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    q, k, v, lengths, out, sums,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    PART: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (b * G + g, s, m): the keys s * PART and on of a row and a key head.

    Writes the mean of the values under the softmax of these keys alone, and its log normaliser.
    """
    R: tl.constexpr = H // G
    b, g = tl.program_id(0) // G, tl.program_id(0) % G
    s = tl.program_id(1)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    width = tl.arange(0, K)
    there = row < T * R
    at = (b * T + row // R) * H + g * R + row % R
    queries = tl.load(q + at[:, None] * K + width[None, :], mask=there[:, None], other=0.0)
    start = s * PART
    end = tl.minimum(tl.load(lengths + b), tl.minimum(start + PART, S))
    base = (b.to(tl.int64) * S * G + g) * K
    best = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    mixed = tl.zeros((BM, K), tl.float32)
    scale = 1.4426950408889634 / tl.sqrt(K * 1.0)  # exp2 is the unit's own
    for first in range(start, end, BN):
        key = first + tl.arange(0, BN)
        seen = key < end
        place = base + key[:, None].to(tl.int64) * (G * K) + width[None, :]
        keys = tl.load(k + place, mask=seen[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        top = tl.maximum(best, tl.max(scores, 1))
        shares = tl.exp2(scores - top[:, None])
        fade = tl.exp2(best - top)
        values = tl.load(v + place, mask=seen[:, None], other=0.0)
        mixed = tl.dot(shares.to(values.dtype), values, mixed * fade[:, None])
        total = total * fade + tl.sum(shares, 1)
        best = top
    some = total > 0
    part = s * tl.num_programs(0) // G * T * H + at
    mean = mixed / tl.where(some, total, 1.0)[:, None]
    tl.store(out + part[:, None].to(tl.int64) * K + width[None, :], mean, mask=there[:, None])
    tl.store(sums + part, tl.where(some, best + tl.log2(total), -float("inf")), mask=there)


@triton.jit
def combine(parts, sums, out, N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr):
    """Program n: the mean of a query's parts, weighted by their normalisers."""
    n = tl.program_id(0)
    split, width = tl.arange(0, SPLITS), tl.arange(0, K)
    power = tl.load(sums + split * N + n)
    most = tl.max(power)
    weights = tl.exp2(power - tl.where(most > -float("inf"), most, 0.0))
    parts += (split[:, None].to(tl.int64) * N + n) * K + width[None, :]
    mixed = tl.sum(tl.load(parts) * weights[:, None], 0) / tl.maximum(tl.sum(weights), 1e-30)
    tl.store(out + n * K + width, mixed.to(out.dtype.element_ty))
