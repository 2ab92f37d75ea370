"""One evaluation: tasks on a model, what is written and what is printed."""

import contextlib
import dataclasses
import functools
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jdllm.evaluation.config import EvalConfig
from jdllm.evaluation.results import Sample, TaskResult, compared, show
from jdllm.evaluation.settings import longest, placed
from jdllm.load import enable_compilation_cache
from jdllm.model.config import ModelConfig, count_parameters
from jdllm.runtime import cli, processes, sharding
from jdllm.runtime.files import alone, write_json, write_json_lines
from jdllm.runtime.journal import FINISHED, Journal
from jdllm.tasks import published
from jdllm.tasks.graders import code
from jdllm.tasks.lm_eval import ours, resolve
from jdllm.tasks.published_rows import find


def run(name: str, loaded: dict[str, Any], lm: Any, limit: int | None = None) -> TaskResult:
    """Evaluates what resolve() loaded for one name with a fresh JdllmLM."""
    from jdllm.evaluation.grading import grade, plain
    from jdllm.score.scoring import certainty

    score = grade(lm, name, loaded, limit=limit)
    metric = plain(resolve.quoted(next(iter(loaded["tasks"].values()))))
    metric = metric if metric in score.metrics else next(iter(score.metrics))
    found = samples_of(score.samples, metric.partition(",")[2] or "none", lm)
    unsafe = any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values())
    return TaskResult(
        name, metric, score.metrics, score.stderr, found, lm.speed, certainty(lm.likelihoods),
        code.described() if unsafe else None, lm.gen_kwargs,
    )  # fmt: skip


def samples_of(rows: Sequence[dict[str, Any]], part: str, lm: Any) -> list[Sample]:
    """The samples of graded documents, with what `lm` recorded of each.

    Their answers are those that the grader reads, or else that the filter `part` leaves.
    """
    records = {(record.task, record.doc_id, record.sample): record for record in lm.records}
    scored: dict[tuple, list[Any]] = {}
    for one in lm.scored:
        scored.setdefault((one.task, one.doc_id), []).append(one)
    found = []
    for row in rows:
        own = {"task": row["task"], "doc_id": row["doc_id"], "target": row["target"]}
        choices = scored.get((row["task"], row["doc_id"]), [])
        for number, metrics in enumerate(row["each"]):
            record = records.get((row["task"], row["doc_id"], number))
            more = {"metrics": metrics, "sample": number} | own
            if record:
                left = row["filtered"].get(part, [])
                left = str(left[number]) if number < len(left) else None
                found.append(generated(record, left, more))
            else:
                found.append(compared_choices(choices, row["prompt"], more))
    return found


def generated(record: Any, left: str | None, facts: dict[str, Any]) -> Sample:
    """The sample of a completion; `left` is what lm-eval's filter left of it."""
    done, text = record.completion, record.completion.text or ""
    read = ours.READERS.get(record.task)
    return Sample(
        prompt=record.prompt, completion=text, nfe=done.nfe, tokens=len(done.ids),
        seconds=record.cost.seconds, answer=read(text) if read else left,
        finish_reason=done.finish_reason, calls=done.calls, exits=done.exits, **facts,
    )  # fmt: skip


def compared_choices(scored: Sequence[Any], prompt: str, facts: dict[str, Any]) -> Sample:
    """The sample of a document whose texts were scored."""
    choices = [{"text": s.text, "value": s.score.value, "stderr": s.score.stderr} for s in scored]
    best = max(choices, key=lambda choice: choice["value"], default=None)
    return Sample(
        prompt=prompt, completion="", tokens=0, choices=choices,
        nfe=sum(one.score.calls for one in scored),
        seconds=sum(one.score.seconds for one in scored),
        answer=best["text"] if best and len(choices) > 1 else None, **facts,
    )  # fmt: skip


def save(folder: Path, facts: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """Writes samples.jsonl, a line per sample, and results.json."""
    samples = (dataclasses.asdict(one) for result in results for one in result.samples)
    write_json_lines(folder / "samples.jsonl", samples)
    write_json(folder / "results.json", facts)
    processes.say(f"wrote {folder / 'results.json'} and samples.jsonl")


def evaluate(
    config: EvalConfig, journal: Journal | None = None, llm: Any = None, leave: bool = True
) -> tuple[dict[str, Any], list[TaskResult]]:
    """Runs every task; returns what results.json holds, and the results themselves.

    What the journal holds is not generated again. `llm` is the model, where it is loaded already.
    `leave` says whether finished progress bars stay.
    """
    from jdllm.evaluation.harness import JdllmLM

    loaded = {name: config.load_task(name, config.samples) for name in config.tasks}
    if llm is None:
        llm = config.load_llm()
        introduce(config.model, llm)
    decode = llm.resolve(config.settings, gen_length=longest(loaded))
    shared: Any = {"batch_size": config.batch_size, "journal": journal, "leave": leave}
    shared |= {"decode": config.settings, "length": longest(loaded)}
    shared |= {"likelihood": config.likelihood, "chat": config.chat is not False}
    results, framed = [], False
    for name, tasks in loaded.items():
        lm = JdllmLM(llm, **shared)
        results.append(run(name, tasks, lm, config.limit))
        framed |= lm.frames
    resolved = dataclasses.replace(config, decode=decode, chat=framed, **placed(llm))
    facts = {"command": cli.command(config, "jdllm.eval")} | report(resolved, llm, results)
    if decode.exit.aims:
        facts["cosines"] = llm.maps.alignment(decode.exit)
    return facts, results


def introduce(name: str, llm: Any) -> None:
    """Says what was loaded, and where."""
    what = f"{count_parameters(llm.config):,} parameters in {llm.config.held}"
    from jdllm.cluster.fleet import Fleet

    spread = f"{llm.crew.count} workers, each " if isinstance(llm, Fleet) else ""
    where = f"{spread or processes.describe() + ', '}{sharding.describe(llm.mesh)}"
    cores = f"{os.cpu_count()} CPU cores, jax {jax.__version__}"
    processes.say(f"model {name}: {what}\n{where} ({cores})")


def report(config: EvalConfig, llm: Any, results: Sequence[TaskResult]) -> dict[str, Any]:
    """What results.json holds; `config` with its lengths resolved."""
    model: ModelConfig = llm.config
    from jdllm.cluster.fleet import kernels, surroundings

    speed = functools.reduce(operator.add, [result.speed for result in results])
    return {
        "config": dataclasses.asdict(config),
        "model": {
            "name": config.model,
            "parameters": count_parameters(model),
            "config": dataclasses.asdict(model),
        },
        "tasks": {
            result.name: {
                "n": result.documents,
                "metrics": result.metrics,
                "stderr": result.stderr,
                "intervals": result.intervals,
                "nfe_mean": result.nfe_mean,
                "speed": result.speed.facts(),
            }
            | ({"likelihoods": result.estimates} if result.estimates else {})
            | ({"sandbox": result.sandbox} if result.sandbox else {})
            | ({"gen_kwargs": result.gen_kwargs} if result.gen_kwargs else {})
            for result in results
        },
        "speed": speed.facts(),
        "environment": surroundings(llm) | {"kernels": kernels(llm)},
    }


@processes.joined()
def main(config: EvalConfig) -> None:
    """Evaluates, prints the table and an example, and writes the output folder if there is one."""
    enable_compilation_cache()
    if config.dry_run:
        from jdllm.evaluation.estimate import estimate

        print(estimate([config]))
        return
    row = find(config.preset) if config.preset else None
    if row:
        processes.say(f"{published.describe(row, changed=config.departures)}\n")
    with contextlib.ExitStack() as stack:
        journal = None
        if config.output:
            journal = open_journal(config.output, stack)
            if journal.records:
                done = f"{len(journal.records)} samples are finished"
                processes.say(f"{done} in {config.output} already")
        facts, results = evaluate(config, journal)
        if row:
            facts["preset"] = dataclasses.asdict(row) | {"departures": config.departures}
        if config.output and processes.is_main():  # before it is shown to whoever has gone
            save(config.output, facts, results)
        show(facts["speed"], results)
        if cosines := facts.get("cosines"):
            own = ", ".join(f"{name} {value:+.3f}" for name, value in cosines.items())
            print(f"cosine of exit.map={config.settings.exit.map} and B: {own}\n")
        if row:
            print(f"\n{compared(row, results[0], config.departures)}\n")


def open_journal(folder: Path, stack: contextlib.ExitStack) -> Journal:
    """The folder's finished samples; of several processes one locks it and writes."""
    if processes.is_main():
        stack.enter_context(alone(folder))
    return processes.main_first(lambda: Journal(folder / FINISHED, writes=processes.is_main()))
