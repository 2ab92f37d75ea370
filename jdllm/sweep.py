"""Runs a plan of models x tasks x decode settings, and reports it; run again to go on after a kill.

python -m jdllm.sweep                                              # twelve settings, bundled model
python -m jdllm.sweep plan=dllmexp confirm_run_unsafe_code=true output=results/dllmexp
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jdllm.decode import DecodeConfig
from jdllm.eval import FINISHED, EvalConfig, TaskResult, evaluate, load
from jdllm.evaluation.plans import Plan, read_plan
from jdllm.evaluation.report import NO_PLOTS, Row, can_plot, write_report
from jdllm.evaluation.settings import check_verifier, label
from jdllm.load import enable_compilation_cache
from jdllm.runtime import cli, sharding
from jdllm.runtime.environment import environment
from jdllm.runtime.files import alone, atomic_file
from jdllm.runtime.journal import Journal, going_on
from jdllm.runtime.progress import Bar


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A sweep over models, tasks and decode settings."""

    plan: str = "bundled"
    """bundled, dllmexp, tune, or a YAML or JSON file with models, tasks, settings, grid."""
    model: str = ""
    """Instead of the plan's models: one or more, separated by commas."""
    allow_unknown: tuple[str, ...] = ()
    """Keys of a Hugging Face config.json to ignore although their meaning is not known here."""
    task: str = ""
    """Instead of the plan's tasks: one or more, separated by commas."""
    limit: int | None = None
    """Documents of each task (default: 100 generated ones, or the whole file)."""
    data: Path | None = None
    """Folder with the files of tasks that read some."""
    include_path: Path | None = None
    """Folder with lm-eval YAML files of your own, which win over tasks of the same name."""
    shots: int | None = None
    """Examples in the prompt (default: the tasks' own)."""
    chat: bool | None = None
    """Whether prompts are framed by a model's chat template, if it has one (default: yes)."""
    confirm_run_unsafe_code: bool = False
    """Run the programs that the models write: HumanEval, MBPP and their kin need it."""
    verifier: str | None = None
    """The causal model that settings with rule=verify ask."""
    mesh: str = "auto"
    dtype: str = "auto"
    batch_size: int = 32
    seed: int = 0
    output: Path = Path("results/sweep")
    """Folder for the finished samples and the report."""

    def __post_init__(self):
        check_verifier(self.verifier, self.chosen().settings)
        self.runs()  # every mistake in the plan is found here

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
        plan = self.chosen()
        return [
            self.run_of(model, task, decode)
            for model, task, decode in itertools.product(plan.models, plan.tasks, plan.settings)
        ]

    def run_of(self, model: str, task: str, decode: DecodeConfig) -> EvalConfig:
        """The evaluation of one model on one task with one setting."""
        own = {"task": task, "model": model, "decode": decode, "output": None}
        own["verifier"] = self.verifier if decode.rule == "verify" else None
        names = {field.name for field in dataclasses.fields(EvalConfig)} - set(own)
        return EvalConfig(**own, **{n: v for n, v in vars(self).items() if n in names})


def row_of(run: EvalConfig, result: TaskResult) -> Row:
    """What the table says about a run; accuracy in percent."""
    metric = result.metric
    error = result.stderr[metric]
    speed = result.speed.facts()
    return {
        "model": run.model,
        "task": run.task,
        "setting": label(run.settings),
        "n": result.documents,
        "metric": metric,
        "accuracy": 100 * result.metrics[metric],
        "stderr": None if error is None else 100 * error,
        "nfe": result.nfe_mean,
    } | speed


def perform(runs: Sequence[EvalConfig], journal: Journal) -> Iterator[tuple[EvalConfig, Row]]:
    """Runs what the journal does not hold yet, each model loaded once.

    Yields every run, its settings' lengths filled in, and its row. A task that cannot be loaded is
    refused before any model is.
    """
    from jdllm.llm import LLM

    for run in {run.task: run for run in runs}.values():
        for name in run.tasks:
            load(name, run)
    verifier = next((run.verifier for run in runs if run.verifier), None)
    bar = Bar(total=len(runs), unit="run", desc="sweep")
    with bar:
        for model, own in itertools.groupby(runs, key=lambda run: run.model):
            bar.set_postfix_str(f"loading {model}")
            llm = None
            for run in own:
                llm = llm or LLM.load(
                    model, run.mesh, run.dtype, run.seed, verifier, run.allow_unknown
                )
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
                yield dataclasses.replace(run, decode=decode, decode_file=None), row


def command(config: SweepConfig) -> str:
    """The command line of a sweep."""
    words = [
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default or field.name == "plan"
    ]
    return " ".join(["python -m jdllm.sweep", *words])


def main(config: SweepConfig) -> None:
    """Runs the plan and writes the report."""
    if not can_plot():
        print(f"note: {NO_PLOTS}", file=sys.stderr)
    enable_compilation_cache()
    with alone(config.output):
        with atomic_file(config.output / "config.json") as file:
            facts = dataclasses.asdict(config)
            file.write(json.dumps(facts, indent=2, default=str).encode() + b"\n")
        journal = Journal(config.output / FINISHED)
        rows = [row for _, row in perform(config.runs(), journal)]
        where = environment() | {"mesh": sharding.describe(sharding.parse_mesh(config.mesh))}
        names = write_report(config.output, rows, {"command": command(config), **where})
    print((config.output / "table.md").read_text())
    print(f"wrote {', '.join(names)} to {config.output}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, SweepConfig, "python -m jdllm.sweep")
