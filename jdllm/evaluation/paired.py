"""Two decodings of the same documents: what one gains and loses, and whether that is chance."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Paired(NamedTuple):
    """Verdicts of a rule beside those of full decoding."""

    difference: float
    """Accuracy of the rule minus that of full decoding."""
    stderr: float
    """Its standard error, from the documents whose verdict differs."""
    p_value: float
    """McNemar's exact test, two-sided: 1 where no verdict differs."""
    lost: float
    """Share of full decoding's right answers that the rule has wrong."""
    gained: int
    """Documents that the rule alone has right."""


def compare(rule: Sequence[bool], full: Sequence[bool]) -> Paired:
    """Returns the comparison of verdicts on the same documents, in the same order."""
    pairs = list(zip(rule, full, strict=True))
    gained = sum(a and not b for a, b in pairs)
    lost = sum(b and not a for a, b in pairs)
    n, right = len(pairs), sum(full)
    difference = (gained - lost) / n if n else 0.0
    spread = math.sqrt(max(gained + lost - n * difference**2, 0.0)) / n if n else 0.0
    share = lost / right if right else 0.0
    return Paired(difference, spread, mcnemar(gained, lost), share, gained)


class Weighed(NamedTuple):
    """Verdicts of a rule beside a mixture of two others."""

    accuracy: float
    """Of the mixture."""
    difference: float
    """Accuracy of the rule minus that of the mixture."""
    stderr: float
    """Its standard error over the documents."""
    p_value: float
    """McNemar's exact test against the one that has the greater share."""


Mixture = Sequence[tuple[Sequence[bool], float]]
"""Verdicts of several ways on the same documents, and the share of the documents that each has."""


def mixed(ways: Mixture) -> list[float]:
    """Returns what each document gets on average, which is in each way with that probability."""
    shares = [share for _, share in ways]
    return [math.sumprod(own, shares) for own in zip(*(way for way, _ in ways), strict=True)]


def weigh(rule: Sequence[bool], ways: Mixture) -> Weighed:
    """Returns the comparison of verdicts with a mixture on the same documents."""
    other = mixed(ways)
    gaps = [one - two for one, two in zip(rule, other, strict=True)]
    n = len(gaps)
    mean = sum(gaps) / n
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps)) / n
    nearest, _ = max(ways, key=lambda way: way[1])
    return Weighed(sum(other) / n, mean, spread, compare(rule, nearest).p_value)


def mcnemar(gained: int, lost: int) -> float:
    """Returns how likely a split of the differing verdicts at least so uneven is by chance."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    return min(2 * tail, 1.0)


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the value that `percent` of the values do not exceed, between the nearest two."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
