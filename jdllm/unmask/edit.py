"""Token editing (LLaDA2.1, SGLang's JointThreshold): tokens already there may be replaced."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.unmask.view import View


class Edits(NamedTuple):
    """What a block remembers of its editing."""

    passes_B: jax.Array
    """Calls that began without a mask."""
    finished_B: jax.Array
    """Nothing was left to unmask or to edit."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replaces a generated token of the block once another one's probability is above `threshold`.

    A block is finished when a call that began with nothing open edits nothing, or after `passes`
    such calls. LLaDA2.1 does not make the call that would exceed them; where it is made all the
    same, as in SGLang, its result is dropped.
    """

    threshold: float
    passes: int = 16
    penalty: float = 0.0
    """Taken off the logit of the left neighbour's token, against repetition (SGLang)."""

    def start(self, rows: int) -> Edits:
        return Edits(jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))

    def wants(self, open_B: jax.Array, state: Edits) -> jax.Array:
        """Rows that want another call [B]."""
        return (open_B > 0) | (~state.finished_B & (state.passes_B < self.passes))

    def discourage(self, logits_BNV: jax.Array, ids_BN: jax.Array) -> jax.Array:
        """Logits with the penalty on every position's left neighbour."""
        if not self.penalty:
            return logits_BNV
        repeated = ids_BN[:, :-1, None] == jnp.arange(logits_BNV.shape[-1])
        return logits_BNV.at[:, 1:].add(-self.penalty * repeated)

    def __call__(
        self, new_BN: jax.Array, ids_BN: jax.Array, p_BN: jax.Array, view: View, old: Edits
    ) -> tuple[jax.Array, Edits]:
        """The block after unmasking [B, N] with edits applied, and the new state."""
        began_clean_B = ~jnp.any(view.open_BN, axis=-1)
        passes_B = old.passes_B + began_clean_B
        spent_B = began_clean_B & (passes_B > self.passes)
        edits_BN = view.settled_BN & (p_BN > self.threshold) & (ids_BN != view.ids_BN)
        edits_BN &= ~(spent_B | old.finished_B)[:, None]
        idle_B = began_clean_B & ~jnp.any(edits_BN, axis=-1)
        edited_BN = jnp.where(edits_BN, ids_BN, new_BN)
        return edited_BN, Edits(passes_B, old.finished_B | idle_B | spent_B)
