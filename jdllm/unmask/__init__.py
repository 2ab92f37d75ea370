"""Unmasking rules decide which masked positions take which tokens, given the block's logits.

A rule is composed of a candidate (which token), a confidence (how sure the model is of it), a
selection (which positions) and a schedule (how many). Rules know only arrays, and rows never depend
on each other.
"""

from jdllm.unmask.candidate import Argmax, Gumbel, Warp
from jdllm.unmask.confidence import (
    Confidence,
    Leftmost,
    Margin,
    NegativeEntropy,
    Probability,
    Random,
    Tempered,
)
from jdllm.unmask.credit import Credit
from jdllm.unmask.edit import Edit
from jdllm.unmask.klass import Klass
from jdllm.unmask.rule import Carry, Decision, Rule, Sampled, Unmasker
from jdllm.unmask.schedule import (
    CarryOver,
    Columns,
    Each,
    Gaussian,
    Masks,
    Pace,
    Schedule,
    Timesteps,
    split_quota,
)
from jdllm.unmask.selection import (
    Allowance,
    EntropyBound,
    Factor,
    Hierarchy,
    Quota,
    Selection,
    Share,
    Threshold,
)
from jdllm.unmask.view import Draw, Verify, View

__all__ = [
    "Allowance", "Argmax", "Carry", "CarryOver", "Columns", "Confidence", "Credit", "Decision",
    "Draw", "Each", "Edit", "EntropyBound", "Factor", "Gaussian", "Gumbel", "Hierarchy",
    "Klass", "Leftmost", "Margin", "Masks", "NegativeEntropy", "Pace", "Probability",
    "Quota", "Random", "Rule", "Sampled", "Schedule", "Selection", "Share", "Tempered", "Threshold",
    "Timesteps", "Unmasker", "Verify", "View", "Warp", "split_quota",
]  # fmt: skip
