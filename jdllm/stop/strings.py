"""A row ends where its text holds a stop string, as far as token ids alone can tell.

Ids can only prove that a string is there, never that it is not: whoever cuts the text on the host
has the last word, and this rule only saves the forwards that the cut would throw away.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jdllm.stop.rule import Look, Stop


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """`inner`, and a row also ends once a marked sequence of ids has no mask before its end.

    Every sequence must decode to text that holds a stop string. The text up to there can change no
    more, so a completion is the same with this rule and without it; eos fills the rest.
    """

    inner: Stop
    eos_id: int
    sequences: tuple[tuple[int, ...], ...]

    def start(self, tokens_BT: jax.Array) -> Any:
        return self.inner.start(tokens_BT)

    def __call__(
        self, tokens_BT: jax.Array, look: Look, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        tokens_BT, done_B, carry = self.inner(tokens_BT, look, carry)
        B, T = tokens_BT.shape
        hit_BT = jnp.zeros((B, T), bool)  # at the last id of a sequence
        for length in sorted({len(sequence) for sequence in self.sequences}):
            wanted_NL = jnp.array([s for s in self.sequences if len(s) == length])
            if length > T:
                continue
            match_BTN = jnp.ones((B, T - length + 1, len(wanted_NL)), bool)
            for i in range(length):
                own_BT = jnp.where(look.generated_BT, tokens_BT, -1)[:, i : T - length + 1 + i]
                match_BTN &= own_BT[..., None] == wanted_NL[:, i]
            hit_BT = hit_BT.at[:, length - 1 :].max(jnp.any(match_BTN, -1))
        open_BT = look.generated_BT & (tokens_BT == look.mask_id)
        columns_T = jnp.arange(T)
        end_B = jnp.min(jnp.where(hit_BT, columns_T, T), axis=1)
        ended_B = end_B < jnp.min(jnp.where(open_BT, columns_T, T), axis=1)
        behind_BT = look.generated_BT & (columns_T > end_B[:, None]) & ended_B[:, None]
        return jnp.where(behind_BT, self.eos_id, tokens_BT), done_B | ended_B, carry
