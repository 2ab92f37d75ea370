"""A played Ray: workers are objects of this process, which a script of faults ends."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    """As Ray's: a worker is lost."""


class RayTaskError(RayError):
    """As Ray's: what a call raised."""

    def __init__(self, cause: Exception):
        self.cause = cause


class Handle:
    """A worker, each of whose methods has `remote`."""

    def __init__(self, played: "PlayedRay", worker: Any, number: int):
        self._played, self._worker, self._number, self.alive = played, worker, number, True

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> int:
            return self._played.call(self, self._worker, method, arguments)

        return SimpleNamespace(remote=remote)


class PlayedRay:
    """What a crew uses of Ray. `fault(worker number, call number)` says how a call ends: "", lost,
    or an exception to raise; `pick` chooses which of the calls under way ends first."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, fault: Callable[[int, int], Any], pick: Callable[[int], int] = lambda n: 0):
        self.fault, self.pick = fault, pick
        self.handles: list[Handle] = []
        self.results: dict[int, Any] = {}
        self.numbers = itertools.count()

    def remote(self, kind: type) -> Any:
        def start() -> Handle:
            self.handles.append(Handle(self, kind(), len(self.handles)))
            return self.handles[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def call(self, handle: Handle, worker: Any, method: str, arguments: tuple) -> int:
        ref = next(self.numbers)
        fault = self.fault(handle._number, ref)
        if not handle.alive or fault == "lost":
            handle.alive, self.results[ref] = False, RayError("lost")
        elif isinstance(fault, Exception):
            self.results[ref] = RayTaskError(fault)
        else:
            self.results[ref] = getattr(worker, method)(*arguments)
        return ref

    def wait(self, refs: list[int], timeout: float) -> tuple[list[int], list[int]]:
        i = self.pick(len(refs))
        return [refs[i]], refs[:i] + refs[i + 1 :]

    def get(self, ref: int) -> Any:
        if isinstance(self.results[ref], Exception):
            raise self.results[ref]
        return self.results[ref]

    def kill(self, handle: Handle) -> None:
        handle.alive = False

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="head:1")
