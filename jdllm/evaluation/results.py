"""What an evaluation found, and how it reads: a table, a worked example, what it cost."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from jdllm.evaluation.intervals import interval
from jdllm.evaluation.report import table
from jdllm.runtime import processes
from jdllm.tasks import published

SHOWN = ("solved", "exact_match")  # the table's metrics; results.json has all


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
    """Latency: those of its batch; of likelihoods, its rows' share of their batches."""
    answer: str | None = None
    """What was read out of the completion, or the most likely of the choices."""
    finish_reason: str | None = None
    """Of a completion: stop or length."""
    calls: list[int] = dataclasses.field(default_factory=list)
    """Of a completion: model calls of each block."""
    exits: list[int] = dataclasses.field(default_factory=list)
    """Of a completion: numbers of the blocks that exit.* left early."""
    choices: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Of likelihoods: each text with its value in nats and the standard error of that."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task's scores, samples in document order, and cost (a jdllm.evaluation.speed.Speed)."""

    name: str
    metric: str
    """The metric to quote."""
    metrics: dict[str, float]
    stderr: dict[str, float | None]
    samples: list[Sample]
    speed: Any
    estimates: dict[str, float | None]
    """Of likelihoods: their number, standard errors in nats, model evaluations and seconds."""
    sandbox: str | None = None
    """Where the programs of a code task ran."""
    gen_kwargs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By task: the decode settings that its own generation_kwargs changed."""

    @property
    def documents(self) -> int:
        """How many documents there are, of all tasks of a group."""
        return len({(sample.task, sample.doc_id) for sample in self.samples})

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of the metrics whose standard error is 0: where they lie, at 95 %."""
        n = self.documents
        found = {k: interval(v, self.stderr.get(k), n) for k, v in self.metrics.items()}
        return {name: ends for name, ends in found.items() if ends}

    @property
    def nfe_mean(self) -> float:
        """Model evaluations for each document."""
        return sum(sample.nfe for sample in self.samples) / len(self.samples)


def score(result: TaskResult, metric: str) -> str:
    """A metric in percent with its standard error, or an interval where that is 0."""
    if metric == "score":
        return f"{result.metric} {score(result, result.metric)}"
    if metric not in result.metrics:
        return "-"
    error = result.stderr[metric]
    spread = "" if error is None else f" ± {100 * error:.1f}"
    if around := interval(result.metrics[metric], error, result.documents):
        spread = " ({:.1f}-{:.1f})".format(*(100 * end for end in around))
    return f"{100 * result.metrics[metric]:.1f}{spread} %"


def summary(results: Sequence[TaskResult]) -> str:
    """The table of scores and costs, a line per task."""
    shown = SHOWN if all(SHOWN[0] in result.metrics for result in results) else ("score",)
    header = ["task", "n", *(name.replace("_", " ") for name in shown)]
    rows = [[*header, "NFE/sample", "tokens/forward", "tokens/s"]]
    for result in results:
        costs = [
            f"{result.nfe_mean:.1f}",
            f"{result.speed.tokens_per_forward:.2f}" if result.speed.nfe else "-",
            f"{result.speed.tokens_per_second:.1f}" if result.speed.nfe else "-",
        ]
        scores = [score(result, name) for name in shown]
        rows.append([result.name, str(result.documents), *scores, *costs])
    return table(rows)


def example(result: TaskResult) -> str:
    """The first sample as it went: prompt, completion, target and verdict."""
    sample = result.samples[0]
    scores = ", ".join(f"{name}={value:g}" for name, value in sample.metrics.items())
    verdict = "right" if sample.metrics.get(result.metric) == 1 else "wrong"
    parts = {
        "prompt": sample.prompt,
        "completion": sample.completion,
        "target": sample.target,
        "verdict": f"{verdict} ({scores}), NFE {sample.nfe}",
    }
    lines = [f"one worked example ({sample.task}, document {sample.doc_id})"]
    for name, text in parts.items():
        shown = [part for line in text.splitlines() for part in textwrap.wrap(line, 84) or [""]]
        if len(shown) > 20:  # few-shot examples would push the table off the screen
            shown = [*shown[:5], "[...]", *shown[-14:]]
        lines.append(f"  {name:<12}" + ("\n" + " " * 14).join(shown))
    return "\n".join(lines)


def compared(row: published.Preset, result: TaskResult, departures: Sequence[str]) -> str:
    """A preset with its published number beside the measured one."""
    name, measured, error = row.metric.removesuffix(",none"), None, None
    if row.metric == "tokens_per_second":
        measured = result.speed.tokens_per_second
    elif name in result.metrics:
        measured, error = 100 * result.metrics[name], result.stderr[name]
    return published.describe(row, measured, error and 100 * error, departures)


def show(speed: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """Prints the table and a worked example, and says the cost."""
    print(f"\n{summary(results)}\n")
    if any(result.intervals for result in results):
        print("in brackets: Wilson's 95 % interval, where all documents agree\n")
    print(f"{example(results[0])}\n")
    if speed["calls"]:
        processes.say(
            f"{speed['completion_tokens']} completion tokens in {speed['nfe']} forwards (all "
            f"samples' NFE), {speed['calls']} model calls of batches in {speed['seconds']:.1f} s "
            f"({speed['calls_per_second']:.1f} calls/s), "
            f"after {speed['compile_seconds']:.1f} s of compilation; "
            f"latency p50 {speed['latency_p50']:.2f} s, p95 {speed['latency_p95']:.2f} s"
        )
    for result in results:
        if result.sandbox:
            print(f"{result.name}: programs ran in {result.sandbox}")
        if found := result.estimates:
            line = (
                "{}: {n} likelihoods in {calls} model evaluations of a row and {seconds:.1f} s, "
                "compilation included"
            ).format(result.name, **found)
            if found["stderr_mean"] is not None:
                line += (
                    "; the standard error of an estimate is {stderr_mean:.3f} nats on average, "
                    "{stderr_max:.3f} at most"
                ).format(**found)
            processes.say(line)
    if speed["shared_tokens"]:
        shared = speed["shared_tokens"]
        processes.say(f"{shared} prompt tokens came from prefixes that were computed once")
