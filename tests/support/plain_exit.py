"""The twin's exits: EDIT's history of values and its rivals, one block of one row at a time."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from jdllm import DecodeConfig
from tests.support.plain_model import softmax

if TYPE_CHECKING:
    from tests.support.oracle import Row

USUAL = {
    "code": (0.05, 6, 2), "paper": (0.05, 6, 2), "step": (0.0, 1, 0), "unchanged": (0.0, 3, 0),
    "entropy": (0.1, 1, 0), "prophet": (1.0, 1, 0), "sched": (1.0, 1, 0),
}  # fmt: skip
"""Threshold, patience and polish of a mode."""


def of_block(values, number: int, usual):
    return values[min(number, len(values) - 1)] if values else usual


@dataclasses.dataclass
class PlainExit:
    """One block's exit."""

    config: DecodeConfig
    number: int
    """Of the block."""
    steps: int
    """That its schedule has."""
    opened: int
    """Columns that were open when it began."""
    first: int
    """Its first column; columns below are counted from it."""
    length: int
    due: int = -1
    """Calls in which the block is to be finished."""
    calm: list[bool] = dataclasses.field(default_factory=list)
    before: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Activations [N, F] of the call before, by module."""
    visible: list[int] = dataclasses.field(default_factory=list)
    tokens: dict[int, int] = dataclasses.field(default_factory=dict)

    def fires(
        self, row: "Row", logits: np.ndarray, asked: list[int], settled: list[int], calls: int
    ) -> bool:
        """Returns whether to finish the block from here, after its `calls`-th call."""
        own = self.config.exit
        threshold, patience, _ = USUAL[own.mode]
        threshold = of_block(own.threshold, self.number, threshold)
        patience = of_block(own.patience, self.number, patience)
        required = of_block(own.required, self.number, patience)
        self.calm.append(self.is_calm(row, logits, asked, settled, calls, threshold))
        recent = self.calm[-patience:]
        return self.due < 0 and len(self.calm) >= patience and sum(recent) >= required

    def polish(self) -> int:
        return of_block(self.config.exit.polish, self.number, USUAL[self.config.exit.mode][2])

    def is_calm(
        self, row: "Row", logits: np.ndarray, asked: list[int], settled: list[int], calls: int,
        threshold: float,
    ) -> bool:  # fmt: skip
        mode = self.config.exit.mode
        if mode in ("code", "paper"):
            return self.divergence(row, settled) < threshold
        if mode == "step":
            return calls >= threshold
        if mode == "unchanged":
            still = [i for i in row.now if row.tokens[i] == row.facts.mask_id]
            changed = sum(self.tokens.get(i) != row.now[i] for i in still)
            first, self.tokens = not self.tokens, dict(row.now)
            return not first and changed / max(len(still), 1) <= threshold
        p = softmax(logits)
        if mode == "entropy":
            entropy = -(p * np.log(p + 1e-10)).sum(-1)
            return bool(np.mean([entropy[i] for i in asked] or [0.0]) < threshold)
        allowed = np.delete(logits, row.facts.mask_id, axis=1)
        best = np.sort(allowed, axis=1)
        margin = np.mean([best[i, -1] - best[i, -2] for i in asked] or [0.0])
        return bool(margin >= threshold * self.bar(calls))

    def bar(self, calls: int) -> float:
        if self.config.exit.mode == "prophet":
            return 7.5 if 3 * calls < self.steps else 5.0 if 3 * calls < 2 * self.steps else 2.5
        share = (calls - 1) / max(self.steps - 1, 1)
        falls = {
            "cosine": (1 + np.cos(np.pi * share)) / 2,
            "linear": 1 - share,
            "exponential": np.exp(-4 * share),
        }
        return 2.5 + 5.0 * falls[self.config.exit.curve]

    def divergence(self, row: "Row", settled: list[int]) -> float:
        """Returns EDIT's value, with the activations of B in full."""
        now = {name: row.model.seen[name][self.first :] for name in row.maps}
        before, self.before = self.before, now
        both, self.visible = [i for i in settled if i in self.visible], settled
        heat = self.config.exit.temperature
        if heat is None:
            heat = min(max(2 - 1.9 * self.opened / self.length, 0.1), 2.0)
        if not before:
            return np.inf
        values = []
        for name, map_FR in row.maps.items():
            new, old = (cosines(x, map_FR) for x in (now[name], before[name]))
            if self.config.exit.mode == "code":
                p, q = softmax(old / heat) + 1e-8, softmax(new / heat) + 1e-8
                kl = (p * np.log(p / q)).sum(-1)
                values.append(sum(kl[i] for i in settled) / max(len(settled), 1e-6))
            elif both:
                p, q = (softmax(x[both, 0] / heat) + 1e-8 for x in (old, new))
                values.append((p * np.log(p / q)).sum())
            else:
                values.append(0.0)
        return float(np.mean(values))


def cosines(x_WF: np.ndarray, map_FR: np.ndarray) -> np.ndarray:
    x = x_WF / np.maximum(np.linalg.norm(x_WF, axis=1, keepdims=True), 1e-12)
    return x @ (map_FR / np.maximum(np.linalg.norm(map_FR, axis=0), 1e-12))
