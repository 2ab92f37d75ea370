"""Job: one request on its way through the engine, and what its owner is told of it."""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jdllm.decode.setup import Setup

PLACES = 64
"""What one step of priority is worth: so many places in the queue. No request waits forever."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """A canvas in work. Columns count from the end of the prompt."""

    tokens: np.ndarray
    """int32 [G]."""
    open: np.ndarray
    """bool [G]: columns that are still to be filled."""
    filled_at: np.ndarray
    """int32 [G]: the request's NFE behind the call that filled a column; 0 where none has."""
    chance: np.ndarray
    """float32 [G]: the probability of the token that a call wrote."""
    settled: int
    """Columns that cannot change any more: those of finished blocks."""
    nfe: int


@dataclasses.dataclass(frozen=True)
class Outcome(Progress):
    """A canvas at its end."""

    reason: Literal["done", "cancelled", "failed"]
    """failed: the model gave something that is no number."""
    block_calls: np.ndarray
    """int32 [blocks]: model calls of each block, 0 for those that were never begun."""


def make_canvas(
    prompt: Sequence[int], setup: Setup, mask_id: int, given: Mapping[int, int] | None = None
) -> np.ndarray:
    """The canvas of a prompt: behind it masks, but for what is `given` by column from there on."""
    canvas = np.full(setup.canvas_length(len(prompt)), mask_id, np.int32)
    canvas[: len(prompt)] = prompt
    for column, token in (given or {}).items():
        canvas[len(prompt) + column] = token
    return canvas


Listener = Callable[[Progress], None]
"""Is told of a job's progress, in the engine's thread; the last call has an Outcome."""


class State(enum.Enum):
    """Where a job is."""

    WAITING = "waiting"
    RUNNING = "running"
    OVER = "over"


@dataclasses.dataclass(eq=False)
class Job:
    """One request. What its owner sets comes first; the rest is the engine's."""

    canvas: np.ndarray
    """int32 [end]: prompt, then masks up to the end; other tokens behind the prompt are given."""
    prompt: int
    """Columns of the prompt."""
    setup: Setup
    """How to decode, as `dials.shared` gives it; the canvas says where the row ends."""
    dials: dict[str, float]
    """The row's own numbers in it, as `dials.shared` gives them."""
    key: jax.Array
    """Random key, from which all draws come."""
    listener: Listener
    priority: int = 0
    """Lower is sooner."""
    follows: bool = False
    """Whether the listener is told of progress, and not only of the end."""
    cancelled: bool = False
    """Set by the owner: the request is taken back at the next dispatch."""

    number: int = -1
    """In order of arrival."""
    state: State = State.WAITING
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    """Of the whole pages before the first block."""
    read: int = 0
    """Columns whose keys are there, or will be behind the dispatches made so far."""
    first: int = 0
    """The first column that may still change, as last seen."""
    saved: Any = None
    """The row as it was when its pages were taken away."""
    preemptions: int = 0

    @property
    def end(self) -> int:
        """Columns of the canvas."""
        return len(self.canvas)

    @property
    def rank(self) -> tuple[int, int]:
        """Who comes first: a step of priority is worth PLACES places in the queue."""
        return self.number + self.priority * PLACES, self.number

    @property
    def ready(self) -> bool:
        """Whether everything before the block in work has been read."""
        return self.setup.plan.kind != "block" or self.read >= self.first
