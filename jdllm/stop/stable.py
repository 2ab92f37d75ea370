"""Stable fills a block when its predictions no longer change."""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.stop.rule import StopView, Verdict, fill_block

Memory = tuple[jax.Array, jax.Array]
"""Candidates [B, T] after the last step, and for how many steps they have stayed equal [B]."""


@dataclasses.dataclass(frozen=True)
class Stable:
    """Fills a block once the candidates of its open columns stayed equal for `steps` steps.

    Tokens that the next steps would write one by one are written at once.
    """

    steps: int

    def start(self, tokens_BT: jax.Array) -> Memory:
        return jnp.full_like(tokens_BT, -1), jnp.zeros(tokens_BT.shape[0], jnp.int32)

    def __call__(self, view: StopView, carry: Memory) -> Verdict:
        before_BT, streak_B = carry
        none_B = jnp.zeros(streak_B.shape, bool)
        if view.closing:
            return Verdict(view.tokens_BT, none_B, none_B, carry)
        open_BT = view.block_BT & view.open_BT
        same_B = jnp.all(~open_BT | (view.candidates_BT == before_BT), 1)
        streak_B = jnp.where(same_B, streak_B + 1, 0)
        tokens_BT = fill_block(view, streak_B >= self.steps)
        memory = jnp.where(view.block_BT, view.candidates_BT, -1), streak_B
        return Verdict(tokens_BT, none_B, none_B, memory)
