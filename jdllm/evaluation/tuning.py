"""Tuning: the fastest decode settings whose accuracy stays within a bound."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jdllm.evaluation.config import EvalConfig, TaskArgs
from jdllm.evaluation.report import Row, table
from jdllm.evaluation.settings import label, write_decode
from jdllm.evaluation.sweeps import SweepConfig, perform
from jdllm.load import enable_compilation_cache
from jdllm.runtime.files import alone, write_json
from jdllm.runtime.journal import FINISHED, Journal, going_on

VALIDATION_SEED = 7_000_003  # generated validation documents: none that seed=0, 1, ... draw
Speed = Literal["tokens_per_second", "tokens_per_forward"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig(TaskArgs):
    """A search for fast settings on the validation part of a task."""

    max_drop: float = 0.5
    """Accuracy that may be lost, in percentage points, against the first setting of the plan."""
    plan: str = "tune"
    """tune, or another plan (see jdllm.sweep), whose settings are tried; the first is the measure.

    That of tune decodes one token per step without a cache.
    """
    limit: int = 100
    """Validation documents: generated ones, or the first ones of the task's file."""
    seed: int = VALIDATION_SEED
    """Seed of the generated documents, which no small one draws, and of random:<name>."""
    by: Speed = "tokens_per_second"
    """What fast means; tokens_per_forward does not depend on the machine."""
    output: Path = Path("tuned.json")
    """The decode settings found; what was finished lies in the folder of the same name beside."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_drop < 0 or self.limit < 1:
            raise ValueError("max_drop counts from 0 and limit from 1")
        if "," in self.task + self.model:
            raise ValueError("settings are tuned for one task and one model at a time")
        self.runs()

    @property
    def going_on(self) -> str:
        """How to go on after an interrupt."""
        return going_on(self.output.with_suffix(""))

    def runs(self) -> list[EvalConfig]:
        """The evaluations, the measure first."""
        return SweepConfig(**self.shared(), plan=self.plan).runs()


def pick(rows: Sequence[Row], max_drop: float, by: str) -> int:
    """Index of the fastest row that loses at most `max_drop` points against the first one."""
    least = rows[0]["accuracy"] - max_drop - 1e-9
    good = [i for i, row in enumerate(rows) if row["accuracy"] >= least]
    return max(good, key=lambda i: rows[i][by])


def certainty(row: Row) -> str:
    """How sure the accuracy of a row is, in words."""
    if row["interval"]:
        return f"95 % interval of its accuracy: {row['interval']}"
    return f"standard error of one accuracy: {row['stderr'] or 0:.1f}"


def main(config: TuneConfig) -> None:
    """Evaluates every setting, prints the table and writes the chosen one."""
    enable_compilation_cache()
    work = config.output.with_suffix("")
    if work == config.output:
        raise ValueError(f"output={config.output} must end in .json")
    with alone(work):
        journal = Journal(work / FINISHED)
        found = list(perform(config.runs(), journal))
        runs, rows = [run for run, *_ in found], [row for _, row, _ in found]
        chosen = pick(rows, config.max_drop, config.by)
        settings = runs[chosen].decode
        write_decode(config.output, settings)
        facts = {"config": dataclasses.asdict(config), "chosen": chosen, "rows": rows}
        write_json(work / "table.json", facts)
    heads = ["setting", "accuracy", "tokens/forward", "tokens/s", "chosen"]
    cells = [
        [
            row["setting"], f"{row['accuracy']:.1f}", f"{row['tokens_per_forward']:.2f}",
            f"{row['tokens_per_second']:.0f}", "<-" if i == chosen else "",
        ]
        for i, row in enumerate(rows)
    ]  # fmt: skip
    best, base = rows[chosen], rows[0]
    gain = best[config.by] / base[config.by] if base[config.by] else float("inf")
    print(f"\n{table([heads, *cells])}\n")
    print(
        f"{label(settings)}: {base['accuracy'] - best['accuracy']:+.1f} points lost of at most "
        f"{config.max_drop} on {best['n']} validation documents ({certainty(best)}), "
        f"{gain:.1f} times the {config.by.replace('_', ' ')}"
    )
    print(f"wrote {config.output}; use it with decode_file={config.output}", file=sys.stderr)
