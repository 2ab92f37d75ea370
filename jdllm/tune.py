"""Finds the fastest decode settings whose accuracy stays within a bound, and writes them.

python -m jdllm.tune max_drop=0.5                     # bundled model, sudoku; writes tuned.json
python -m jdllm.eval task=sudoku decode_file=tuned.json
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jdllm.eval import FINISHED, EvalConfig
from jdllm.evaluation.report import Row, table
from jdllm.evaluation.settings import label, write_decode
from jdllm.load import enable_compilation_cache
from jdllm.runtime import cli
from jdllm.runtime.files import alone, atomic_file
from jdllm.runtime.journal import Journal, going_on
from jdllm.sweep import SweepConfig, perform

VALIDATION_SEED = 7_000_003  # generated validation documents: none that seed=0, 1, ... draw
Speed = Literal["tokens_per_second", "tokens_per_forward"]


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """A search for fast settings on the validation part of a task."""

    max_drop: float = 0.5
    """Accuracy that may be lost, in percentage points, against the first setting of the plan."""
    model: str = "bundled"
    allow_unknown: tuple[str, ...] = ()
    """Keys of a Hugging Face config.json to ignore although their meaning is not known here."""
    task: str = "sudoku"
    plan: str = "tune"
    """tune, or another plan (see jdllm.sweep), whose settings are tried; the first is the measure.

    That of tune decodes one token per step without a cache.
    """
    limit: int = 100
    """Validation documents: generated ones, or the first ones of the task's file."""
    by: Speed = "tokens_per_second"
    """What fast means; tokens_per_forward does not depend on the machine."""
    data: Path | None = None
    """Folder with the files of tasks that read some."""
    include_path: Path | None = None
    """Folder with lm-eval YAML files of your own, which win over tasks of the same name."""
    shots: int | None = None
    """Examples in the prompt (default: the task's own)."""
    chat: bool | None = None
    """Whether prompts are framed by the model's chat template, if it has one (default: yes)."""
    confirm_run_unsafe_code: bool = False
    """Run the programs that the model writes: HumanEval, MBPP and their kin need it."""
    verifier: str | None = None
    """The causal model that settings with rule=verify ask."""
    mesh: str = "auto"
    dtype: str = "auto"
    batch_size: int = 32
    output: Path = Path("tuned.json")
    """The decode settings found; what was finished lies in the folder of the same name beside."""

    def __post_init__(self):
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
        names = {field.name for field in dataclasses.fields(SweepConfig)} - {"output"}
        given = {name: value for name, value in vars(self).items() if name in names}
        return SweepConfig(seed=VALIDATION_SEED, **given).runs()


def pick(rows: Sequence[Row], max_drop: float, by: str) -> int:
    """Index of the fastest row that loses at most `max_drop` points against the first one."""
    least = rows[0]["accuracy"] - max_drop - 1e-9
    good = [i for i, row in enumerate(rows) if row["accuracy"] >= least]
    return max(good, key=lambda i: rows[i][by])


def main(config: TuneConfig) -> None:
    """Evaluates every setting, prints the table and writes the chosen one."""
    enable_compilation_cache()
    work = config.output.with_suffix("")
    if work == config.output:
        raise ValueError(f"output={config.output} must end in .json")
    with alone(work):
        journal = Journal(work / FINISHED)
        found = list(perform(config.runs(), journal))
        runs, rows = [run for run, _ in found], [row for _, row in found]
        chosen = pick(rows, config.max_drop, config.by)
        settings = runs[chosen].decode
        write_decode(config.output, settings)
        with atomic_file(work / "table.json") as file:
            facts = {"config": dataclasses.asdict(config), "chosen": chosen, "rows": rows}
            file.write(json.dumps(facts, indent=2, default=str).encode() + b"\n")
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
        f"{config.max_drop} on {best['n']} validation documents (standard error of one accuracy: "
        f"{best['stderr'] or 0:.1f}), {gain:.1f} times the {config.by.replace('_', ' ')}"
    )
    print(f"wrote {config.output}; use it with decode_file={config.output}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, TuneConfig, "python -m jdllm.tune")
