"""LLaDA2's generate: a predicted [MASK] counts as one of the step's tokens, and stays a mask."""

import dataclasses

import jax

from jdllm.decode import DecodeConfig, Setup
from jdllm.model.config import ModelConfig
from jdllm.model.head import Special
from jdllm.unmask import Carry, Decision, Rule, Unmasker, View


@dataclasses.dataclass(frozen=True)
class PredictsMask:
    """The rule `inner`, but a column that takes [MASK] is open again."""

    inner: Rule
    mask_id: int

    @property
    def special(self) -> Special | None:
        return self.inner.special

    def start(self, rows: int, columns: int, calls: int) -> Carry:
        return self.inner.start(rows, columns, calls)

    def wants(self, open_B: jax.Array, carry: Carry) -> jax.Array:
        return self.inner.wants(open_B, carry)

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
