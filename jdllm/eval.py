"""Evaluates a model on tasks through lm-eval; without arguments, the bundled one on 100 sudokus.

python -m jdllm.eval
python -m jdllm.eval task=gsm8k,mmlu data=FOLDER model=FOLDER output=results/llada
"""

import contextlib
import dataclasses
import functools
import json
import operator
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax

from jdllm.decode import DecodeConfig
from jdllm.evaluation.report import table
from jdllm.evaluation.settings import check_verifier, loading, read_decode
from jdllm.kernels.choose import choices
from jdllm.load import enable_compilation_cache
from jdllm.model.config import ModelConfig, count_parameters
from jdllm.runtime import cli, processes, sharding
from jdllm.runtime.environment import environment
from jdllm.runtime.fields import leaves
from jdllm.runtime.files import alone, atomic_file
from jdllm.runtime.journal import Journal, going_on
from jdllm.score.likelihood import LikelihoodConfig
from jdllm.tasks import published as presets
from jdllm.tasks.graders import code
from jdllm.tasks.lm_eval import resolve
from jdllm.tasks.published_rows import PRESETS, find

SHOWN = ("solved", "exact_match")  # the table's metrics; results.json has all
FINISHED = "finished.jsonl"  # in the output folder: every sample, as it was finished


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation of a model on one or more tasks."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {n: row.settings for n, row in PRESETS.items()}

    task: str = "sudoku"
    """One or more, separated by commas: ours (docs/tasks.md), lm-eval's, those of include_path."""
    model: str = "bundled"
    """bundled, a converted folder, random:<name>, or a Hugging Face folder or id."""
    allow_unknown: tuple[str, ...] = ()
    """Keys of a Hugging Face config.json to ignore although their meaning is not known here."""
    limit: int | None = None
    """Documents of each task (default: 100 generated ones, or the whole file)."""
    data: Path | None = None
    """Folder with the documents' files; what it does not have comes from the Hugging Face hub."""
    include_path: Path | None = None
    """Folder with lm-eval YAML files of your own, which win over tasks of the same name."""
    prompt_file: Path | None = None
    """The prompt of the task: a Jinja template over a document's fields."""
    shots: int | None = None
    """Examples in the prompt (default: the task's own)."""
    chat: bool | None = None
    """Whether prompts are framed by the model's chat template, if it has one (default: yes)."""
    confirm_run_unsafe_code: bool = False
    """Run the programs that the model writes: HumanEval, MBPP and their kin need it."""
    preset: str = ""
    """A published table row (docs/tasks.md): what it fixes but the model, where none is given."""
    decode: DecodeConfig = DecodeConfig()
    decode_file: Path | None = None
    """JSON with decode settings, as jdllm.tune writes it; decode.* changes them."""
    likelihood: LikelihoodConfig = LikelihoodConfig()
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
        if self.preset and self.decode_file:
            raise ValueError("preset and decode_file both set how to decode; leave one out")
        if self.data and not self.data.is_dir():
            raise ValueError(f"data={self.data} is no folder; name the one with the tasks' files")
        resolve.check(
            self.tasks,
            data=self.data,
            include_path=self.include_path,
            prompt_file=self.prompt_file,
        )
        if self.output and self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output={self.output} is a file; name a folder")
        check_verifier(self.verifier, [self.settings])
        for name in ("limit", "batch_size", "samples"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}={number} must be 1 or more")
        if (self.shots or 0) < 0:
            raise ValueError(f"shots={self.shots} must be 0 or more")

    @property
    def departures(self) -> list[str]:
        """Words for what is not as in the published row that `preset` names."""
        row = find(self.preset)
        there: dict[str, Any] = {"model": row.model, "task": row.task, "chat": row.chat}
        there |= {"shots": row.shots, "limit": None, "samples": 1}
        there |= {"prompt_file": None, "include_path": None}
        words = {n: getattr(self, n) for n, value in there.items() if getattr(self, n) != value}
        for name, used, fixed in (
            ("decode", self.settings, DecodeConfig.of(row.decode)),
            ("likelihood", self.likelihood, LikelihoodConfig(**row.likelihood)),
        ):
            published = leaves(fixed)
            words |= {f"{name}.{n}": v for n, v in leaves(used).items() if v != published[n]}
        return [f"{name}={value}" for name, value in words.items()]

    @property
    def going_on(self) -> str:
        """How to go on after an interrupt."""
        return going_on(self.output)

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
    """One task's scores, samples in document order, and cost (a jdllm.evaluation.speed.Speed)."""

    name: str
    metric: str
    """The metric to quote."""
    metrics: dict[str, float]
    stderr: dict[str, float | None]
    samples: list[Sample]
    speed: Any
    estimates: dict[str, float | None]
    """Of likelihoods: their number, and the standard errors of their estimates, in nats."""
    sandbox: str | None = None
    """Where the programs of a code task ran."""
    gen_kwargs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By task: the decode settings that its own generation_kwargs changed."""

    @property
    def documents(self) -> int:
        """How many documents there are, of all tasks of a group."""
        return len({(sample.task, sample.doc_id) for sample in self.samples})

    @property
    def nfe_mean(self) -> float:
        """Model evaluations for each document."""
        return sum(sample.nfe for sample in self.samples) / len(self.samples)


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


def score(result: TaskResult, metric: str) -> str:
    """A metric in percent with its standard error, as far as there are such."""
    if metric == "score":
        return f"{result.metric} {score(result, result.metric)}"
    if metric not in result.metrics:
        return "-"
    error = result.stderr[metric]
    spread = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * result.metrics[metric]:.1f}{spread} %"


def summary(results: Sequence[TaskResult]) -> str:
    """The table of scores and costs, a line per task."""
    shown = SHOWN if all(SHOWN[0] in result.metrics for result in results) else ("score",)
    header = ["task", "n", *(name.replace("_", " ") for name in shown)]
    rows = [[*header, "NFE/sample", "tokens/forward", "tokens/s"]]
    for result in results:
        costs = [
            f"{result.nfe_mean:.1f}",
            f"{result.speed.tokens_per_forward:.2f}",
            f"{result.speed.tokens_per_second:.1f}",
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


def save(folder: Path, facts: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """Writes samples.jsonl, a line per sample, and results.json."""
    with atomic_file(folder / "samples.jsonl") as file:
        for sample in (sample for result in results for sample in result.samples):
            line = json.dumps(dataclasses.asdict(sample), ensure_ascii=False)
            file.write(line.encode() + b"\n")
    with atomic_file(folder / "results.json") as file:
        file.write(json.dumps(facts, indent=2, default=str).encode() + b"\n")
    processes.say(f"wrote {folder / 'results.json'} and samples.jsonl")


def evaluate(
    config: EvalConfig, journal: Journal | None = None, llm: Any = None, leave: bool = True
) -> tuple[dict[str, Any], list[TaskResult]]:
    """Runs every task; returns what results.json holds, and the results themselves.

    What the journal holds is not generated again. `llm` is the model, where it is loaded already.
    `leave` says whether finished progress bars stay.
    """
    from jdllm.evaluation.harness import JdllmLM
    from jdllm.llm import LLM

    loaded = {name: load(name, config) for name in config.tasks}
    if llm is None:
        llm = LLM.load(**loading(config))
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


def load(name: str, config: EvalConfig) -> dict[str, Any]:
    """lm-eval's task objects for one name."""
    return resolve.resolve(
        [name],
        data=config.data,
        include_path=config.include_path,
        prompt_file=config.prompt_file,
        shots=config.shots,
        samples=config.samples,
        limit=config.limit,
        seed=config.seed,
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
    )


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
        "environment": environment() | {"kernels": choices()},
    }


@processes.joined()
def main(config: EvalConfig) -> None:
    """Evaluates, prints the table and an example, and writes the output folder if there is one."""
    enable_compilation_cache()
    row = find(config.preset) if config.preset else None
    if row:
        processes.say(f"{presets.describe(row, changed=config.departures)}\n")
    with contextlib.ExitStack() as stack:
        journal = None
        if config.output:
            journal = open_journal(config.output, stack)
            if journal.records:
                processes.say(f"{len(journal.records)} samples are in {config.output} already")
        facts, results = evaluate(config, journal)
        if row:
            facts["preset"] = dataclasses.asdict(row) | {"departures": config.departures}
        if config.output and processes.is_main():  # before it is shown to whoever has gone
            save(config.output, facts, results)
        show(facts["speed"], results)
        if row:
            print(f"\n{compared(row, results[0], config.departures)}\n")


def compared(row: presets.Preset, result: TaskResult, departures: Sequence[str]) -> str:
    """A preset with its published number beside the measured one."""
    name, measured, error = row.metric.removesuffix(",none"), None, None
    if row.metric == "tokens_per_second":
        measured = result.speed.tokens_per_second
    elif name in result.metrics:
        measured, error = 100 * result.metrics[name], result.stderr[name]
    return presets.describe(row, measured, error and 100 * error, departures)


def open_journal(folder: Path, stack: contextlib.ExitStack) -> Journal:
    """The folder's finished samples; of several processes one locks it and writes."""
    if processes.is_main():
        stack.enter_context(alone(folder))
    return processes.main_first(lambda: Journal(folder / FINISHED, writes=processes.is_main()))


def show(speed: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """Prints the table and a worked example, and says the cost."""
    print(f"\n{summary(results)}\n\n{example(results[0])}\n")
    processes.say(
        f"{speed['completion_tokens']} completion tokens, {speed['forwards']} forwards in "
        f"{speed['seconds']:.1f} s ({speed['forwards_per_second']:.1f} forwards/s), "
        f"after {speed['compile_seconds']:.1f} s of compilation; "
        f"latency p50 {speed['latency_p50']:.2f} s, p95 {speed['latency_p95']:.2f} s"
    )
    for result in results:
        if result.sandbox:
            print(f"{result.name}: programs ran in {result.sandbox}")
        if result.estimates and result.estimates["stderr_mean"] is not None:
            processes.say(
                "{}: {n} likelihoods, the standard error of an estimate is {stderr_mean:.3f} nats "
                "on average, {stderr_max:.3f} at most".format(result.name, **result.estimates)
            )
    if speed["shared_tokens"]:
        shared = speed["shared_tokens"]
        processes.say(f"{shared} prompt tokens came from prefixes that were computed once")


if __name__ == "__main__":
    cli.run(main, EvalConfig, "python -m jdllm.eval")
