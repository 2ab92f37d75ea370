"""What a training run leaves of its gradient dynamics: a log, heat maps, and maps for exits."""

import dataclasses
import functools
import io
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdllm.runtime import files, processes
from jdllm.store.dynamics import write_dynamics
from jdllm.train.dynamics import STATISTICS, WINDOWS, Dynamics, described, flattened
from jdllm.train.optimiser import Recipe

LOG = "dynamics.jsonl"
MODULE = re.compile(r"layers\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True)
class DynamicsConfig:
    """Gradient dynamics of LoRA's B, which exit.mode=code and paper read (docs/edit.md)."""

    windows: str = ""
    """Averages of the updates that are kept, with commas: mean, late, ema, momentum; mean is
    EDIT's. Each takes as much memory as B. Default: none."""

    def __post_init__(self):
        unknown = [name for name in self.names if name not in WINDOWS]
        if unknown:
            raise ValueError(
                f"dynamics.windows={self.windows} has {unknown[0]}, which is none of "
                f"{', '.join(WINDOWS)}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The windows that were named."""
        return tuple(name.strip() for name in self.windows.split(",") if name.strip())

    def begin(self, recipe: Recipe) -> Callable[[Any], Dynamics] | None:
        """What makes the dynamics before the first update; None where no window was named."""
        if not self.names:
            return None
        return functools.partial(
            Dynamics.of, steps=recipe.steps, epsilon=recipe.epsilon, windows=self.names
        )


def open_log(output: Path, every: int, start: int, dynamics: Dynamics | None) -> "Log":
    """The log of a run's dynamics; it writes nothing without them, nor on a second process."""
    if dynamics is None or not processes.is_main():
        return Log(None, every, start, 0.0)
    return Log(output / LOG, every, start, dynamics.epsilon)


class Log:
    """dynamics.jsonl: STATISTICS of every module, a line every `every` updates.

    Values are fetched one line late, so that the device never waits. Opening it drops the lines
    after step `start`, which the run will write again, and a torn one.
    """

    def __init__(self, path: Path | None, every: int, start: int, epsilon: float):
        self.every, self.path = every, path
        self.describe = jax.jit(functools.partial(described, epsilon=epsilon))
        self.pending: tuple[int, float, dict[str, jax.Array]] | None = None
        if path:
            kept = [line for line in read_log(path) if line["step"] <= start]
            files.write_json_lines(path, kept)

    def add(self, step: int, moments: Any) -> None:
        """Notes the moments after update `step`."""
        if self.path and step % self.every == 0:
            self.flush()
            self.pending = (step, time.time(), self.describe(moments))

    def flush(self) -> None:
        """Writes what was noted last; a number that is not finite becomes null."""
        if self.pending and self.path:
            step, now, found = self.pending
            modules = {
                name: dict(zip(STATISTICS, map(finite, np.asarray(row).tolist()), strict=True))
                for name, row in found.items()
            }
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "time": now, "modules": modules}) + "\n")
        self.pending = None


def finite(value: float) -> float | None:
    """The number, or None where JSON has none."""
    return value if math.isfinite(value) else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a dynamics.jsonl; none where there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def write_maps(folder: Path, dynamics: Dynamics, facts: Mapping[str, Any]) -> None:
    """Writes every window's map into an adapter's folder, on one of several processes."""
    found = processes.gather({name: flattened(own) for name, own in dynamics.maps().items()})
    maps = {name: found[name] for name in WINDOWS if name in found}  # a pytree forgets the order
    own = {
        "updates": int(processes.gather(dynamics.count)), "steps": dynamics.steps,
        "epsilon": dynamics.epsilon, "windows": list(maps), "layout": "[outputs, rank]",
        "modules": sorted(next(iter(maps.values()))),
    }  # fmt: skip
    if processes.is_main():
        write_dynamics(folder, maps, own | dict(facts))


def heat_maps(path: Path, statistic: str = "update_norm") -> bytes | None:
    """PNG of a statistic by layer and module over time; None without matplotlib or lines."""
    lines = read_log(path)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not lines:
        return None
    parts: dict[str, dict[int, list[float]]] = {}
    for name in lines[0]["modules"]:
        if found := MODULE.fullmatch(name):
            values = [line["modules"][name][statistic] for line in lines]
            values = [math.nan if value is None else value for value in values]
            parts.setdefault(found[2], {})[int(found[1])] = values
    canvas = Figure(figsize=(4.2 * len(parts), 4.2), dpi=100, layout="constrained")
    panels = np.atleast_1d(canvas.subplots(1, len(parts), sharey=True))
    steps = [line["step"] for line in lines]
    for axes, (part, rows) in zip(panels, sorted(parts.items()), strict=True):
        layers = sorted(rows)
        ends = (steps[0] - 0.5, steps[-1] + 0.5, layers[-1] + 0.5, layers[0] - 0.5)
        image = axes.imshow([rows[i] for i in layers], aspect="auto", extent=ends)
        axes.set(title=part, xlabel="update")
        canvas.colorbar(image, ax=axes)
    panels[0].set_ylabel("layer")
    canvas.suptitle(f"{statistic.replace('_', ' ')} of B")
    data = io.BytesIO()
    canvas.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def draw_heat_maps(output: Path) -> None:
    """Writes dynamics.png beside dynamics.jsonl, where it can be drawn."""
    if data := heat_maps(output / LOG):
        with files.atomic_file(output / "dynamics.png") as file:
            file.write(data)
