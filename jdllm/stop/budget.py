"""Budget ends a row after a number of model evaluations."""

import dataclasses

import jax

from jdllm.stop.rule import Forgetful, StopView, fill_block


@dataclasses.dataclass(frozen=True)
class Budget(Forgetful):
    """Ends a row after `forwards` model evaluations.

    The last one fills its block; blocks that were never begun stay open.
    """

    forwards: int

    def judge(self, view: StopView) -> tuple[jax.Array, jax.Array]:
        spent_B = view.nfe_B >= self.forwards
        return fill_block(view, spent_B), spent_B
