"""A row ends when it has had its share of model evaluations."""

import dataclasses

import jax

from jdllm.stop.rule import Forgetful, Look, fill_block


@dataclasses.dataclass(frozen=True)
class Budget(Forgetful):
    """A row ends after `forwards` model evaluations.

    The last one fills its block; blocks that were never begun stay open.
    """

    forwards: int

    def judge(self, look: Look) -> tuple[jax.Array, jax.Array]:
        spent_B = look.nfe_B >= self.forwards
        return fill_block(look, spent_B), spent_B
