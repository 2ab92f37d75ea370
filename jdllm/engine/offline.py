"""Many prompts through the engine, for those who want all of them and nothing in between."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import jax
import numpy as np

from jdllm.batches import bucket
from jdllm.decode.setup import Setup
from jdllm.engine.config import EngineConfig
from jdllm.engine.dials import shared
from jdllm.engine.engine import servable
from jdllm.engine.job import Job, Outcome, Progress, make_canvas
from jdllm.engine.replicas import Engines
from jdllm.model.model import Model

EngineUse = Literal["auto", "on", "off"]
LEAST = 8  # rows of a replica from which on an engine may pay


@dataclasses.dataclass(frozen=True)
class Finished:
    """Prompts that have ended since the last time, and what was spent meanwhile."""

    index: list[int]
    tokens: list[np.ndarray]
    """int32 [G] each: the columns behind the prompt."""
    nfe: list[int]
    block_calls: list[np.ndarray]
    """Model calls of each block."""
    calls: int
    """Model calls."""
    seconds: float
    compile_seconds: float


def pays(model: Model, setup: Setup, rows: int, batch_size: int) -> bool:
    """Whether an engine is worth it: rows that end make room for others at once, and a call costs
    what it costs in a batch. Plans with full passes make these apart, which a batch does in one;
    and the host's work for a dispatch is not worth it for few rows."""
    if not (setup.fixed_past and servable(setup)) or jax.process_count() > 1:
        return False
    return rows > batch_size >= LEAST * model.mesh.shape["data"]


def decode_all(
    model: Model,
    setup: Setup,
    rows: Sequence[Sequence[int]],
    keys: jax.Array,
    slots: int,
) -> Iterator[Finished]:
    """Decodes all rows, as many at a time as there are slots, and yields them as they end.

    ValueError where the engine does not serve these rules, or runs as several processes.
    """
    if not servable(setup) or jax.process_count() > 1:
        raise ValueError("the engine does not serve these settings: use engine=off")
    longest = bucket(max((setup.canvas_length(len(row)) for row in rows), default=1))
    shares = min(slots, len(rows)) // model.mesh.shape["data"]
    page = -(-32 // setup.longest_block) * setup.longest_block
    config = EngineConfig(
        slots=max(1, shares), columns=longest, page=page, chunk=max(1, 256 // page) * page
    )
    engines, done, calls = Engines(model, config), dict[int, Outcome](), 0

    def ended(i: int, event: Progress) -> None:
        if isinstance(event, Outcome):
            done[i] = event

    for i, row in enumerate(rows):
        canvas = make_canvas(row, setup, model.config.mask_id)
        engines.submit(Job(canvas, len(row), *shared(setup), keys[i], partial(ended, i)))
    start, compiled = time.perf_counter(), 0.0
    while engines.busy:
        engines.step()
        if not done and engines.busy:
            continue
        now, compiling = time.perf_counter(), engines.compile_seconds - compiled
        yield Finished(
            list(done), [event.tokens for event in done.values()],
            [event.nfe for event in done.values()],
            [event.block_calls for event in done.values()], engines.calls - calls,
            max(0.0, now - start - compiling), compiling,
        )  # fmt: skip
        done.clear()
        calls, compiled, start = engines.calls, compiled + compiling, time.perf_counter()
