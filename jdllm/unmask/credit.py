"""dInfer's credit decoding: a token that was a position's best in earlier steps gains logits."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Credits(NamedTuple):
    """The memory of every position: at most one token per call, not a whole vocabulary."""

    tokens_BNS: jax.Array
    """Tokens that were the best, -1 where the slot is free."""
    credit_BNS: jax.Array
    """The credit of each of these tokens."""
    calls_B: jax.Array
    """Calls made for the block."""


@dataclasses.dataclass(frozen=True)
class Credit:
    """Adds alpha * log(1 + credit) to the logits of tokens that were the best before.

    In each call all credit is multiplied by beta, then the best token of each masked position gains
    p ** gamma. Credit starts at zero in every block of every request; in the reference it leaks
    into the next request of the same shape when a run stops early.
    """

    alpha: float = 0.7
    beta: float = 0.8
    gamma: float = 0.2

    def start(self, rows: int, columns: int, calls: int) -> Credits:
        """Returns zero credit with room for `calls` calls per block."""
        tokens = jnp.full((rows, columns, calls), -1, jnp.int32)
        return Credits(tokens, jnp.zeros(tokens.shape), jnp.zeros(rows, jnp.int32))

    def __call__(
        self, logits_BNV: jax.Array, masked_BN: jax.Array, old: Credits
    ) -> tuple[jax.Array, Credits]:
        """Returns logits with credit added, and the credit after this call."""
        V = logits_BNV.shape[-1]
        top_BN = jnp.argmax(logits_BNV, axis=-1)
        gain_BN = jnp.max(jax.nn.softmax(logits_BNV, axis=-1), axis=-1) ** self.gamma
        known_BNS = old.tokens_BNS == top_BN[..., None]
        fresh_BN1 = ~jnp.any(known_BNS, axis=-1, keepdims=True)
        slot_BNS = jnp.arange(old.tokens_BNS.shape[-1]) == old.calls_B[:, None, None]
        taken_BNS = (known_BNS | (fresh_BN1 & slot_BNS)) & masked_BN[..., None]
        credit_BNS = old.credit_BNS * self.beta + jnp.where(taken_BNS, gain_BN[..., None], 0.0)
        tokens_BNS = jnp.where(taken_BNS, top_BN[..., None], old.tokens_BNS)
        new = Credits(tokens_BNS, credit_BNS, old.calls_B + 1)
        targets_BNS = jnp.where(tokens_BNS < 0, V, tokens_BNS)
        bonus_BNS = self.alpha * jnp.log1p(credit_BNS)
        fused_BNV = jax.vmap(jax.vmap(lambda row, at, plus: row.at[at].add(plus, mode="drop")))(
            logits_BNV, targets_BNS, bonus_BNS
        )
        return fused_BNV, new
