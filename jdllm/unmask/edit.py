"""Token editing (LLaDA2.1, SGLang's JointThreshold): a token that was written may be replaced."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.unmask.view import View


class Edits(NamedTuple):
    """The state of a block's editing."""

    passes_B: jax.Array
    """Calls that began without an open position."""
    finished_B: jax.Array
    """Rows whose block has nothing left to unmask or to edit."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replaces a generated token of the block where another has a probability above `threshold`.

    A block is finished when a call that began with nothing open edits nothing, or after `passes`
    such calls. LLaDA2.1 does not make the call that would exceed them; SGLang makes it and drops
    its result.
    """

    threshold: float
    passes: int = 16
    penalty: float = 0.0
    """Subtracted from the logit of the left neighbour's token, against repetition (SGLang)."""

    def start(self, rows: int) -> Edits:
        return Edits(jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))

    def wants(self, open_B: jax.Array, state: Edits) -> jax.Array:
        """Returns the rows whose block needs another call, bool [B]."""
        return (open_B > 0) | (~state.finished_B & (state.passes_B < self.passes))

    def discourage(self, logits_BNV: jax.Array, ids_BN: jax.Array) -> jax.Array:
        """Returns logits in which every position penalises its left neighbour's token."""
        if not self.penalty:
            return logits_BNV
        repeated = ids_BN[:, :-1, None] == jnp.arange(logits_BNV.shape[-1])
        return logits_BNV.at[:, 1:].add(-self.penalty * repeated)

    def __call__(
        self, new_BN: jax.Array, ids_BN: jax.Array, p_BN: jax.Array, view: View, old: Edits
    ) -> tuple[jax.Array, Edits]:
        """Returns the block after unmasking [B, N] with edits applied, and the new state."""
        began_clean_B = ~jnp.any(view.open_BN, axis=-1)
        passes_B = old.passes_B + began_clean_B
        spent_B = began_clean_B & (passes_B > self.passes)
        edits_BN = view.settled_BN & (p_BN > self.threshold) & (ids_BN != view.ids_BN)
        edits_BN &= ~(spent_B | old.finished_B)[:, None]
        idle_B = began_clean_B & ~jnp.any(edits_BN, axis=-1)
        edited_BN = jnp.where(edits_BN, ids_BN, new_BN)
        return edited_BN, Edits(passes_B, old.finished_B | idle_B | spent_B)
