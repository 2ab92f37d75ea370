"""A record of consecutive model calls, kept on the device where somebody asks for it."""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.decode.feed import guided
from jdllm.decode.setup import Setup
from jdllm.decode.step import Seen
from jdllm.model.model import Model
from jdllm.unmask import Decision

PREFILL, FULL, STEP, COMMIT = range(4)
"""Kinds of model calls: the prompt's keys, all columns, a window, a finished block's keys."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """At most C calls; N is the number of columns in view."""

    first: jax.Array
    """int32: calls of the request before the first one recorded."""
    tokens: jax.Array
    """int32 [C + 1, B, T]: the canvas before every call, then the final one."""
    kind: jax.Array
    """int32 [C]: PREFILL, FULL, STEP or COMMIT."""
    columns: jax.Array
    """int32 [C, B, N]: the columns in view, -1 where nothing was decoded."""
    candidates: jax.Array
    """int32 [C, B, N]: the token that each of them would take."""
    confidence: jax.Array
    """float32 [C, B, N]: its probability, before any rule has changed the logits."""
    entropy: jax.Array
    """float32 [C, B, N]: in nats."""

    @classmethod
    def empty(cls, setup: Setup, tokens_BT: jax.Array, calls: int, first: jax.Array) -> "Trace":
        """Room for a record of `calls` calls, from the one that `first` calls precede."""
        (B, T), C, N = tokens_BT.shape, calls, setup.view.length(tokens_BT.shape[1])
        return cls(
            first=first,
            tokens=jnp.zeros((C + 1, B, T), jnp.int32),
            kind=jnp.zeros(C, jnp.int32),
            columns=jnp.full((C, B, N), -1, jnp.int32),
            candidates=jnp.zeros((C, B, N), jnp.int32),
            confidence=jnp.zeros((C, B, N)),
            entropy=jnp.zeros((C, B, N)),
        )

    def called(self, forwards: jax.Array, tokens_BT: jax.Array, kind: int) -> "Trace":
        """With the canvases before a call, and its kind."""
        i = forwards - self.first
        return dataclasses.replace(
            self, tokens=self.tokens.at[i].set(tokens_BT), kind=self.kind.at[i].set(kind)
        )

    def seen(
        self,
        forwards: jax.Array,
        model: Model,
        setup: Setup,
        seen: Seen,
        decision: Decision,
    ) -> "Trace":
        """With what a call has shown, and what was decided."""
        i = forwards - self.first
        log_p = jax.nn.log_softmax(guided(model, setup, seen.hidden_BND), axis=-1)
        own_BN = jnp.take_along_axis(log_p, decision.candidate_BN[..., None], axis=-1)[..., 0]
        entropy_BN = -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, -1e9), axis=-1)
        return dataclasses.replace(
            self,
            columns=self.columns.at[i].set(seen.columns_BN),
            candidates=self.candidates.at[i].set(decision.candidate_BN),
            confidence=self.confidence.at[i].set(jnp.exp(own_BN)),
            entropy=self.entropy.at[i].set(entropy_BN),
        )

    def closed(self, forwards: jax.Array, tokens_BT: jax.Array) -> "Trace":
        """With the canvases behind the last call."""
        tokens = self.tokens.at[forwards - self.first].set(tokens_BT)
        return dataclasses.replace(self, tokens=tokens)
