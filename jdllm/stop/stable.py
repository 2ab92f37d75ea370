"""A block is filled when what would be written into it no longer changes."""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.stop.rule import Look, Verdict, fill_block

Memory = tuple[jax.Array, jax.Array]
"""Candidates by column [B, T] after the last step, and for how many steps they were alike [B]."""


@dataclasses.dataclass(frozen=True)
class Stable:
    """A block is filled once what its open columns would take stayed the same for `steps` steps.

    What would be unmasked one by one anyway is taken at once.
    """

    steps: int

    def start(self, tokens_BT: jax.Array) -> Memory:
        return jnp.full_like(tokens_BT, -1), jnp.zeros(tokens_BT.shape[0], jnp.int32)

    def __call__(self, look: Look, carry: Memory) -> Verdict:
        before_BT, streak_B = carry
        none_B = jnp.zeros(streak_B.shape, bool)
        if look.closing:
            return Verdict(look.tokens_BT, none_B, none_B, carry)
        open_BT = look.block_BT & look.open_BT
        same_B = jnp.all(~open_BT | (look.candidates_BT == before_BT), 1)
        streak_B = jnp.where(same_B, streak_B + 1, 0)
        tokens_BT = fill_block(look, streak_B >= self.steps)
        memory = jnp.where(look.block_BT, look.candidates_BT, -1), streak_B
        return Verdict(tokens_BT, none_B, none_B, memory)
