"""One evaluation: tasks on a model, what is written and what is printed."""

import contextlib
import dataclasses
import functools
import json
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jdllm.evaluation.config import EvalConfig
from jdllm.evaluation.results import Sample, TaskResult, compared, show
from jdllm.load import enable_compilation_cache
from jdllm.model.config import ModelConfig, count_parameters
from jdllm.runtime import processes, sharding
from jdllm.runtime.environment import environment
from jdllm.runtime.files import alone, atomic_file, write_json
from jdllm.runtime.journal import FINISHED, Journal
from jdllm.tasks import published
from jdllm.tasks.graders import code
from jdllm.tasks.lm_eval import resolve
from jdllm.tasks.published_rows import find


def run(name: str, loaded: dict[str, Any], lm: Any, limit: int | None = None) -> TaskResult:
    """Evaluates what resolve() loaded for one name with a fresh JdllmLM."""
    from jdllm.evaluation.grading import grade, plain
    from jdllm.score.scoring import certainty

    score = grade(lm, name, loaded, limit=limit)
    records = {(record.task, record.doc_id, record.sample): record for record in lm.records}
    found = []
    for row in score.samples:
        for number, metrics in enumerate(row["each"]):
            record = records.get((row["task"], row["doc_id"], number))
            sample = Sample(
                task=row["task"],
                doc_id=row["doc_id"],
                sample=number,
                prompt=record.prompt if record else row["prompt"],
                completion=record.completion.text or "" if record else "",
                target=row["target"],
                metrics=metrics,
                nfe=record.completion.nfe if record else 0,
                tokens=len(record.completion.ids) if record else 0,
                seconds=record.cost.seconds if record else 0.0,
            )
            found.append(sample)
    metric = plain(resolve.quoted(next(iter(loaded["tasks"].values()))))
    metric = metric if metric in score.metrics else next(iter(score.metrics))
    unsafe = any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values())
    return TaskResult(
        name, metric, score.metrics, score.stderr, found, lm.speed, certainty(lm.likelihoods),
        code.described() if unsafe else None, lm.gen_kwargs,
    )  # fmt: skip


def save(folder: Path, facts: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """Writes samples.jsonl, a line a sample, and results.json."""
    with atomic_file(folder / "samples.jsonl") as file:
        for sample in (sample for result in results for sample in result.samples):
            line = json.dumps(dataclasses.asdict(sample), ensure_ascii=False)
            file.write(line.encode() + b"\n")
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
    return report(
        dataclasses.replace(config, decode=decode, chat=framed), llm.config, results
    ), results


def longest(loaded: dict[str, dict[str, Any]]) -> int:
    """The most columns that one of the tasks asks for, in whole blocks of 32."""
    tasks = [task for tasks in loaded.values() for task in tasks["tasks"].values()]
    asked = [(task.config.generation_kwargs or {}).get("max_gen_toks") or 128 for task in tasks]
    return -(-max(asked) // 32) * 32


def introduce(name: str, llm: Any) -> None:
    """Says what was loaded, and where."""
    what = f"{count_parameters(llm.config):,} parameters in {llm.config.dtype}"
    where = f"{processes.describe()}, {sharding.describe(llm.mesh)}"
    cores = f"{os.cpu_count()} CPU cores, jax {jax.__version__}"
    processes.say(f"model {name}: {what}\n{where} ({cores})")


def report(config: EvalConfig, model: ModelConfig, results: Sequence[TaskResult]) -> dict[str, Any]:
    """What results.json holds; `config` with its lengths resolved."""
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
                "nfe_mean": result.nfe_mean,
                "speed": result.speed.facts(),
            }
            | ({"likelihoods": result.estimates} if result.estimates else {})
            | ({"sandbox": result.sandbox} if result.sandbox else {})
            | ({"gen_kwargs": result.gen_kwargs} if result.gen_kwargs else {})
            for result in results
        },
        "speed": speed.facts(),
        "environment": environment(),
    }


@processes.joined()
def main(config: EvalConfig) -> None:
    """Evaluates, prints the table and an example, and writes the output folder if there is one."""
    enable_compilation_cache()
    row = find(config.preset) if config.preset else None
    if row:
        processes.say(f"{published.describe(row, changed=config.departures)}\n")
    with contextlib.ExitStack() as stack:
        journal = None
        if config.output:
            journal = open_journal(config.output, stack)
            if journal.records:
                processes.say(f"{len(journal.records)} samples are in {config.output} already")
        facts, results = evaluate(config, journal)
        if row:
            facts["preset"] = dataclasses.asdict(row) | {"departures": config.departures}
        if config.output and processes.leads():  # before it is shown to whoever has gone
            save(config.output, facts, results)
        show(facts["speed"], results)
        if row:
            print(f"\n{compared(row, results[0], config.departures)}\n")


def open_journal(folder: Path, stack: contextlib.ExitStack) -> Journal:
    """The folder's finished samples; of several processes one locks it and writes."""
    if processes.leads():
        stack.enter_context(alone(folder))
    return processes.first(lambda: Journal(folder / FINISHED, writes=processes.leads()))
