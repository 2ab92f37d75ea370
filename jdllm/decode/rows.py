"""Rows: what decoding starts from, and everything that a step changes. Every array leads with the
rows, and each row is at its own block of its own request.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from jdllm.decode.layout import put, take
from jdllm.model.cache import Cache
from jdllm.stop.rule import Verdict
from jdllm.unmask import Carry, Decision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefixes:
    """What rows begin with, computed before: exact where no later column can change its keys."""

    cache: Cache
    """L arrays [F, P, G, K]: the first P columns, whole blocks, of F different beginnings."""
    which: jax.Array
    """int32 [B]: which of them each row has."""

    @property
    def length(self) -> int:
        """P."""
        return self.cache.length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What decoding starts from: one row per prompt."""

    tokens: jax.Array
    """int32 [B, T]: prompt, then masks up to the row's canvas length, then padding."""
    prompt_lengths: jax.Array
    """int32 [B]."""
    keys: jax.Array
    """Random keys [B], one per row, so that draws do not depend on batch mates."""
    idle: jax.Array
    """bool [B]: rows that only fill up the batch."""
    recorded: jax.Array | None = None
    """Uniform draws to use instead of the keys: [forwards, B, T] or [forwards, B, T, V]."""
    prefixes: Prefixes | None = None
    """Read by cache=block: the prefill covers what is behind them."""
    aims: Any = None
    """What exit.mode=code and paper compare activations with, by module (jdllm.stop.dynamics)."""
    ends: jax.Array | None = None
    """int32 [B]: columns of canvases that are shorter than the rules say, whole blocks of them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Canvases in work [prompt | generated columns | padding], and what is known of each."""

    tokens: jax.Array
    """int32 [B, T]."""
    open: jax.Array
    """bool [B, T]: columns that are still to be filled. A [MASK] in a prompt is text."""
    free: jax.Array
    """bool [B, T]: columns that were open at the start; the others are given."""
    prompt: jax.Array
    """int32 [B]: columns of the prompt."""
    end: jax.Array
    """int32 [B]: the column where the canvas ends and the padding begins."""
    keys: jax.Array
    """Random keys [B]."""
    done: jax.Array
    """bool [B]: nothing in the row changes any more."""
    nfe: jax.Array
    """int32 [B]: model evaluations made while the row was unfinished."""
    block: jax.Array
    """int32 [B]: number of the block in work."""
    first: jax.Array
    """int32 [B]: its first column."""
    last: jax.Array
    """int32 [B]: the column behind its last one; both may lie beyond `end`."""
    step: jax.Array
    """int32 [B]: calls made for the block, an opening full pass included."""
    opened: jax.Array
    """int32 [B]: columns that were open when the block began."""
    left: jax.Array
    """bool [B]: a stop rule has left the block; it gets no further call."""
    due: jax.Array
    """int32 [B]: calls in which a stop rule wants the block finished; -1 where none has said so."""
    dirty: jax.Array
    """bool [B]: the last call changed the row, so its keys are not those of its tokens."""
    accepted: jax.Array
    """int32 [B]: tokens that the last call wrote."""
    unmask: Carry
    """What the unmasking rule remembers."""
    stop: Any
    """What the stop rule remembers."""
    inputs: jax.Array | None = None
    """[B, T, D]: what is fed instead of embedded tokens, where inputs are smoothed."""
    calls: jax.Array | None = None
    """int32 [B, blocks]: calls of each block that has ended, where a driver notes them."""
    exits: jax.Array | None = None
    """bool [B, blocks]: blocks that a stop rule left before their schedule ended."""

    @property
    def columns_T(self) -> jax.Array:
        """The number of every column."""
        return jnp.arange(self.tokens.shape[1])

    @property
    def limit(self) -> jax.Array:
        """int32 [B]: the column where the block ends, within the canvas."""
        return jnp.minimum(self.last, self.end)

    @property
    def generated_BT(self) -> jax.Array:
        """Columns behind the prompt, before the padding."""
        return (self.columns_T >= self.prompt[:, None]) & (self.columns_T < self.end[:, None])

    @property
    def block_BT(self) -> jax.Array:
        """Columns of the block in work."""
        return (self.columns_T >= self.first[:, None]) & (self.columns_T < self.limit[:, None])

    @property
    def open_B(self) -> jax.Array:
        """How many columns of the block are open."""
        return jnp.sum(self.open & self.block_BT, axis=1)

    def written(
        self, columns_BN: jax.Array, decision: Decision, memory: Carry, active_B: jax.Array
    ) -> Self:
        """The active rows after a call, with what a rule decided for the columns in view."""
        old_BN = take(self.tokens, columns_BN)
        new_BN = jnp.where(active_B[:, None], decision.ids_BN, old_BN)
        inside_BN = active_B[:, None] & (columns_BN < self.limit[:, None])
        open_BN = jnp.where(inside_BN, decision.open_BN, take(self.open, columns_BN))
        changed_BN = new_BN != old_BN
        return dataclasses.replace(
            self,
            tokens=put(self.tokens, new_BN, columns_BN),
            open=put(self.open, open_BN, columns_BN),
            nfe=self.nfe + active_B,
            step=self.step + active_B,
            due=jnp.where(active_B & (self.due > 0), self.due - 1, self.due),
            dirty=jnp.where(active_B, jnp.any(changed_BN, axis=1), self.dirty),
            accepted=jnp.where(active_B, jnp.sum(changed_BN, axis=1), self.accepted),
            unmask=keep(active_B, memory, self.unmask),
        )

    def judged(self, verdict: Verdict, active_B: jax.Array) -> Self:
        """The active rows after the stop rules have had their say."""
        written_BT = active_B[:, None] & (verdict.tokens_BT != self.tokens)
        due_B = self.due
        if verdict.finish_B is not None:
            due_B = jnp.where(active_B & (verdict.finish_B >= 0), verdict.finish_B, due_B)
        return dataclasses.replace(
            self,
            tokens=jnp.where(written_BT, verdict.tokens_BT, self.tokens),
            open=self.open & ~written_BT,
            dirty=self.dirty | jnp.any(written_BT, axis=1),
            left=self.left | (active_B & (verdict.leave_block_B | (due_B == 0))),
            due=due_B,
            done=self.done | (active_B & verdict.end_row_B),
            stop=keep(active_B, verdict.carry, self.stop),
        )


def keep(rows_B: jax.Array, new: Any, old: Any) -> Any:
    """`new` in the given rows, `old` elsewhere; every array of both trees leads with the rows."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(rows_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)
