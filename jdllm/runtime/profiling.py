"""Traces of a run, and what they say: the dearest kernels, and how long the device was busy.

A trace is a folder that xprof, TensorBoard and Perfetto open. On a GPU every stream is read, on a
CPU the threads on which XLA runs its operations.
"""

import contextlib
import dataclasses
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

NUMBER = re.compile(r"([_.]\d+)+$")  # what tells the copies of one kernel apart
SIZE = re.compile(r"\bsize:(\d+)")  # of a copy, in the details that CUDA gives
MOVED = ("bytes_accessed", "bytes accessed", "bytes")
HOST, DEVICE = "/host:CPU", "/device:"


@dataclasses.dataclass(frozen=True)
class Event:
    """One start of a kernel, on one line of a device."""

    name: str
    start: float
    """Seconds."""
    seconds: float
    bytes: int | None = None
    """Read and written, where the trace tells."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All starts of the kernels of one name."""

    name: str
    seconds: float
    calls: int
    share: float
    """Of the seconds of all kernels."""
    bytes_per_second: float | None
    """None where the trace tells no bytes."""


@dataclasses.dataclass(frozen=True)
class Wait:
    """All the times in which a device had nothing to do between the same two kernels."""

    before: str
    after: str
    seconds: float
    calls: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a trace says."""

    kernels: tuple[Kernel, ...]
    """The dearest first."""
    busy: float
    """Share of the time between its first and last kernel in which a device ran one."""
    seconds: float
    """Between the first and the last kernel."""
    devices: int
    waits: tuple[Wait, ...] = ()
    """The longest first."""

    def facts(self, many: int = 10) -> dict[str, Any]:
        """For a file of results."""
        return dataclasses.asdict(self) | {
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels[:many]],
            "waits": [dataclasses.asdict(wait) for wait in self.waits[:many]],
        }


@contextlib.contextmanager
def recording(folder: Path | None) -> Iterator[None]:
    """Writes a trace of what runs inside into the folder; None writes nothing.

    Python's own calls are left out: recording them would keep the device waiting.
    """
    if folder is None:
        yield
        return
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 2 if jax.default_backend() == "cpu" else 1
    with jax.profiler.trace(folder, profiler_options=options):
        yield


def newest(folder: Path) -> Path:
    """The latest trace under the folder; FileNotFoundError where there is none."""
    found = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} holds no trace (*.xplane.pb)")
    return found[-1]


def moved(stats: Iterable[tuple[Any, Any]]) -> int | None:
    """The bytes that an event's facts tell."""
    found = {str(name): value for name, value in stats}
    for name in MOVED:
        if name in found:
            return int(found[name])
    copied = SIZE.search(str(found.get("memcpy_details", "")))
    return int(copied[1]) if copied else None


def is_kernel(plane: str, stats: Any) -> bool:
    """Whether an event is a kernel; the threads of a CPU also tell of waiting and of handing on."""
    return plane != HOST or any(name == "hlo_op" for name, _ in stats)


def read(folder: Path) -> dict[str, list[Event]]:
    """Every start of a kernel in the latest trace of a folder, by device, in their order."""
    data = jax.profiler.ProfileData.from_file(str(newest(folder)))
    with warnings.catch_warnings():  # its C++ types warn on first use; as an error that aborts
        warnings.simplefilter("ignore", DeprecationWarning)
        return starts_of(data)


def starts_of(data: Any) -> dict[str, list[Event]]:
    """Every start of a kernel in a trace, by device."""
    planes = list(data.planes)
    named = [p for p in planes if p.name.startswith(DEVICE) and "CUSTOM" not in p.name.upper()]
    found: dict[str, list[Event]] = {}
    for plane in named or [p for p in planes if p.name == HOST]:
        lines = list(plane.lines)
        # A GPU's other lines repeat its streams, by operation and by program.
        streams = [line for line in lines if line.name.startswith("Stream")] or lines
        events = []
        for line in streams:
            for event in line.events:
                stats = list(event.stats)
                if event.duration_ns > 0 and is_kernel(plane.name, stats):
                    name = NUMBER.sub("", event.name)
                    start, seconds = event.start_ns / 1e9, event.duration_ns / 1e9
                    events.append(Event(name, start, seconds, moved(stats)))
        if events:
            found[plane.name] = sorted(events, key=lambda event: event.start)
    return found


def busy_seconds(events: Iterable[Event]) -> float:
    """The time in which at least one runs; events come in the order of their starts."""
    total, end = 0.0, float("-inf")
    for event in events:
        last = event.start + event.seconds
        total += max(0.0, last - max(event.start, end))
        end = max(end, last)
    return total


def waits(devices: dict[str, list[Event]]) -> list[Wait]:
    """Between which kernels the devices had nothing to do, the longest times first."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for events in devices.values():
        last = events[0]
        for event in events[1:]:
            gap = event.start - (last.start + last.seconds)
            if gap > 0:
                found[last.name, event.name].append(gap)
            if gap > -event.seconds:
                last = event
    rows = [Wait(*names, sum(gaps), len(gaps)) for names, gaps in found.items()]
    return sorted(rows, key=lambda wait: -wait.seconds)


def profile(devices: dict[str, list[Event]]) -> Profile:
    """Kernels of all devices together; how busy the devices were, on average."""
    if not devices:
        raise ValueError("the trace holds no kernel: what was recorded ran nothing on a device")
    by_name: dict[str, list[Event]] = defaultdict(list)
    for events in devices.values():
        for event in events:
            by_name[event.name].append(event)
    whole = sum(event.seconds for events in by_name.values() for event in events)
    kernels = [kernel(name, events, whole) for name, events in by_name.items()]
    spans = [
        max(event.start + event.seconds for event in events) - events[0].start
        for events in devices.values()
    ]
    busy = [busy_seconds(events) for events in devices.values()]
    return Profile(
        tuple(sorted(kernels, key=lambda kernel: -kernel.seconds)),
        sum(busy) / sum(spans),
        max(spans),
        len(devices),
        tuple(waits(devices)),
    )


def kernel(name: str, events: list[Event], whole: float) -> Kernel:
    """One kernel's starts, added up; its rate from those of which the bytes are known."""
    seconds = sum(event.seconds for event in events)
    told = [(event.bytes, event.seconds) for event in events if event.bytes is not None]
    rate = sum(size for size, _ in told) / sum(s for _, s in told) if told else None
    return Kernel(name, seconds, len(events), seconds / whole, rate)


def shown(found: Profile, many: int = 10) -> str:
    """The dearest kernels as a Markdown table, and how busy the device was."""
    lines = ["| kernel | time, ms | share, % | calls | GB/s |", "|---|---|---|---|---|"]
    for one in found.kernels[:many]:
        name = one.name if len(one.name) <= 60 else f"{one.name[:57]}..."
        rate = "-" if one.bytes_per_second is None else f"{one.bytes_per_second / 1e9:.0f}"
        cells = [name.replace("|", "/"), f"{1e3 * one.seconds:.3f}", f"{100 * one.share:.1f}"]
        lines.append(f"| {' | '.join([*cells, str(one.calls), rate])} |")
    lines += ["", "| idle after | before | time, ms | calls |", "|---|---|---|---|"]
    for wait in found.waits[: many // 2]:
        names = [name.replace("|", "/")[:60] for name in (wait.before, wait.after)]
        lines.append(f"| {' | '.join(names)} | {1e3 * wait.seconds:.3f} | {wait.calls} |")
    device = "device" if found.devices == 1 else f"{found.devices} devices"
    return "\n".join(
        [*lines, "", f"{device} busy {100 * found.busy:.1f} % of {found.seconds:.3f} s"]
    )
