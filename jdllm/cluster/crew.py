"""A crew: workers that take tasks from one list, replaced when they are lost.

A task is done once: its result counts when it is here, and a task whose worker is lost is handed
to another one. What is finished is written by whoever reads the results, and by nobody else.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from jdllm.cluster.connect import answers, connect, identity, room
from jdllm.cluster.worker import Worker
from jdllm.runtime import processes

TRIES = 3  # workers that one task may end, or that may end one after the other while they start
ASK_HEAD, HEAD_LOST = 5, 20  # seconds between looks for the head, and until it counts as lost
PATIENCE = 30  # seconds without a worker until it is said what is waited for


class Crew:
    """Some workers with the same model. The first that is ready begins."""

    worker: type = Worker

    def __init__(self, settings: dict[str, Any], count: int, share: dict[str, float]):
        """Starts them; `settings` are those of LLM.load, and a `count` of 0 fills the cluster."""
        self.ray = connect()
        self._settings, self._share = settings, share
        self._starting: dict[Any, Any] = {}  # what is waited for: its worker
        self._idle: list[Any] = []
        self._places: dict[Any, tuple[int, str]] = {}
        self.fingerprint: str | None = None
        self._head = self.ray.get_runtime_context().gcs_address
        self._asked = time.monotonic()
        self._silent: float | None = None  # since when the head has not answered
        self._failures = 0  # workers that were lost since something went well
        self._stillborn = 0  # workers that were lost before they had loaded their model
        fits = room(share)
        self.count = count or max(fits, 1)
        if self.count > fits:
            processes.say(
                f"note: workers={self.count}, but the cluster has room for {fits}; the others "
                "start when there is more"
            )
        for _ in range(self.count):
            self._start()

    def _start(self) -> None:
        options = self._share | {"max_restarts": 0}
        worker = self.ray.remote(self.worker).options(**options).remote()
        self._starting[worker.load.remote(identity(), os.getcwd(), self._settings)] = worker

    def ready(self) -> int:
        """Waits until no worker is starting any more, and returns how many there are."""
        while self._starting:
            for ref in self._wait([*self._starting]):
                self._started(ref)
        return len(self._idle)

    @property
    def places(self) -> list[tuple[int, str]]:
        """The process and the host of every worker that has loaded its model."""
        return list(self._places.values())

    def ask(self, method: str, *arguments: Any) -> Any:
        """What one of the workers answers."""
        return next(iter(self.run(method, [arguments])))[1]

    def run(self, method: str, tasks: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
        """The number of each task and its result, as they come.

        Raises what a task raises. ConnectionError, in one sentence, where no worker is left or the
        cluster is lost.
        """
        waiting, running, tries = deque(range(len(tasks))), dict[Any, tuple[Any, int]](), Counter()
        try:
            while waiting or running:
                while waiting and self._idle:
                    worker, number = self._idle.pop(), waiting.popleft()
                    running[getattr(worker, method).remote(*tasks[number])] = worker, number
                for ref in self._wait([*running, *self._starting]):
                    if ref in self._starting:
                        self._started(ref)
                        continue
                    worker, number = running.pop(ref)
                    found, lost = self._result(ref, worker)
                    if lost:
                        tries[number] += 1
                        self._give_up_on(tries[number], lost)
                        waiting.appendleft(number)
                        continue
                    self._idle.append(worker)
                    yield number, found
        finally:
            self._starting |= {ref: worker for ref, (worker, _) in running.items()}

    def _wait(self, refs: list[Any]) -> list[Any]:
        """Those that are ready, at least one."""
        start, said = time.monotonic(), False
        while refs:
            ready, _ = self.ray.wait(refs, timeout=5)
            self._require_head()
            if ready:
                return ready
            slow = time.monotonic() - start > PATIENCE
            if slow and not said and len(refs) == len(self._starting):
                processes.say(f"no worker has started yet: each takes {self._share}")
                said = True
        raise ConnectionError("no worker is left; what is finished is kept, start again")

    def _require_head(self) -> None:
        """ConnectionError where the head has not answered for a while; Ray would end us abruptly.

        Workers go on without it meanwhile, and it may come back.
        """
        now = time.monotonic()
        if now - self._asked < ASK_HEAD:
            return
        self._asked = now
        if answers(self._head):
            self._silent = None
            return
        self._silent = self._silent or now
        if now - self._silent > HEAD_LOST:
            raise ConnectionError(
                f"the head of the Ray cluster, {self._head}, is lost; what is finished is kept: "
                "start the cluster, then the same command again"
            )

    def _result(self, ref: Any, worker: Any) -> tuple[Any, str]:
        """What a call returned, or why its worker is lost. Raises what a user has to know."""
        errors = self.ray.exceptions
        try:
            found = self.ray.get(ref)
        except errors.RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, OSError):
                raise (cause if isinstance(cause, Exception) else error) from None
            # Its disk is full, say: others may have better luck, and it would fail again.
            return None, self._retire(worker, f"{cause}", again=False)
        except errors.RayError as error:
            return None, self._retire(worker, type(error).__name__, again=True)
        self._failures = 0
        return found, ""

    def _started(self, ref: Any) -> None:
        """Takes in a worker that has loaded its model, or that has ended a call nobody wants."""
        worker = self._starting.pop(ref)
        facts, lost = self._result(ref, worker)
        if lost:
            self._give_up_on(self._failures, lost)
            return
        if worker in self._places:
            self._idle.append(worker)
        elif refused := facts.get("refused"):
            self._retire(worker, refused, again=False)
        elif self.fingerprint not in (None, facts["fingerprint"]):
            name = self._settings.get("model")
            self._retire(
                worker, f"{facts['host']} has other weights under model={name}", again=False
            )
        else:
            self.fingerprint = facts["fingerprint"]
            self._places[worker] = facts["pid"], facts["host"]
            self._idle.append(worker)

    def _retire(self, worker: Any, reason: str, again: bool) -> str:
        """Ends a worker, starts another one where that may help, and returns what happened.

        ConnectionError where none is left.
        """
        place = self._places.pop(worker, None)
        who = "process {} on {}".format(*place) if place else ""
        self.ray.kill(worker)
        self._failures += 1
        if not who:
            who, self._stillborn = "a worker that was starting", self._stillborn + 1
            again = again and self._stillborn <= TRIES
        if again:
            self._start()
            processes.say(f"note: {who} was lost ({reason}); another one takes its place")
            return reason
        processes.say(f"note: {who} gives up: {reason}")
        self.count -= 1
        if not self.count:
            raise ConnectionError(f"no worker is left: {reason}")
        return reason

    def _give_up_on(self, failures: int, reason: str) -> None:
        """ConnectionError where workers are lost one after the other."""
        if failures >= TRIES * max(self.count, 1) or (failures >= TRIES and self._places == {}):
            raise ConnectionError(
                f"{failures} workers were lost one after the other ({reason}): what they do may "
                "not fit their memory (batch_size=, mesh=); what is finished is kept"
            )

    def close(self) -> None:
        """Ends all workers."""
        for worker in {*self._places, *self._starting.values()}:
            self.ray.kill(worker)
        self._places, self._starting, self._idle = {}, {}, []
