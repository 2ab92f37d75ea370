"""LLaDA2's generate: a predicted [MASK] counts as one of the step's tokens, and stays a mask."""

import dataclasses

from jdllm.decode import DecodeConfig, Setup
from jdllm.model.config import ModelConfig
from jdllm.parity.calls import Around
from jdllm.unmask import Carry, Decision, Unmasker, View


@dataclasses.dataclass(frozen=True)
class PredictsMask(Around):
    """The rule `inner`, but a column that takes [MASK] is open again."""

    mask_id: int

    def __call__(self, view: View, carry: Carry) -> tuple[Decision, Carry]:
        decision, carry = self.inner(view, carry)
        mine_BN = view.open_BN | view.settled_BN
        return decision._replace(open_BN=mine_BN & (decision.ids_BN == self.mask_id)), carry


def copy(setup: Setup, config: DecodeConfig, model: ModelConfig) -> Setup:
    """Returns the setup of LLaDA2's loop."""
    rule = setup.unmask
    if isinstance(rule, Unmasker):
        warp = rule.warp and dataclasses.replace(rule.warp, excluded=())
        candidate = dataclasses.replace(rule.candidate, excluded=())  # type: ignore[type-var]
        rule = dataclasses.replace(rule, candidate=candidate, warp=warp)
    return dataclasses.replace(setup, unmask=PredictsMask(rule, model.mask_id))
