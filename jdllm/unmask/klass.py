"""KLASS: a position is filled once its whole distribution has stood still for some steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

NOTHING = -1e30  # log-probabilities before the first call: any distribution is far from them


@dataclasses.dataclass(frozen=True)
class Klass:
    """Finds positions whose KL(now || before) was below `kl` in each of the last `steps` calls.

    Memory: log-probabilities [B, N, V] of the call before, and how long they have stood still.
    """

    kl: float
    steps: int
    vocab: int

    def start(self, rows: int, columns: int) -> dict[str, Any]:
        return {
            "log_p": jnp.full((rows, columns, self.vocab), NOTHING),
            "calm": jnp.zeros((rows, columns), jnp.int32),
        }

    def __call__(
        self, logits_BNV: jax.Array, carry: dict[str, Any]
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the positions that stand still, bool [B, N], and the memory after this call."""
        log_p = jnp.maximum(jax.nn.log_softmax(logits_BNV, axis=-1), NOTHING)
        kl_BN = jnp.sum(jnp.exp(log_p) * (log_p - carry["log_p"]), axis=-1)
        calm_BN = jnp.where(kl_BN < self.kl, carry["calm"] + 1, 0)
        return calm_BN >= self.steps, {"log_p": log_p, "calm": calm_BN}
