"""Accuracy against speed: the Pareto front of decode settings, and the area under it (AUP)."""

import math
from collections.abc import Sequence

Point = tuple[float, float]
"""Tokens per forward, accuracy in percent."""


def front(points: Sequence[Point]) -> list[int]:
    """Indices, from slow to fast, of the points that no other beats on both counts."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    kept: list[int] = []
    best = -math.inf
    for i in order:
        if points[i][1] > best:
            kept.append(i)
            best = points[i][1]
    return kept[::-1]


def aup(points: Sequence[Point], best: float, alpha: float = 3.0, tolerance: float = 5.0) -> float:
    """Accuracy under parallelism, d3LLM's measure: an area under accuracy over tokens per forward.

    Points are sorted by tokens per forward r; those more than `tolerance` points below the accuracy
    y of the slowest one are left out. AUP = r1 y1 + sum of trapezoids (r_i - r_{i-1}) (y_i W(y_i) +
    y_{i-1} W(y_{i-1})) / 2, where W(y) = min(exp(-alpha (1 - y/best)), 1) makes little of speed
    that costs accuracy; `best` is the best accuracy of any model on the task. Without any speed-up
    it is the accuracy itself. 0 where nothing was right.
    """
    ordered = sorted(points)
    if not ordered or best <= 0:
        return 0.0
    least = ordered[0][1] - tolerance
    ordered = [(r, y) for r, y in ordered if y >= least]
    worth = [y * min(math.exp(-alpha * (1 - y / best)), 1.0) for _, y in ordered]
    area = ordered[0][0] * ordered[0][1]
    for i in range(1, len(ordered)):
        area += (ordered[i][0] - ordered[i - 1][0]) * (worth[i] + worth[i - 1]) / 2
    return area
