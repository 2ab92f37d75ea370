"""What decoding starts from, what a step changes, and what may be recorded of it."""

import dataclasses
from typing import Any

import jax

from jdllm.model.cache import Cache
from jdllm.unmask import Carry


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
    """What decoding starts from: one row a prompt."""

    tokens: jax.Array
    """int32 [B, T]: prompt, then masks up to the row's canvas length, then padding."""
    prompt_lengths: jax.Array
    """int32 [B]."""
    keys: jax.Array
    """Random keys [B], one a row, so that draws do not depend on batch mates."""
    idle: jax.Array
    """bool [B]: rows that only fill up the batch."""
    recorded: jax.Array | None = None
    """Uniform draws to use instead of the keys: [forwards, B, T] or [forwards, B, T, V]."""
    prefixes: Prefixes | None = None
    """Read by cache=block: the prefill covers what is behind them."""


PREFILL, FULL, STEP, COMMIT = range(4)
"""Kinds of model calls: the prompt's keys, all columns, a window, a finished block's keys."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """A record of consecutive model calls, at most C; N is the number of columns in view."""

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a step changes."""

    tokens: jax.Array
    """int32 [B, T]."""
    done: jax.Array
    """bool [B]."""
    nfe: jax.Array
    """int32 [B]: model evaluations made while the row was unfinished."""
    forwards: jax.Array
    """int32: model calls of the batch."""
    block: jax.Array
    """int32: number of the block."""
    step: jax.Array
    """int32: call within the block, an opening full pass included."""
    opened: jax.Array
    """int32 [B]: masks that the block began with."""
    dirty: jax.Array
    """bool [B]: the last call changed the row, so its keys are not those of its tokens."""
    accepted: jax.Array
    """int32 [B]: tokens that the last call unmasked."""
    rule: Carry
    stop: Any
    clock: "Clock"
    cache: Cache | None
    inputs: jax.Array | None
    """[B, T, D]: what is fed instead of embedded tokens, where inputs are smoothed."""
    trace: Trace | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clock:
    """Counters of dInfer's runner; they stand still elsewhere."""

    unlooked: jax.Array
    """int32: iterations still to be made before the next look."""
    iteration: jax.Array
    """int32: iterations of the request."""
    filled: jax.Array
    """bool: the cache holds something."""
    seen_block: jax.Array
    """int32: the block at the last look at the cache's age."""
