"""Device: what an engine keeps there, and the thread that hands it work.

A program whose loops ask the device how to go on holds the thread that sends it until it is nearly
through. So that thread is not the one that schedules: the next dispatch is ready before the last
call of this one has ended.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdllm.decode.setup import Setup
from jdllm.engine import rounds
from jdllm.engine.arrays import Arrivals, Chunks, Orders, Report, Slots
from jdllm.engine.config import EngineConfig
from jdllm.engine.job import Job
from jdllm.model.model import Model
from jdllm.runtime.programs import is_crowded

ENTER = 8  # new rows that are put into their slots at once


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """What the device does next for the rows of one set of rules. Nothing in it changes any more
    while it waits for its turn."""

    setup: Setup
    returned: list[tuple[int, Future[Slots]]]
    """Slots, and rows that come back into them."""
    arrivals: list[tuple[np.ndarray, Arrivals]]
    """Slots [E], and rows that begin there."""
    chunks: list[Chunks]
    """Prompts to read, call by call."""
    orders: Orders


class Device:
    """Rows and pages of one engine. Whatever is asked is done in the order of asking."""

    def __init__(self, model: Model, config: EngineConfig):
        self.model, self.config = model, config
        self.compile_seconds = 0.0
        self._thread = ThreadPoolExecutor(1, "device")
        self._known: set[Any] = set()
        self._widths: dict[Setup, set[int]] = defaultdict(set)
        self._begin()

    def _begin(self) -> None:
        self._slots: dict[Setup, Slots] = {}
        self._pool = rounds.empty_pool(self.model, self.config.pages + 1, self.config.page)
        self._failure: Exception | None = None

    def _ask[T](self, work: Callable[[], T]) -> Future[T]:
        """Queues some work; behind work that has failed, all fails."""

        def guarded() -> T:
            if self._failure:
                raise self._failure
            try:
                return work()
            except Exception as error:
                self._failure = error
                raise

        return self._thread.submit(guarded)

    def send(
        self, setup: Setup, arrived: Sequence[Job], chunks: list[Chunks], orders: Orders
    ) -> "Future[Report]":
        """A dispatch; its report is there when its programs have been handed over."""
        returned = [(job.slot, job.saved) for job in arrived if job.saved is not None]
        new = [job for job in arrived if job.saved is None]
        for job in arrived:
            job.saved = None
        arrivals = [self._arrivals(new[i : i + ENTER]) for i in range(0, len(new), ENTER)]
        self._widths[setup].add(orders.width)
        dispatch = Dispatch(setup, returned, arrivals, chunks, orders)
        return self._ask(lambda: self._run(dispatch))

    def _arrivals(self, jobs: Sequence[Job]) -> tuple[np.ndarray, Arrivals]:
        """Some jobs as arrays of always the same number of rows; who fills them up has no slot."""
        E, slots = min(ENTER, self.config.slots), self.config.slots
        filled = [*jobs, *[jobs[0]] * (E - len(jobs))]
        tokens = np.full((E, self.config.columns), self.model.config.pad_id, np.int32)
        for row, job in zip(tokens, filled, strict=True):
            row[: job.end] = job.canvas
        slot_E = np.array([*(job.slot for job in jobs), *[slots] * (E - len(jobs))], np.int32)
        return slot_E, Arrivals(
            tokens,
            np.array([job.prompt for job in filled], np.int32),
            np.array([job.end for job in filled], np.int32),
            tuple(job.key for job in filled),
            {n: np.array([j.dials[n] for j in filled], np.float32) for n in jobs[0].dials},
        )

    def save(self, setup: Setup, slot: int) -> "Future[Slots]":
        """The row of a slot, as it is behind all that has been asked before."""
        return self._ask(lambda: rounds.take_row(self._slots[setup], np.int32(slot)))

    def wipe(self, pages: Sequence[int]) -> None:
        """Zeros in some pages."""
        numbers = np.array(pages, np.int32)

        def work() -> None:
            self._pool = rounds.wipe(self._pool, numbers)

        self._ask(work)

    def forget(self, setup: Setup) -> None:
        """Drops the slots of some rules."""
        self._ask(lambda: self._slots.pop(setup, None))

    def reset(self) -> None:
        """Begins anew, behind all that has been asked."""
        self._thread.submit(self._begin).result()

    def widths(self, setup: Setup) -> set[int]:
        """Columns of the dispatches that some rules have had."""
        return self._widths[setup]

    def _run(self, dispatch: Dispatch) -> Report:
        setup, orders, start = dispatch.setup, dispatch.orders, time.perf_counter()
        widths = None, *(some.width for some in dispatch.chunks)
        names = [name for _, arrivals in dispatch.arrivals[:1] for name in arrivals.dials]
        new = {(setup, orders.width, width) for width in widths} - self._known
        if new and is_crowded():
            jax.clear_caches()
            self._known.clear()
        slots = self._slots.pop(setup, None) or self._empty(setup, names)
        for slot, row in dispatch.returned:
            slots = rounds.put_rows(slots, np.array([slot]), row.result())
        for slot_E, arrivals in dispatch.arrivals:
            slots = rounds.enter(self.model, setup, slots, slot_E, arrivals)
        for some in dispatch.chunks:
            self._pool = rounds.read(self.model, setup, slots, self._pool, orders.table, some)
        self._slots[setup], self._pool, report = rounds.run(
            self.model, setup, slots, self._pool, orders, self.config.rounds, self.config.lanes
        )
        self._known |= new
        if new:
            self.compile_seconds += time.perf_counter() - start
        return report

    def _empty(self, setup: Setup, names: Iterable[str]) -> Slots:
        """Slots with nobody in them; the rows that come have dials of these names."""
        B, T = self.config.slots, self.config.columns
        keys = jax.random.split(jax.random.key(0), B)
        ones = jnp.ones(B, jnp.int32)
        tokens = jnp.full((B, T), self.model.config.pad_id, jnp.int32)
        dials = {name: jnp.ones(B, jnp.float32) for name in names}
        return rounds.begin(self.model, setup, tokens, ones, ones, keys, ones > 0, dials)

    def compile(self, setup: Setup, names: Iterable[str], width: int) -> None:
        """Compiles the programs of some rules, for dispatches of so many columns, from any thread.

        They lie in the cache of compiled programs then, where the first dispatch finds them.
        Nothing runs on the device meanwhile but what XLA tries.
        """
        config, slots = self.config, self._empty(setup, names)
        none_B: Any = np.zeros(config.slots, np.int32)
        no_B: Any = np.zeros(config.slots, bool)
        table: Any = np.zeros((config.slots, width // config.page), np.int32)
        orders = Orders(table, none_B, no_B, no_B, width)
        none_F: Any = np.zeros(min(config.lanes, config.slots), np.int32)
        given = self.model, setup, slots, self._pool
        if setup.plan.kind == "block":
            chunks = Chunks(none_F, none_F, none_F, config.chunk)
            rounds.read.lower(*given, table, chunks).compile()
        rounds.run.lower(*given, orders, config.rounds, config.lanes).compile()
