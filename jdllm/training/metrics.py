"""Metrics of a run: metrics.jsonl is the truth, a logger may stand beside it, then a curve."""

import contextlib
import importlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax

from jdllm.runtime import files, processes

EXTRA = "pip install 'jdllm[loggers]'"


class Logger(Protocol):
    """Where metrics go besides the file."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class Wandb:
    """wandb, and trackio, which has its names. A resumed run goes on under its own id."""

    def __init__(self, name: str, folder: Path, run: str, settings: dict[str, Any]):
        module = imported(name)
        own = {"id": run, "dir": str(folder)} if name == "wandb" else {}
        resume = "allow"
        self.run = module.init(
            project="jdllm", name=run, resume=resume, config=settings, **own
        )  # fmt: skip
        self.module = module

    def log(self, step: int, values: dict[str, float]) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


class TensorBoard:
    """Event files in output/tensorboard, written by tensorboardX; all starts of a run lie there."""

    def __init__(self, name: str, folder: Path, run: str, settings: dict[str, Any]):
        self.writer = imported("tensorboardX").SummaryWriter(str(folder / "tensorboard" / run))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


LOGGERS = {"wandb": Wandb, "trackio": Wandb, "tensorboard": TensorBoard}


def imported(name: str) -> Any:
    """A logger's package; ValueError, with the command that installs it, where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"logger needs the package {name}: {EXTRA}") from None


@contextlib.contextmanager
def logging(kind: str, folder: Path, run: str, settings: dict[str, Any]) -> Iterator[Logger | None]:
    """The logger of that kind while the block runs, on the process that writes; None for none."""
    if kind == "none" or not processes.is_main():
        yield None
        return
    logger = LOGGERS[kind](kind, folder, run, settings)
    try:
        yield logger
    finally:
        logger.close()


class Metrics:
    """metrics.jsonl: one line every `every` steps. Values are fetched one line late, so that the
    device never waits for the host.

    Opening it drops the lines after step `start` (the run will write them again) and a torn one.
    Of several processes one `writes`.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        start: int,
        writes: bool = True,
        logger: Logger | None = None,
    ):
        self.every, self.writes, self.logger = every, writes, logger
        self.pending: tuple[int, float, dict[str, jax.Array]] | None = None
        self.last: dict[str, float] = {}
        self.before: tuple[int, float] | None = None
        self.rate = 0.0
        """Tokens per second between the last two lines."""
        if writes:
            self._cut(path, start)
        self.file = (path if writes else Path(os.devnull)).open("a")

    def _cut(self, path: Path, start: int) -> None:
        kept = []
        if path.exists():
            lines = (line for line in path.read_text().splitlines() if line.endswith("}"))
            kept = [line for line in lines if json.loads(line)["step"] <= start]
        with files.atomic_file(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Notes the metrics of update `step` (counted from 1)."""
        if self.writes and step % self.every == 0:
            self.flush()
            self.pending = (step, time.time(), values)

    def flush(self) -> None:
        """Writes what was noted last."""
        if self.pending:
            step, now, values = self.pending
            self.last = {name: float(value) for name, value in values.items()}
            if self.before and now > self.before[1]:
                steps, seconds = step - self.before[0], now - self.before[1]
                self.rate = self.last.get("tokens", 0.0) * steps / seconds
            self.before = step, now
            self.write(step, now, self.last)
        self.pending = None

    def write(self, step: int, now: float, values: dict[str, float]) -> None:
        """Writes a line of its own; a value that is not finite becomes null, which is JSON."""
        if not self.writes:
            return
        line = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self.file.write(json.dumps({"step": step, "time": now} | line) + "\n")
        self.file.flush()
        if self.logger:
            self.logger.log(step, values)

    def pause(self) -> None:
        """Tells that time went by without a step, so that it is not measured as steps' time."""
        self.flush()
        self.before = None

    def shown(self) -> dict[str, str]:
        """What the bar shows."""
        found = {k: f"{self.last[k]:.4f}" for k in ("loss", "nll") if k in self.last}
        return found | ({"tokens/s": f"{self.rate:,.0f}"} if self.rate else {})


def draw_curve(folder: Path) -> Path | None:
    """Draws metrics.jsonl as curve.png; None where matplotlib is not installed or nothing is there.

    The loss is drawn with a running mean, because its noise levels differ from step to step.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if v is not None} for line in lines]
    figure = Figure(figsize=(8, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    drawn = False
    for axes, names in ((upper, ("loss", "nll", "eval_nll")), (lower, ("gradient_norm",))):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if not points:
                continue
            drawn = True
            steps, values = zip(*points, strict=True)
            faint = 0.3 if name == "loss" else 1.0
            axes.plot(steps, values, label=name, alpha=faint, color=COLOURS[name])
            if name == "loss":
                axes.plot(steps, smooth(values), label="loss, running mean", color=COLOURS[name])
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    lower.set_xlabel("step")
    if not drawn:
        return None
    path = folder / "curve.png"
    with files.atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return path


COLOURS = {"loss": "C0", "nll": "C1", "eval_nll": "C2", "gradient_norm": "C3"}


def smooth(values: tuple[float, ...]) -> list[float]:
    """An exponential running mean over about a twentieth of the values."""
    keep = 1 - 1 / max(len(values) / 20, 1)
    mean, found = values[0], []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        found.append(mean)
    return found
