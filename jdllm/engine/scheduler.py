"""Scheduler: which requests run, which pages they have, and what is read of their prompts when.

First come, first served, where a step of priority is worth a fixed number of places. A request
that does not get its pages lets none pass, so nothing waits forever. Rows with a block cache grow
page by page; where pages run out, the last in rank gives up its own and is read again later.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jdllm.decode.setup import Setup
from jdllm.engine.job import Job, State
from jdllm.engine.pages import PagePool, digests

WAITS = 6  # rounds for which a prompt waits at most, so that others are read with it


@dataclasses.dataclass(eq=False)
class Group:
    """Jobs that are decoded by the same rules, each in a slot."""

    setup: Setup
    jobs: list[Job | None]
    arrived: list[Job] = dataclasses.field(default_factory=list)
    """Jobs that came into their slots since the last turn."""
    stopped: set[int] = dataclasses.field(default_factory=set)
    """Slots whose rows must not go on."""
    waited: int = 0
    """Rounds for which prompts have waited to be read."""

    @property
    def running(self) -> list[Job]:
        """The jobs in slots, first in rank first."""
        return sorted((job for job in self.jobs if job), key=lambda job: job.rank)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one dispatch of a group does."""

    group: Group
    arrived: list[Job]
    stopped: set[int]
    chunks: list[tuple[int, int, int]]
    """Slot, first column, and the column behind the last one."""


def shares_pages(setup: Setup) -> bool:
    """Whether the keys of finished blocks depend on nothing but the tokens up to there."""
    return setup.fixed_past and not setup.smooth


class Scheduler:
    """Decides; the engine carries out. Nothing here knows the device."""

    def __init__(
        self,
        pool: PagePool,
        page: int,
        slots: int,
        rounds: int,
        chunk: int,
        lanes: int,
        catch_up: Callable[[], bool],
        save: Callable[[Group, Job], None],
    ):
        """`catch_up` reads what is in flight, and says whether there was anything; `save` keeps the
        row of a job that will lose its pages."""
        self.pool, self.page, self.slots, self.rounds = pool, page, slots, rounds
        self.chunk, self.lanes = chunk, lanes
        self.catch_up, self.save = catch_up, save
        self.groups: dict[Setup, Group] = {}
        self.waiting: list[Job] = []
        """Jobs without a slot, first in rank first."""
        self._count = 0

    @property
    def running(self) -> list[Job]:
        """Jobs in slots, first in rank first."""
        found = [job for group in self.groups.values() for job in group.jobs if job]
        return sorted(found, key=lambda job: job.rank)

    def add(self, job: Job) -> None:
        """A new job, which may wait."""
        job.number, self._count = self._count, self._count + 1
        job.first = job.setup.first_block(job.prompt)
        if shares_pages(job.setup):
            job.digests = self.digests(job, job.canvas[: job.first])
        self.queue(job)

    def queue(self, job: Job) -> None:
        """A job waits, where its rank says."""
        job.state = State.WAITING
        bisect.insort(self.waiting, job, key=lambda other: other.rank)

    def digests(self, job: Job, tokens: Sequence[int] | np.ndarray) -> list[bytes]:
        """What tells the whole pages of some tokens, read by a job's rules, from all others."""
        root = f"blocks of {job.setup.longest_block}"
        return digests(np.asarray(tokens, np.int32), self.page, root)

    def schedule(self) -> list[Turn]:
        """What every group with jobs does next."""
        self.admit()
        self.grow()
        turns = []
        for group in self.groups.values():
            if not group.running:
                continue  # who must stop is stopped when somebody else comes
            chunks = self.read(group)
            turns.append(Turn(group, group.arrived, group.stopped, chunks))
            group.arrived, group.stopped = [], set()
        return turns

    def take_back(self) -> list[Job]:
        """Jobs that their owners have cancelled: they leave at once."""
        found = [job for job in [*self.waiting, *self.running] if job.cancelled]
        for job in found:
            self.leave(job)
        return found

    def leave(self, job: Job) -> None:
        """A job is over, or has lost its pages: slot and pages are free."""
        if job.state is State.RUNNING:
            group = self.groups[job.setup]
            group.jobs[job.slot] = None
            group.stopped.add(job.slot)
            group.arrived = [other for other in group.arrived if other is not job]
        elif job.state is State.WAITING:
            self.waiting.remove(job)
        self.pool.release(job.pages)
        job.pages, job.slot, job.state = [], -1, State.OVER

    def pages_for(self, job: Job, columns: int) -> int:
        """Pages that so many columns of a job take."""
        return -(-min(columns, job.end) // self.page) if job.setup.plan.cached else 0

    def least(self, job: Job) -> int:
        """Pages without which a job cannot go on."""
        if job.setup.plan.kind == "block":
            return self.pages_for(job, job.first + job.setup.longest_block)
        return self.pages_for(job, job.end)

    def grows(self, job: Job) -> bool:
        """Whether a running job may still ask for pages."""
        return len(job.pages) < self.pages_for(job, job.end)

    def admit(self) -> None:
        """Jobs from the queue come into free slots, as long as there are pages."""
        full: set[Setup] = set()
        for job in list(self.waiting):
            group = self.groups.get(job.setup)
            if group is None:
                group = self.groups[job.setup] = Group(job.setup, [None] * self.slots)
            if job.setup in full or None not in group.jobs:
                full.add(job.setup)
                if len(full) == len(self.groups):
                    return
                continue
            if not self.furnish(job):
                return
            self.waiting.remove(job)
            job.slot, job.state = group.jobs.index(None), State.RUNNING
            group.jobs[job.slot] = job
            group.arrived.append(job)
            group.stopped.discard(job.slot)

    def furnish(self, job: Job) -> bool:
        """Pages for a job to begin with, those of a known beginning first; False for too few."""
        known = []
        for digest in job.digests:
            if (page := self.pool.adopt(digest)) is None:
                break
            known.append(page)
        needed = self.least(job) - len(known)
        growing = sum(map(self.grows, self.running))  # each may need a page next
        spare = self.pool.free - needed - growing
        if needed > self.pool.free or (spare < 0 and growing):
            self.pool.release(known)
            return False
        job.pages = known + self.pool.take(needed)
        job.read = len(known) * self.page
        return True

    def grow(self) -> None:
        """Pages for the blocks to come, in rank; where there are too few, the last in rank goes."""
        for job in self.running:
            while job.state is State.RUNNING and len(job.pages) < self.least(job):
                if pages := self.pool.take(self.least(job) - len(job.pages)):
                    job.pages += pages
                elif not self.catch_up():
                    self.preempt(max(filter(self.takes_part, self.running), key=lambda j: j.rank))
            if job.state is State.RUNNING and job.setup.plan.kind == "block":
                ahead = job.first + (1 + self.rounds) * job.setup.longest_block
                wanted = self.pages_for(job, ahead) - len(job.pages)
                job.pages += self.pool.take(min(wanted, self.pool.free)) if wanted > 0 else []

    def takes_part(self, job: Job) -> bool:
        """Whether a job can give up its pages: what a full pass has written is not made again."""
        return job.setup.plan.kind == "block"

    def preempt(self, job: Job) -> None:
        """A running job loses its pages, and waits where it stood in the queue."""
        self.save(self.groups[job.setup], job)
        self.leave(job)
        job.read, job.preemptions = 0, job.preemptions + 1
        self.queue(job)

    def read(self, group: Group) -> list[tuple[int, int, int]]:
        """What is read next of the prompts, in rank. What another has read is taken over.

        At most as many columns as the rounds of all rows feed, so that who decodes waits for the
        prompts of others about as long as for the own block.
        """
        if not self.worth_reading(group):
            return []
        chunks: list[tuple[int, int, int]] = []
        most = self.slots * self.rounds * group.setup.longest_block // self.chunk
        for job in group.running:
            while not job.ready and len(chunks) < max(self.lanes, most):
                if self.take_over(job):
                    continue
                stop = self.chunk_end(job)
                chunks.append((job.slot, job.read, stop))
                for number in range(job.read // self.page, stop // self.page):
                    if number < len(job.digests):
                        self.pool.publish(job.pages[number], job.digests[number])
                job.read = stop
        return chunks

    def worth_reading(self, group: Group) -> bool:
        """Whether prompts fill a call, or half as many as there are rows that decode; a call with
        few of them costs nearly as much. But none waits for more than some rounds."""
        unread = [job for job in group.jobs if job and not job.ready]
        chunks = sum(-(-(job.first - job.read) // self.chunk) for job in unread)
        ready = len(group.running) - len(unread)
        enough = chunks >= min(self.lanes, (ready + 1) // 2) or group.waited >= WAITS
        group.waited = 0 if enough else group.waited + self.rounds
        return enough

    def chunk_end(self, job: Job) -> int:
        """The column behind what is read next of a job."""
        if job.setup.fixed_past:
            return min(job.read + self.chunk, job.first)
        # Columns of the prompt see each other, whichever comes first; then come whole blocks.
        start = job.setup.first_block(job.prompt)
        return start if job.read < start else min(job.read + job.setup.block_length, job.first)

    def take_over(self, job: Job) -> bool:
        """Whether somebody has read the page that the job would read next; then it is shared."""
        number, inside = divmod(job.read, self.page)
        if inside or number >= len(job.digests):
            return False
        if (page := self.pool.adopt(job.digests[number])) is None:
            return False
        self.pool.release([job.pages[number]])
        job.pages[number], job.read = page, job.read + self.page
        return True

    def keep(self, job: Job, tokens: Sequence[int] | np.ndarray) -> None:
        """Others may use the pages of a finished job: the next turn of a chat begins with them.

        `tokens` are those of its finished blocks but the last, whose keys are not final.
        """
        if shares_pages(job.setup):
            for page, digest in zip(job.pages, self.digests(job, tokens), strict=False):
                self.pool.publish(page, digest)

    def drop_idle(self, most: int) -> list[Setup]:
        """Forgets groups without jobs where there are more than `most`; returns their rules."""
        idle = [setup for setup, group in self.groups.items() if not group.running]
        waited = {job.setup for job in self.waiting}
        dropped = [s for s in idle if s not in waited][: max(0, len(self.groups) - most)]
        for setup in dropped:
            del self.groups[setup]
        return dropped
