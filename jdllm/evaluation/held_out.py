"""What an exit must be measured against: a threshold chosen on other documents, a fixed step.

A threshold that was chosen on the documents it is reported on flatters its rule. And a rule that
leaves early is worth something only if it does better than leaving every document at one and the
same step, with as many calls on average.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from jdllm.decode import Exit
from jdllm.decode.rules import make_exit
from jdllm.evaluation.exit_report import Line
from jdllm.evaluation.exits import FULL, MATCHED, Entry
from jdllm.evaluation.paired import Mixture, Weighed, compare, weigh


def chosen(lines: Sequence[Line], slack: float) -> list[int]:
    """The places of the lines whose scale of thresholds is the best of their rule and map.

    The best is the one with the least steps that loses at most `slack` points of accuracy to full
    decoding; where none is so good, the most accurate.
    """

    def order(place: int) -> tuple[bool, float, float]:
        line = lines[place]
        full = next(one for one in lines if one.entry.rule == FULL and one.beside(line))
        lost = -100 * compare(line.verdicts, full.verdicts).difference
        steps = sum(line.steps) / len(line.steps)
        good = lost <= slack
        return (not good, steps, lost) if good else (not good, lost, steps)

    found: dict[tuple, list[int]] = {}
    for place, line in enumerate(lines):
        key = line.task, line.length, line.entry.schedule, line.entry.rule, line.entry.map
        found.setdefault(key, []).append(place)
    return sorted(min(places, key=order) for places in found.values())


def matched(line: Line) -> tuple[Entry, ...]:
    """Exits at fixed steps, one per block, whose calls stand around the mean calls of a line.

    One of them where the mean is a whole number; none where the line has no exit, or is such a one.
    """
    decode = line.entry.decode
    if not decode.exit.on or decode.exit.mode == "step":
        return ()
    spent = [sample.calls for sample in line.result.samples]
    blocks = range(max(map(len, spent)))
    means = [float(np.mean([own[k] for own in spent if k < len(own)])) for k in blocks]
    last = make_exit(decode).polish
    found = []
    for total in dict.fromkeys((math.floor(sum(means)), math.ceil(sum(means)))):
        calls = enumerate(whole(means, total))
        steps = tuple(float(max(n - last[min(k, len(last) - 1)], 1)) for k, n in calls)
        own = dataclasses.replace(decode, exit=Exit(mode="step", threshold=steps, polish=last))
        found.append(dataclasses.replace(line.entry, rule=MATCHED, map="", decode=own))
    return tuple(found)


def whole(means: Sequence[float], total: int) -> list[int]:
    """Whole numbers near the means that sum to `total`: largest fractions are rounded up first."""
    found = [math.floor(mean) for mean in means]
    order = sorted(range(len(means)), key=lambda k: found[k] - means[k])
    for k in itertools.islice(itertools.cycle(order), max(total - sum(found), 0)):
        found[k] += 1
    return found


def mixture(line: Line, fixed: Sequence[Line]) -> Mixture:
    """The verdicts of one or two fixed steps, in the shares that make as many calls as the line."""
    if len(fixed) == 1:
        return [(fixed[0].verdicts, 1.0)]
    low, high = fixed
    mean, less, more = (float(np.mean(one.steps)) for one in (line, low, high))
    share = min(max((mean - less) / (more - less), 0.0), 1.0) if more > less else 0.0
    return [(low.verdicts, 1 - share), (high.verdicts, share)]


def against(line: Line, fixed: Sequence[Line]) -> Weighed | None:
    """A line beside the mixture of fixed steps that makes as many calls; None without them."""
    return weigh(line.verdicts, mixture(line, fixed)) if fixed else None
