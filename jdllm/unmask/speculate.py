"""Adaptive parallel decoding: a causal verifier decides how much of the draft is kept (APD)."""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.unmask.candidate import Warp
from jdllm.unmask.confidence import Probability
from jdllm.unmask.rule import Carry, Decision
from jdllm.unmask.view import View, gumbel, without


@dataclasses.dataclass(frozen=True)
class Speculate:
    """Keeps the longest prefix of the draft that a mixture of both models would have drawn, too.

    The diffusion model drafts. The target is drawn from weight * diffusion + (1 - weight) *
    verifier logits, both before the draft's warp, over the ids that both models know, with the
    draft's warp and noise. The first masked position is always kept and counts as agreed. The
    reference applies neither warp nor noise to the target (`greedy_target`).
    """

    excluded: tuple[int, ...]
    weight: float
    noise: float = 0.0
    """Scale of the Gumbel noise; 0 means greedy."""
    greedy_target: bool = False
    warp: Warp | None = None

    @property
    def special(self) -> None:
        """Returns None: this rule reads logits."""
        return None

    @property
    def sampled(self) -> None:
        """Returns None, as it reads logits."""
        return None

    def start(self, rows: int, columns: int, calls: int) -> Carry:
        return {}

    def wants(self, open_B: jax.Array, carry: Carry) -> jax.Array:
        return open_B > 0

    def __call__(self, view: View, carry: Carry) -> tuple[Decision, Carry]:
        assert view.verify is not None  # make_setup and the loop see to it
        known = min(view.logits_BNV.shape[-1], view.verify.vocab)
        logits = view.logits_BNV.astype(jnp.float32)[..., :known]
        noise = 0.0
        if self.noise:
            noise = self.noise * gumbel(view.draw(view.logits_BNV.shape[1:])[..., :known])
        warped = self._warped(logits)
        draft_BN = self._best(warped + noise)
        known_BN = jnp.where(view.open_BN, draft_BN, view.ids_BN)
        verifier, cache = view.verify.logits(known_BN, carry["verifier"])
        mixed = self.weight * logits + (1 - self.weight) * verifier[..., :known]
        if not self.greedy_target:
            mixed = self._warped(mixed) + noise
        forced_BN = jnp.cumsum(view.open_BN, axis=-1) == 1
        differs_BN = view.open_BN & ~forced_BN & (self._best(mixed) != draft_BN)
        chosen_BN = view.open_BN & (jnp.cumsum(differs_BN, axis=-1) == 0)
        new_BN = jnp.where(chosen_BN, draft_BN, view.ids_BN)
        confidence = Probability()
        value_BN = confidence.value(confidence(warped, draft_BN, view.draw))
        open_BN = view.open_BN & ~chosen_BN
        return Decision(new_BN, open_BN, draft_BN, value_BN), carry | {"verifier": cache}

    def _warped(self, logits: jax.Array) -> jax.Array:
        return self.warp(logits) if self.warp else logits

    def _best(self, logits: jax.Array) -> jax.Array:
        return jnp.argmax(without(logits, self.excluded), axis=-1).astype(jnp.int32)
