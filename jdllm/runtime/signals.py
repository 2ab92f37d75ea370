"""SIGINT and SIGTERM as one exception, and blocks that they interrupt only where it is safe."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ASKS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def status(error: KeyboardInterrupt) -> int:
    """The exit status that tells a shell which signal ended a process; 130 after Ctrl-C."""
    return error.status if isinstance(error, Interrupted) else 128 + signal.SIGINT


def _raise(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Both signals call `handler` in the block; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in ASKS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def raised() -> contextlib.AbstractContextManager[None]:
    """Both signals raise `Interrupted` in the block."""
    return handled(_raise)


@contextlib.contextmanager
def deferred(note: str) -> Iterator[Callable[[], Interrupted | None]]:
    """The first signal in the block is kept, and `note` said; a second one is raised at once.

    Yields the function that gives what was kept, for the block to raise where it may end.
    """
    kept: list[Interrupted] = []

    def keep(number: int, frame: FrameType | None) -> None:
        if kept:
            _raise(number, frame)
        kept.append(Interrupted(number))
        print(f"\n{note}", file=sys.stderr, flush=True)

    with handled(keep):
        yield lambda: kept[0] if kept else None
