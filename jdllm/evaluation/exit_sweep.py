"""plan=edit: every exit, map and schedule on every task and length, beside full decoding."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jdllm.decode import DecodeConfig
from jdllm.evaluation import exit_report, exits, held_out, oracle
from jdllm.evaluation.config import EvalConfig
from jdllm.evaluation.exit_report import Line
from jdllm.evaluation.exits import LAST_MASK, Entry
from jdllm.evaluation.paired import Weighed
from jdllm.evaluation.results import Sample
from jdllm.evaluation.run import evaluate
from jdllm.runtime import cli, sharding
from jdllm.runtime.journal import FINISHED, Journal
from jdllm.runtime.progress import Bar

if TYPE_CHECKING:  # which stands on this file
    from jdllm.evaluation.sweeps import SweepConfig

Planned = tuple[str, int, Entry, EvalConfig]
"""Task, length, line of the comparison, and its evaluation."""


def planned(config: "SweepConfig") -> list[Planned]:
    """Everything that is run, tasks outermost; ValueError where something cannot be."""
    tasks = (config.task or exits.TASKS).split(",")
    found = []
    for task, length in itertools.product(tasks, config.lengths or exits.LENGTHS):
        found += [
            (task, length, entry, run_of(config, task, entry))
            for entry in exits.entries(
                task, length, config.adapter, config.rules, config.maps, config.schedules,
                config.scales, config.block,
            )
        ]  # fmt: skip
    return found


def run_of(config: "SweepConfig", task: str, entry: Entry) -> EvalConfig:
    """The evaluation of a line of the comparison; ValueError where it cannot be."""
    own: dict[str, Any] = {"task": task, "decode": entry.decode, "verifier": None}
    own["model"] = config.model or "bundled"
    return EvalConfig(**config.shared() | own)


def perform(runs: Sequence[Planned], llm: Any, journal: Journal) -> Iterator[Line]:
    """Runs what the journal does not hold yet, and yields every line."""
    from jdllm.cluster.fleet import peak  # it would have --help wait

    with Bar(total=len(runs), unit="run", desc="exits", disable=not runs) as bar:
        for task, length, entry, run in runs:
            bar.set_postfix_str(f"{task} {length} {entry.schedule} {entry.rule} {entry.map}")
            _, (result,) = evaluate(run, journal, llm, leave=False)
            line = Line(task, length, entry, result, peak(llm))
            steps = sum(line.steps) / len(line.steps)
            bar.write(
                f"{task} {length} {entry.schedule} {entry.rule} {entry.map} x{entry.scale:g}: "
                f"{100 * result.metrics[result.metric]:.1f} %, {steps:.1f} steps",
                file=sys.stderr,
            )
            bar.update(1)
            yield line


def fixed_steps(
    config: "SweepConfig", lines: Sequence[Line], llm: Any, journal: Journal, half: int | None
) -> list[Weighed | None]:
    """Every line beside fixed steps with as many calls on the documents of a half, or on all."""
    wanted = [held_out.matched(line) for line in lines]
    runs: list[Planned] = [
        (line.task, line.length, entry, run_of(config, line.task, entry))
        for line, entries in zip(lines, wanted, strict=True)
        for entry in entries
    ]
    different = {entry.decode: (task, n, entry, run) for task, n, entry, run in runs}
    done = {
        line.entry.decode: line.on(half) for line in perform(list(different.values()), llm, journal)
    }
    return [
        held_out.against(line, [done[entry.decode] for entry in entries])
        for line, entries in zip(lines, wanted, strict=True)
    ]


def oracle_rows(
    lines: Sequence[Line], rows: Sequence[exit_report.Row], runs: Sequence[Planned], llm: Any
) -> list[exit_report.Row]:
    """The oracle's row under every schedule, for tasks whose verdict is a function of the text."""
    found = []
    for line, row, (_, _, _, run) in zip(lines, rows, runs, strict=True):
        if line.entry.rule != LAST_MASK:
            continue
        (task,) = run.load_task(line.task)["tasks"].values()
        if task.config.filter_list:
            continue
        docs, metric = list(task.eval_docs), line.result.metric

        def right(sample: Sample, text: str, docs=docs, metric=metric, task=task) -> bool:
            return task.process_results(docs[sample.doc_id], [text])[metric] == 1

        steps = oracle.stops(
            llm, line.result.samples, run.settings, right, run.batch_size, run.chat is not False
        )
        found.append(exit_report.oracle_row(row, steps))
    return found


def alignments(runs: Sequence[Planned], llm: Any) -> dict[str, dict[str, float]]:
    """The cosine of every map with B, by module, for the code's choice of modules."""
    settings: dict[str, DecodeConfig] = {
        entry.map: entry.decode for _, _, entry, _ in runs if entry.decode.exit.mode == "code"
    }
    return {name: llm.maps.alignment(decode.exit) for name, decode in settings.items()}


def main(config: "SweepConfig") -> list[str]:
    """Runs the plan, and returns the names of the files that the report is made of."""
    from jdllm.cluster.fleet import surroundings

    runs = planned(config)
    if words := exits.described(config.adapter):
        print(f"note: {words}", file=sys.stderr)
    for run in {task: run for task, _, _, run in runs}.values():
        run.load_task(run.task)  # before a model is loaded
    journal = Journal(config.output / FINISHED)
    llm = runs[0][3].load_llm()
    lines, half, tried = list(perform(runs, llm, journal)), None, []
    if config.scales:
        tried = exit_report.rows_of([line.on(0) for line in lines])
        places = held_out.chosen([line.on(0) for line in lines], config.slack)
        half, runs, lines = 1, [runs[i] for i in places], [lines[i].on(1) for i in places]
    fixed = fixed_steps(config, lines, llm, journal, half)
    rows = exit_report.rows_of(lines, fixed)
    rows += oracle_rows(lines, rows, runs, llm)
    facts = {"command": cli.command(config, "jdllm.sweep"), **surroundings(llm)}
    facts["mesh"] = sharding.describe(llm.mesh)
    facts["config"] = dataclasses.asdict(config)
    return exit_report.write(config.output, rows, lines, alignments(runs, llm), facts, tried)
