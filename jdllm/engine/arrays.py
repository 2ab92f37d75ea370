"""Arrays of the engine: what lies on the device between dispatches, what a dispatch is told, and
what it reports."""

import dataclasses
from typing import Any

import jax

from jdllm.decode.rows import Rows

Pool = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]
"""Keys and values: L arrays [P, N, G, K] each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Rows with what the engine notes of them. An empty slot holds a row that is done."""

    rows: Rows
    dials: dict[str, jax.Array]
    """float32 [B] each: the rows' own numbers in the rules (dials.py)."""
    waited: jax.Array
    """int32 [B]: rounds for which the row has waited for a full pass."""
    filled_at: jax.Array
    """int32 [B, T]: the row's NFE behind the call that filled a column, 0 where none has."""
    chance: jax.Array
    """float32 [B, T]: the probability of the token that a call wrote, 0 where none did."""
    failed: jax.Array
    """bool [B]: the model gave something that is no number."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrivals:
    """What is known of rows that have not begun."""

    tokens: Any
    """int32 [E, T]: their canvases."""
    prompt: Any
    """int32 [E]."""
    end: Any
    """int32 [E]."""
    keys: tuple[jax.Array, ...]
    """E random keys."""
    dials: dict[str, Any]
    """float32 [E] each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """Prompt columns to read: `width` from `start` on, in each of some lanes."""

    slot: jax.Array
    """int32 [F]."""
    start: jax.Array
    """int32 [F]."""
    stop: jax.Array
    """int32 [F]: the column behind the last one; `start` where a lane is idle."""
    width: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Orders:
    """What the host decides about a dispatch."""

    table: jax.Array
    """int32 [B, W/N]: pages of the rows."""
    granted: jax.Array
    """int32 [B]: columns for which the row has pages; a block beyond them waits."""
    ready: jax.Array
    """bool [B]: keys of everything before the block are there."""
    stopped: jax.Array
    """bool [B]: rows whose request has been taken back."""
    width: int = dataclasses.field(metadata={"static": True})
    """Columns W: no canvas in work is longer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """What the host reads of a dispatch, one dispatch later."""

    calls: jax.Array
    """int32: model calls made."""
    done: jax.Array
    failed: jax.Array
    nfe: jax.Array
    first: jax.Array
    """int32 [B]: the first column that may still change."""
    block_calls: Any
    """int32 [B, blocks]: calls of each block that has ended."""
    tokens: jax.Array
    """int32 [B, W]; the next three are [B, W], too."""
    open: jax.Array
    filled_at: jax.Array
    chance: jax.Array
