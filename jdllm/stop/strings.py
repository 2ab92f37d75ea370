"""StopStrings ends a row whose text holds a stop string, as far as token ids can tell.

Ids can prove that a string is there, never that it is not. The host decides when it cuts the text
(completion.py); this rule only saves model calls whose tokens the cut would throw away.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jdllm.stop.rule import Stop, StopView, Verdict, after, first


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """Ends rows as `inner` does, and once one of `sequences` has no open column before its end.

    Every sequence must decode to text that holds a stop string. The text up to there cannot change
    any more, so a completion is the same with this rule and without it; eos fills the rest.
    """

    inner: Stop
    eos_id: int
    sequences: tuple[tuple[int, ...], ...]

    def start(self, tokens_BT: jax.Array) -> Any:
        return self.inner.start(tokens_BT)

    def __call__(self, view: StopView, carry: Any) -> Verdict:
        verdict = self.inner(view, carry)
        tokens_BT = verdict.tokens_BT
        open_BT = view.open_BT & (tokens_BT == view.tokens_BT)
        B, T = tokens_BT.shape
        hit_BT = jnp.zeros((B, T), bool)  # at the last id of a sequence
        written_BT = jnp.where(view.generated_BT & ~open_BT, tokens_BT, -1)
        for length in sorted({len(sequence) for sequence in self.sequences}):
            wanted_NL = jnp.array([s for s in self.sequences if len(s) == length])
            if length > T:
                continue
            match_BTN = jnp.ones((B, T - length + 1, len(wanted_NL)), bool)
            for i in range(length):
                own_BT = written_BT[:, i : T - length + 1 + i]
                match_BTN &= own_BT[..., None] == wanted_NL[:, i]
            hit_BT = hit_BT.at[:, length - 1 :].max(jnp.any(match_BTN, -1))
        ended_B = first(hit_BT) < first(open_BT)
        behind_BT = view.generated_BT & after(hit_BT) & ended_B[:, None]
        tokens_BT = jnp.where(behind_BT, self.eos_id, tokens_BT)
        return verdict._replace(tokens_BT=tokens_BT, end_row_B=verdict.end_row_B | ended_B)
