"""Evaluates a model on tasks through lm-eval; without arguments, the bundled one on 100 sudokus.

python -m jdllm.eval
python -m jdllm.eval task=sudoku_d1,countdown_d1 data=FOLDER model=FOLDER output=results/d1
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import operator
import os
import platform
import subprocess
import textwrap
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import jdllm
from jdllm import cli, processes, sharding
from jdllm.configs import ModelConfig, count_parameters
from jdllm.decode import DecodeConfig
from jdllm.files import alone, atomic_file
from jdllm.journal import Journal
from jdllm.load import enable_compilation_cache
from jdllm.settings import read_decode
from jdllm.tasks import TASKS, Doc, Task

GENERATED = 100  # documents of a generated task, where limit= does not say
SHOWN = ("solved", "exact_match")  # the table's metrics; results.json has all
FINISHED = "finished.jsonl"  # in the output folder: every sample, as it was finished
PACKAGES = ("jax", "jaxlib", "flax", "lm_eval")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation of a model on one or more tasks."""

    task: str = "sudoku"
    """One or more of sudoku, countdown, sudoku_d1, countdown_d1, separated by commas."""
    model: str = "bundled"
    """bundled, a converted folder, random:<name>, or a Hugging Face folder or id."""
    limit: int | None = None
    """Documents of each task (default: 100 generated ones, or the whole file)."""
    data: Path | None = None
    """Folder with the files of sudoku_d1 and countdown_d1."""
    decode: DecodeConfig = DecodeConfig()
    decode_file: Path | None = None
    """JSON with decode settings, as jdllm.tune writes it; decode.* changes them."""
    mesh: str = "auto"
    """data x model, for example 4x1; auto is data parallel where the model fits a device."""
    dtype: str = "auto"
    """Compute dtype; auto keeps the stored one, on a CPU float32."""
    batch_size: int = 32
    """Most rows of a batch."""
    verifier: str | None = None
    """The causal model that decode.rule=verify asks."""
    seed: int = 0
    """Seed of the generated documents, and of the weights of random:<name>."""
    output: Path | None = None
    """Folder for results.json and samples.jsonl (default: print only).

    What is finished is kept there at once: run the same command again to go on after a kill.
    """
    samples: int = 1
    """Completions of each document; metrics are means (one is enough without temperature)."""

    def __post_init__(self):
        for name in self.tasks:
            if name not in TASKS:
                near = difflib.get_close_matches(name, TASKS)
                hint = f"did you mean {' or '.join(near)}? " if near else ""
                raise ValueError(f"task={name} is unknown; {hint}There are {', '.join(TASKS)}")
            if (read := TASKS[name].read) and self.data is None:
                try:
                    read(None)  # says which folder and which file are wanted
                except FileNotFoundError as error:
                    raise ValueError(str(error)) from None
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"task={self.task} names a task twice")
        if self.output and self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output={self.output} is a file; name a folder")
        if self.decode_file:
            read_decode(self.decode_file)
        for name in ("limit", "batch_size", "samples"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}={number} must be 1 or more")

    @property
    def settings(self) -> DecodeConfig:
        """`decode`, on top of what `decode_file` says."""
        return read_decode(self.decode_file, self.decode) if self.decode_file else self.decode

    @property
    def tasks(self) -> list[str]:
        """The names in `task`."""
        return [name.strip() for name in self.task.split(",")]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One line of samples.jsonl."""

    task: str
    doc_id: int
    sample: int
    prompt: str
    completion: str
    target: str
    metrics: dict[str, float]
    nfe: int
    tokens: int
    """Completion tokens."""
    seconds: float
    """Latency: those of its batch."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task's scores, samples in document order, and cost (a jdllm.speed.Speed)."""

    task: Task
    metrics: dict[str, float]
    stderr: dict[str, float | None]
    samples: list[Sample]
    speed: Any

    @property
    def nfe_mean(self) -> float:
        """Model evaluations for each document."""
        return sum(sample.nfe for sample in self.samples) / len(self.samples)


def documents(task: Task, config: EvalConfig) -> list[Doc]:
    """The documents to grade `task` on: held-out generated ones, or those of its file."""
    if task.read is None:
        return task.generate(config.limit or GENERATED, config.seed, held_out=True)
    docs = task.read(config.data)
    if not docs:
        raise ValueError(f"the file of {task.name} in data={config.data} has no documents")
    return docs[: config.limit]


def run(task: Task, docs: Sequence[Doc], lm: Any, samples: int = 1) -> TaskResult:
    """Evaluates one task with a fresh JdllmLM."""
    from jdllm.grading import run_task

    score = run_task(lm, task, docs, samples)
    rows = {row["doc_id"]: row for row in score.samples}
    found = []
    for record in sorted(lm.records, key=lambda record: (record.doc_id, record.sample)):
        row = rows[record.doc_id]
        metrics = {name: row[name] for name in score.metrics}
        if samples > 1:  # lm-eval's are means over the document's samples
            metrics = task.grade(docs[record.doc_id], record.completion.text or "")
        sample = Sample(
            task=task.name,
            doc_id=record.doc_id,
            sample=record.sample,
            prompt=record.prompt,
            completion=record.completion.text or "",
            target=row["target"],
            metrics=metrics,
            nfe=record.completion.nfe,
            tokens=len(record.completion.ids),
            seconds=record.cost.seconds,
        )
        found.append(sample)
    return TaskResult(task, score.metrics, score.stderr, found, lm.speed)


def commit() -> str | None:
    """The git commit of the package's own checkout, marked -dirty where files differ from it.

    None where there is no git, or where the package is not one of the checkout's own files (an
    environment may lie inside some other project's checkout).
    """
    here = Path(jdllm.__file__)
    git = ["git", "-C", str(here.parent)]
    own = [*git, "ls-files", "--error-unmatch", here.name]
    name = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(own, check=True, capture_output=True)
        return subprocess.run(name, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    devices = jax.devices()
    return {
        "jdllm": jdllm.__version__,
        **{name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": devices[0].device_kind,
        "device_count": len(devices),
        "commit": commit(),
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under the first row: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def score(result: TaskResult, metric: str) -> str:
    """A metric in percent with its standard error, as far as there are such."""
    if metric not in result.metrics:
        return "-"
    error = result.stderr[metric]
    spread = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * result.metrics[metric]:.1f}{spread} %"


def summary(results: Sequence[TaskResult]) -> str:
    """The table of scores and costs, a line a task."""
    header = ["task", "n", *(name.replace("_", " ") for name in SHOWN)]
    rows = [[*header, "NFE/sample", "tokens/forward", "tokens/s"]]
    for result in results:
        costs = [
            f"{result.nfe_mean:.1f}",
            f"{result.speed.tokens_per_forward:.2f}",
            f"{result.speed.tokens_per_second:.1f}",
        ]
        scores = [score(result, name) for name in SHOWN]
        rows.append([result.task.name, str(len(result.samples)), *scores, *costs])
    return table(rows)


def example(result: TaskResult) -> str:
    """The first sample as it went: prompt, completion, target and verdict."""
    sample = result.samples[0]
    scores = ", ".join(f"{name}={value:g}" for name, value in sample.metrics.items())
    verdict = "right" if sample.metrics[result.task.metric] == 1 else "wrong"
    parts = {
        "prompt": sample.prompt,
        "completion": sample.completion,
        "target": sample.target,
        "verdict": f"{verdict} ({scores}), NFE {sample.nfe}",
    }
    lines = [f"one worked example ({sample.task}, document {sample.doc_id})"]
    for name, text in parts.items():
        shown = [part for line in text.splitlines() for part in textwrap.wrap(line, 84) or [""]]
        lines.append(f"  {name:<12}" + ("\n" + " " * 14).join(shown))
    return "\n".join(lines)


def save(folder: Path, facts: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """Writes samples.jsonl, a line a sample, and results.json."""
    with atomic_file(folder / "samples.jsonl") as file:
        for sample in (sample for result in results for sample in result.samples):
            line = json.dumps(dataclasses.asdict(sample), ensure_ascii=False)
            file.write(line.encode() + b"\n")
    with atomic_file(folder / "results.json") as file:
        file.write(json.dumps(facts, indent=2, default=str).encode() + b"\n")
    print(f"wrote {folder / 'results.json'} and samples.jsonl")


def evaluate(
    config: EvalConfig, journal: Journal | None = None, llm: Any = None, leave: bool = True
) -> tuple[dict[str, Any], list[TaskResult]]:
    """Runs every task; returns what results.json holds, and the results themselves.

    What the journal holds is not generated again. `llm` is the model, where it is loaded already.
    `leave` says whether finished progress bars stay.
    """
    from jdllm.harness import JdllmLM
    from jdllm.llm import LLM

    docs = {name: documents(TASKS[name], config) for name in config.tasks}
    if llm is None:
        llm = LLM.load(config.model, config.mesh, config.dtype, config.seed, config.verifier)
        introduce(config.model, llm)
    length = max(TASKS[name].gen_length for name in docs)
    decode = llm.resolve(config.settings, gen_length=length)
    shared: Any = {"batch_size": config.batch_size, "journal": journal, "leave": leave}
    results = []
    for name, chosen in docs.items():
        lm = JdllmLM(llm, decode=decode, **shared)
        results.append(run(TASKS[name], chosen, lm, config.samples))
    return report(dataclasses.replace(config, decode=decode), llm.config, results), results


def introduce(name: str, llm: Any) -> None:
    """Prints what was loaded, and where."""
    print(f"model {name}: {count_parameters(llm.config):,} parameters in {llm.config.dtype}")
    where = f"{processes.describe()}, {sharding.describe(llm.mesh)}"
    print(f"{where} ({os.cpu_count()} CPU cores, jax {jax.__version__})")


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
            result.task.name: {
                "n": len({sample.doc_id for sample in result.samples}),
                "metrics": result.metrics,
                "stderr": result.stderr,
                "nfe_mean": result.nfe_mean,
                "speed": result.speed.facts(),
            }
            for result in results
        },
        "speed": speed.facts(),
        "environment": environment(),
    }


def main(config: EvalConfig) -> None:
    """Evaluates, prints the table and an example, and writes the output folder if there is one."""
    processes.initialize()
    enable_compilation_cache()
    with contextlib.ExitStack() as stack:
        journal = None
        if config.output:
            journal = open_journal(config.output, stack)
            if journal.records:
                print(f"{len(journal.records)} samples are finished in {config.output} already")
        facts, results = evaluate(config, journal)
        show(facts["speed"], results)
        if config.output and processes.leads():
            save(config.output, facts, results)


def open_journal(folder: Path, stack: contextlib.ExitStack) -> Journal:
    """The folder's finished samples; of several processes one locks it and writes."""
    if processes.leads():
        stack.enter_context(alone(folder))
        journal = Journal(folder / FINISHED)
        processes.meet("journal")
        return journal
    processes.meet("journal")
    return Journal(folder / FINISHED, writes=False)


def show(speed: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """Prints the table, a worked example and the cost."""
    print(f"\n{summary(results)}\n\n{example(results[0])}\n")
    print(
        f"{speed['completion_tokens']} completion tokens, {speed['forwards']} forwards in "
        f"{speed['seconds']:.1f} s ({speed['forwards_per_second']:.1f} forwards/s), "
        f"after {speed['compile_seconds']:.1f} s of compilation; "
        f"latency p50 {speed['latency_p50']:.2f} s, p95 {speed['latency_p95']:.2f} s"
    )


if __name__ == "__main__":
    cli.run(main, EvalConfig, "python -m jdllm.eval")
