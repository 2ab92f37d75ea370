"""Sweeps: every model of a plan on every task with every decode setting, and a report of them."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jdllm.decode import DecodeConfig
from jdllm.evaluation import edit_folder, exit_sweep, exits
from jdllm.evaluation.config import EvalConfig, TaskArgs
from jdllm.evaluation.plans import Plan, read_plan
from jdllm.evaluation.report import NO_PLOTS, Row, can_plot, write_report
from jdllm.evaluation.results import TaskResult
from jdllm.evaluation.run import evaluate
from jdllm.evaluation.settings import check_verifier, label
from jdllm.load import enable_compilation_cache
from jdllm.runtime import cli, sharding
from jdllm.runtime.files import alone, write_json
from jdllm.runtime.journal import FINISHED, Journal, going_on
from jdllm.runtime.progress import Bar

Facts = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(TaskArgs):
    """A sweep over models, tasks and decode settings."""

    plan: str = "bundled"
    """bundled, dllmexp, tune, or a YAML or JSON file with models, tasks, settings, grid; edit
    compares exits (docs/edit.md)."""
    model: str = ""
    """Instead of the plan's models: one or more, separated by commas."""
    task: str = ""
    """Instead of the plan's tasks: one or more, separated by commas."""
    lengths: tuple[int, ...] = ()
    """plan=edit: lengths of completions (default: 128,256,512)."""
    rules: str = ""
    """plan=edit: patterns of rules, with commas: code,paper,step-* (default: all)."""
    maps: str = ""
    """plan=edit: patterns of maps, with commas (default: all that the adapter has)."""
    schedules: str = ""
    """plan=edit: patterns of schedules, with commas (default: gaussian and uniform)."""
    block: int = 0
    """plan=edit: columns of a block (default: EDIT's)."""
    scales: tuple[float, ...] = ()
    """plan=edit: what usual thresholds are multiplied by: 0.25,0.5,1,2. Each rule's best on every
    other document is reported on the rest (default: usual thresholds, on all documents)."""
    slack: float = 1.0
    """plan=edit: points of accuracy that a rule may lose where its threshold is chosen."""
    edit_folder: Path | None = None
    """A folder that EDIT's own eval has left: its accuracies and steps are counted, nothing is run.
    """
    dry_run: bool = False
    """Say what would be done, without weights: prompts, model calls at most, memory."""
    output: Path = Path("results/sweep")
    """Folder for the finished samples and the report."""

    def __post_init__(self):
        super().__post_init__()
        if self.edit_folder and not self.edit_folder.is_dir():
            raise ValueError(f"edit_folder={self.edit_folder} is no folder; name one of EDIT's")
        if self.compares_exits:
            self.check_tasks((self.task or exits.TASKS).split(","))
            if any(scale <= 0 for scale in self.scales) or self.block < 0 or self.slack < 0:
                raise ValueError(
                    f"scales={self.scales} must be above 0, block={self.block} and "
                    f"slack={self.slack} 0 or more"
                )
            if self.scales and (self.limit or 2) < 2:
                raise ValueError(f"scales= halve the documents; limit={self.limit} must be above 1")
            exit_sweep.planned(self)  # every mistake is found here
            return
        for name in ("lengths", "rules", "maps", "schedules", "block", "scales"):
            if getattr(self, name):
                raise ValueError(f"{name}= belongs to plan=edit; leave it out")
        plan = self.chosen()
        self.check_tasks(plan.tasks)
        check_verifier(self.verifier, plan.settings)
        self.runs()  # every mistake in the plan is found here

    @property
    def compares_exits(self) -> bool:
        """Whether exits are compared with full decoding, which has a report of its own."""
        return self.plan == "edit"

    @property
    def going_on(self) -> str:
        """How to go on after an interrupt."""
        return going_on(self.output)

    def chosen(self) -> Plan:
        """The plan with `model` and `task` in place of its own."""
        plan = read_plan(self.plan)
        models = tuple(self.model.split(",")) if self.model else plan.models
        tasks = tuple(self.task.split(",")) if self.task else plan.tasks
        return dataclasses.replace(plan, models=models, tasks=tasks)

    def runs(self) -> list[EvalConfig]:
        """What each run evaluates, models outermost; ValueError where one cannot be."""
        if self.compares_exits:
            return [run for *_, run in exit_sweep.planned(self)]
        plan = self.chosen()
        return [
            self.run_of(model, task, decode)
            for model, task, decode in itertools.product(plan.models, plan.tasks, plan.settings)
        ]

    def run_of(self, model: str, task: str, decode: DecodeConfig) -> EvalConfig:
        """The evaluation of one model on one task with one setting."""
        asks = self.verifier if decode.rule == "verify" else None
        own = {"task": task, "model": model, "decode": decode, "verifier": asks}
        return EvalConfig(**self.shared() | own)


def row_of(run: EvalConfig, result: TaskResult) -> Row:
    """What the table says about a run; accuracy in percent."""
    metric = result.metric
    error, ends = result.stderr[metric], result.intervals.get(metric)
    speed = result.speed.facts()
    return {
        "model": run.model,
        "task": run.task,
        "setting": label(run.settings),
        "n": result.documents,
        "metric": metric,
        "accuracy": 100 * result.metrics[metric],
        "stderr": None if error is None else 100 * error,
        "interval": ends and "{:.1f}-{:.1f}".format(*(100 * end for end in ends)),
        "nfe": result.nfe_mean,
    } | speed


def perform(
    runs: Sequence[EvalConfig], journal: Journal
) -> Iterator[tuple[EvalConfig, Row, Facts]]:
    """Runs what the journal does not hold yet, each model loaded once.

    Yields every run, its settings' lengths filled in, its row, and where it ran. A task that cannot
    be loaded is refused before any model is.
    """
    from jdllm.cluster.fleet import surroundings  # it would have --help wait

    for run in {run.task: run for run in runs}.values():
        for name in run.tasks:
            run.load_task(name)
    verifier = next((run.verifier for run in runs if run.verifier), None)
    bar = Bar(total=len(runs), unit="run", desc="sweep")
    with bar:
        for model, own in itertools.groupby(runs, key=lambda run: run.model):
            bar.set_postfix_str(f"loading {model}")
            llm = None  # which lets go of the one before
            for run in own:
                llm = llm or run.load_llm(verifier)
                bar.set_postfix_str(f"{run.task} {label(run.settings)}")
                facts, (result,) = evaluate(run, journal, llm, leave=False)
                decode = DecodeConfig.of(facts["config"]["decode"])
                row = row_of(run, result)
                bar.write(
                    f"{model}  {run.task}  {row['setting']}: {row['accuracy']:.1f} %, "
                    f"{row['tokens_per_forward']:.2f} tokens/forward, "
                    f"{row['tokens_per_second']:.0f} tokens/s",
                    file=sys.stderr,
                )
                bar.update(1)
                where = surroundings(llm) | {"mesh": sharding.describe(llm.mesh)}
                yield dataclasses.replace(run, decode=decode, decode_file=None), row, where


def main(config: SweepConfig) -> None:
    """Runs the plan and writes the report."""
    if config.edit_folder:
        print(edit_folder.report(config.edit_folder))
        return
    if not can_plot():
        print(f"note: {NO_PLOTS}", file=sys.stderr)
    enable_compilation_cache()
    if config.dry_run:
        from jdllm.evaluation.estimate import estimate

        print(estimate(config.runs()))
        return
    with alone(config.output):
        write_json(config.output / "config.json", dataclasses.asdict(config))
        names = exit_sweep.main(config) if config.compares_exits else sweep(config)
    print((config.output / "table.md").read_text())
    print(f"wrote {', '.join(names)} to {config.output}", file=sys.stderr)


def sweep(config: SweepConfig) -> list[str]:
    """Runs a plan of models, tasks and settings; returns the names of the report's files."""
    journal = Journal(config.output / FINISHED)
    done = list(perform(config.runs(), journal))
    facts = {"command": cli.command(config, "jdllm.sweep"), **done[-1][-1]}
    rows = [row for _, row, _ in done]
    return write_report(config.output, rows, facts)
