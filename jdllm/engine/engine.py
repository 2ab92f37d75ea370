"""The engine: schedule, run, postprocess, so that many requests share one model.

Rows of different requests stand at different blocks in one jitted program over fixed slots. The
host reads a dispatch when the next one is on its way, so the device never waits for it.
"""

import dataclasses
import logging
import threading
from collections import deque
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from jdllm.batches import bucket
from jdllm.decode.setup import Setup
from jdllm.engine.arrays import Chunks, Orders, Report
from jdllm.engine.config import EngineConfig
from jdllm.engine.device import Device
from jdllm.engine.job import Job, Outcome, Progress, State
from jdllm.engine.pages import PagePool
from jdllm.engine.scheduler import Group, Scheduler, Turn
from jdllm.model.model import Model
from jdllm.unmask.speculate import Speculate


@dataclasses.dataclass(frozen=True)
class Flight:
    """A dispatch on its way, and the jobs that were in its slots."""

    report: Future[Report]
    jobs: list[Job | None]
    reads: int
    """Model calls that read prompts."""


class Engine:
    """One model and its cache. All but `submit`, `stop` and `busy` belong to one thread."""

    def __init__(self, model: Model, config: EngineConfig | None = None):
        self.model = model
        config = config or EngineConfig()
        self.config = config = config.filled(model, model.config.block_causal or 32)
        self.device = Device(model, config)
        self._flying: list[Flight] = []
        self._inbox: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self.scheduler = self._scheduler()
        self.calls = 0
        """Model calls so far, as last seen."""

    def _scheduler(self) -> Scheduler:
        config = self.config
        return Scheduler(
            PagePool(config.pages), config.page, config.slots, config.rounds, config.chunk,
            config.lanes, self._catch_up, self._save,
        )  # fmt: skip

    def _reset(self) -> None:
        """Begins anew with what has not begun; what was running has failed."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        self._flying = []
        self.device.reset()
        self.scheduler = self._scheduler()
        for job in running:
            job.state = State.OVER
            finish(job, "failed")
        for job in waiting:
            if job.saved is None:
                self.scheduler.add(job)
            else:
                finish(job, "failed")

    def submit(self, job: Job) -> None:
        """A job from any thread. ValueError, at once, where it could never run."""
        check(job, self.config)
        with self._wake:
            self._inbox.append(job)
            self._wake.notify()

    @property
    def busy(self) -> bool:
        """Whether anything is waiting, running or in flight."""
        return bool(self._inbox or self.scheduler.waiting or self.scheduler.running or self._flying)

    @property
    def compile_seconds(self) -> float:
        """Spent on dispatches of shapes and rules that this engine has not had before."""
        return self.device.compile_seconds

    @property
    def load(self) -> int:
        """Jobs that wait or run."""
        return len(self._inbox) + len(self.scheduler.waiting) + len(self.scheduler.running)

    def serve(self) -> None:
        """Works until `stop`, waiting where there is nothing to do; then ends what has begun."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self.busy)
            if not self.busy:
                return
            try:
                self.step()
            except Exception:  # of the device: what was on it is lost, and nothing else
                logging.getLogger(__name__).exception("a dispatch failed")
                self._reset()

    def stop(self) -> None:
        """`serve` returns once nothing is left to do."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def drain(self) -> None:
        """Works until nothing is left to do."""
        while self.busy:
            self.step()

    def step(self) -> None:
        """One dispatch of every group; the dispatches before are read meanwhile."""
        turns = self.schedule()
        flights = [self.run(turn) for turn in turns]
        self.postprocess()
        self._flying = flights

    def schedule(self) -> list[Turn]:
        """New jobs are taken in, cancelled ones leave; what is to be done next."""
        while self._inbox:
            self.scheduler.add(self._inbox.popleft())
        for job in self.scheduler.take_back():
            finish(job, "cancelled")
        turns = self.scheduler.schedule()
        for setup in self.scheduler.drop_idle(self.config.groups):
            self.device.forget(setup)
        return turns

    def run(self, turn: Turn) -> Flight:
        """Sends a dispatch on its way."""
        setup, chunks = turn.group.setup, self._chunks(turn.chunks)
        report = self.device.send(setup, turn.arrived, chunks, self._orders(turn))
        return Flight(report, list(turn.group.jobs), len(chunks))

    def postprocess(self) -> None:
        """Reads what was in flight: who is done, and what those see who follow their job."""
        flights, self._flying = self._flying, []
        for flight in flights:
            report = flight.report.result()
            calls, done, failed, nfe, first = jax.device_get(
                (report.calls, report.done, report.failed, report.nfe, report.first)
            )
            self.calls += int(calls) + flight.reads
            canvases: Any = None
            for slot, job in enumerate(flight.jobs):
                if job is None or job.state is not State.RUNNING:
                    continue
                if job.ready:
                    job.first = int(first[slot])
                    job.read = max(job.read, job.first)
                if not (done[slot] or job.follows):
                    continue
                if canvases is None:
                    # Whole arrays: to slice one on the device would wait for the next dispatch.
                    canvases, calls_BK = jax.device_get(
                        (
                            (report.tokens, report.open, report.filled_at, report.chance),
                            report.block_calls,
                        )
                    )
                seen = [x[slot, job.prompt : job.end] for x in canvases]
                settled = job.end if done[slot] else job.first
                progress: Any = (*seen, max(0, settled - job.prompt), int(nfe[slot]))
                if not done[slot]:
                    tell(job, Progress(*progress))
                    continue
                self._leave(job, bool(failed[slot]), canvases[0][slot])
                reason: Any = "failed" if failed[slot] else "done"
                tell(job, Outcome(*progress, reason=reason, block_calls=calls_BK[slot]))

    def _leave(self, job: Job, failed: bool, tokens: np.ndarray) -> None:
        """A job has ended on the device: its pages are free, or kept for their beginnings."""
        if failed and job.pages:
            self.scheduler.pool.forget(job.pages)
            self.device.wipe(job.pages)
        elif not failed:
            self.scheduler.keep(job, tokens[: job.first])
        self.scheduler.leave(job)

    def _catch_up(self) -> bool:
        """Reads what is in flight; False where nothing is."""
        flew = bool(self._flying)
        self.postprocess()
        return flew

    def _save(self, group: Group, job: Job) -> None:
        """Keeps the row of a job that will lose its pages."""
        if job not in group.arrived:
            job.saved = self.device.save(group.setup, job.slot)

    def _orders(self, turn: Turn) -> Orders:
        """A turn as arrays."""
        config, jobs = self.config, turn.group.jobs
        width = self._width(turn.group.setup, max((job.end for job in jobs if job), default=1))
        table: Any = np.zeros((len(jobs), width // config.page), np.int32)
        granted: Any = np.zeros(len(jobs), np.int32)
        ready: Any = np.zeros(len(jobs), bool)
        for job in filter(None, jobs):
            table[job.slot, : len(job.pages)] = job.pages
            paged = job.setup.plan.cached
            granted[job.slot] = len(job.pages) * config.page if paged else config.columns
            ready[job.slot] = job.ready
        stopped: Any = np.zeros(len(jobs), bool)
        stopped[list(turn.stopped)] = True
        return Orders(table, granted, ready, stopped, width)

    def _width(self, setup: Setup, longest: int) -> int:
        """The columns of a dispatch. One that is compiled already serves canvases of half of them,
        too: a program costs more than columns that nobody reads."""
        page = self.config.page
        least = min(-(-bucket(longest, 2) // page) * page, self.config.columns)
        known = (width for width in self.device.widths(setup) if width >= least)
        best = min(known, default=least)
        return best if best <= 2 * least else least

    def _chunks(self, chunks: list[tuple[int, int, int]]) -> list[Chunks]:
        """Chunks as arrays, some in each call. Idle lanes fill the last: calls of one shape alone
        give a prompt the same bits in any company."""
        lanes, found = min(self.config.lanes, self.config.slots), []
        for some in (chunks[i : i + lanes] for i in range(0, len(chunks), lanes)):
            idle = [(0, 0, 0)] * (lanes - len(some))
            slot, start, stop = np.array([*some, *idle], np.int32).T
            longest = int(max(stop - start))
            width = self.config.chunk if longest <= self.config.chunk else bucket(longest, 2)
            found.append(Chunks(slot, start, stop, width))
        return found


def finish(job: Job, reason: Any) -> None:
    """Tells a job's owner that it is over before its canvas was read."""
    tokens = job.canvas[job.prompt :]
    nothing = np.zeros(len(tokens))
    steps, chance = nothing.astype(np.int32), nothing.astype(np.float32)
    tell(job, Outcome(tokens, nothing == 0, steps, chance, 0, 0, reason, steps[:0]))


def tell(job: Job, event: Progress) -> None:
    """Tells a job's owner; one who cannot listen loses his job, and nobody else anything."""
    try:
        job.listener(event)
    except Exception:
        logging.getLogger(__name__).exception("a listener failed")
        job.cancelled = True


def check(job: Job, config: EngineConfig) -> None:
    """ValueError, with its reason, for a job that this engine could never run."""
    setup = job.setup
    if job.end > config.columns:
        raise ValueError(
            f"a prompt of {job.prompt} tokens with {job.end - job.prompt} columns to fill exceeds "
            f"the {config.columns} columns of this engine; shorten one of them"
        )
    if not servable(setup):
        raise ValueError("the engine does not serve these decoding settings: use engine=off")
    if setup.plan.cached and (needed := -(-job.end // config.page)) > config.pages:
        raise ValueError(
            f"a canvas of {job.end} columns needs {needed} pages of {config.page}, and the cache "
            f"has {config.pages}; shorten it, or raise pages"
        )
    if setup.plan.kind == "block" and config.page % setup.longest_block and setup.fixed_past:
        raise ValueError(
            f"block_length={setup.longest_block} must divide the pages of {config.page} columns"
        )


def servable(setup: Setup) -> bool:
    """Whether rows of these rules may stand anywhere: not where a reference's loop is copied, a
    verifier is asked, guidance has second rows in the cache, or an exit reads what calls show."""
    guided = bool(setup.cfg_scale) and setup.plan.cached
    if isinstance(setup.unmask, Speculate) or setup.looks:
        return False
    return setup.driver is None and setup.plan.window is None and not guided
