"""BlockInfer's benchmark: blocked, cached decoding against vanilla LLaDA on the same questions."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jdllm.arguments import ModelArgs
from jdllm.decode import DecodeConfig
from jdllm.evaluation import traffic
from jdllm.evaluation.report import table
from jdllm.evaluation.settings import placed
from jdllm.evaluation.speed import Cost, Speed
from jdllm.evaluation.traffic import Traffic
from jdllm.kernels.choose import choices
from jdllm.load import enable_compilation_cache
from jdllm.runtime import cli, profiling
from jdllm.runtime.environment import environment
from jdllm.runtime.files import write_json
from jdllm.runtime.progress import Bar
from jdllm.tasks import questions
from jdllm.tasks.questions import GENERATED, Question

QUESTIONS = 20  # of the generated tasks
NAMES = {"blockinfer": "blocked, cached", "vanilla_llada": "vanilla"}
COLUMNS = {  # figure -> its head in the table, with the unit
    "throughput": "tokens/s",
    "total_time": "time, s",
    "latency_p50": "latency p50, s",
    "latency_p95": "p95, s",
    "calls_per_second": "model calls/s",
    "tokens_per_forward": "tokens/forward",
    "accuracy": "accuracy, %",
    "compile_seconds": "compilation, s",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(ModelArgs):
    """BlockInfer's benchmark: blocked, cached decoding against vanilla LLaDA."""

    dataset: Path | None = None
    """jsonl with question, answer, choices, source (default: generated puzzles, see source)."""
    source: str | None = None
    """Only the rows of this source; without a dataset sudoku or countdown (default: both)."""
    num_samples: int | None = None
    """Questions at most (default: 20 generated ones, or the whole file)."""
    skip_sample: int = 0
    """Questions to leave out first."""
    max_tokens: int | None = None
    """Columns to generate (default: the model's own length, else 128)."""
    block_length: int | None = None
    """Columns of a block (default: 32, or the largest power of 2 below that divides max_tokens)."""
    denoising_steps: int | None = None
    """Steps of a block (default: one token per step)."""
    cache: Literal["none", "prefix", "dual"] = "dual"
    """Of the blocked run."""
    ignore_eos: bool = True
    """Fill every canvas to its end, as BlockInfer does, in both runs."""
    skip_vanilla: bool = False
    """Measure the blocked run alone."""
    batch_size: int = 32
    """Most rows of a batch, or slots of an engine."""
    engine: bool = False
    """Measure the engine instead: requests of random lengths that come at random, against batches
    that do not refill."""
    traffic: Traffic = Traffic()
    """engine=true: what comes."""
    decode: DecodeConfig = DecodeConfig()
    """engine=true: how to decode."""
    profile: Path | None = None
    """Folder for a trace that xprof or Perfetto opens, of the blocked run once more or of the
    engine's; the dearest kernels are printed."""
    output: Path = Path("benchmark_results.json")
    """File for the figures, the settings and what they were measured on."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("block_length", "max_tokens", "denoising_steps", "num_samples", "batch_size"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}={number} must be 1 or more")
        if self.skip_sample < 0:
            raise ValueError(f"skip_sample={self.skip_sample} must be 0 or more")
        if self.dataset is None and self.source not in (None, *GENERATED):
            raise ValueError(f"source={self.source} needs dataset=FILE.jsonl")
        if self.dataset and not self.dataset.is_file():
            raise ValueError(f"dataset={self.dataset} is not a file")
        if self.profile and self.profile.is_file():
            raise ValueError(f"profile={self.profile} is a file; name a folder")
        self.settings(4 * (self.block_length or 32))

    def lengths(self, own: int) -> dict[str, int]:
        """The three lengths, filled in where they are open; `own` is the model's, in columns.

        ValueError where they do not divide.
        """
        columns = self.max_tokens or own
        block = self.block_length or math.gcd(32, columns)
        steps = self.denoising_steps or block
        if steps > block:
            raise ValueError(
                f"denoising_steps={steps} are those of one block: at most block_length={block}"
            )
        if columns % block:
            raise ValueError(f"block_length={block} must divide max_tokens={columns}")
        return {"max_tokens": columns, "block_length": block, "denoising_steps": steps}

    def settings(self, own: int) -> dict[str, DecodeConfig]:
        """Both ways of decoding, by BlockInfer's names; `own` as in `lengths`."""
        columns, block, steps = self.lengths(own).values()
        shared: Any = {
            "gen_length": columns,
            "rule": "quota",
            "stop": "none" if self.ignore_eos else "eos",
            "seed": self.seed,
        }
        blocked = DecodeConfig(
            block_length=block, steps=steps * (columns // block), cache=self.cache, **shared
        )
        vanilla = DecodeConfig(block_length=columns, steps=columns, cache="none", **shared)
        ways = {"blockinfer": blocked} | ({} if self.skip_vanilla else {"vanilla_llada": vanilla})
        return {name: way.resolve() for name, way in ways.items()}


def read_questions(config: BenchConfig) -> list[Question]:
    """The questions asked for; ValueError where there are none."""
    if config.dataset is None:
        names = [config.source] if config.source else GENERATED
        count = config.skip_sample + (config.num_samples or QUESTIONS)
        found = questions.generated(names, count, config.seed)
    else:
        found = questions.read(config.dataset, config.source)
    chosen = found[config.skip_sample :][: config.num_samples]
    if not chosen:
        raise ValueError(
            f"dataset={config.dataset} has no question of source={config.source} after "
            f"skip_sample={config.skip_sample}"
        )
    return chosen


def measure(
    llm: Any, asked: Sequence[Question], decode: DecodeConfig, batch_size: int, name: str
) -> dict[str, Any]:
    """BlockInfer's figures of one way of decoding, and ours."""
    found = {}
    prompts = [question.prompt for question in asked]
    with Bar(total=len(prompts), desc=name, unit="prompt") as bar:
        for batch in llm.stream(prompts, decode, batch_size=batch_size):
            cost = Cost.of(batch)
            pairs = zip(batch.index, batch.completions, strict=True)
            found |= {i: (completion, cost) for i, completion in pairs}
            bar.update(len(batch.index))
    speed = Speed.of(found[i] for i in range(len(prompts)))
    right = sum(q.right(found[i][0].text or "") for i, q in enumerate(asked))
    return {
        "total_time": speed.seconds,
        "total_tokens": speed.completion_tokens,
        "throughput": speed.tokens_per_second,
        "avg_latency": speed.seconds / len(prompts),
        "num_prompts": len(prompts),
        "accuracy": 100 * right / len(prompts),
        "correct": right,
        "total": len(prompts),
    } | {name: value for name, value in speed.facts().items() if name != "completion_tokens"}


def compare(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """BlockInfer's comparison of the two."""
    ours, theirs = rows["blockinfer"], rows["vanilla_llada"]
    return {
        "throughput_speedup": ours["throughput"] / max(theirs["throughput"], 1e-9),
        "time_speedup": theirs["total_time"] / ours["total_time"],
        "accuracy_diff": ours["accuracy"] - theirs["accuracy"],
    }


def shown(rows: dict[str, dict[str, Any]]) -> str:
    """The table, with units, and the comparison of both runs below it."""
    cells = [
        [NAMES[name], *(f"{row[figure]:.2f}" for figure in COLUMNS)] for name, row in rows.items()
    ]
    text = table([["decoding", *COLUMNS.values()], *cells])
    if len(rows) < 2:
        return text
    found = compare(rows)
    return (
        f"{text}\n\nblocked against vanilla: {found['throughput_speedup']:.2f} times the tokens/s, "
        f"{found['time_speedup']:.2f} times as fast over all, "
        f"accuracy {found['accuracy_diff']:+.1f} percentage points"
    )


def profiled(config: BenchConfig) -> dict[str, Any]:
    """Prints the dearest kernels of the trace, if there is one, and returns them for the file."""
    if config.profile is None:
        return {}
    found = profiling.profile(profiling.read(config.profile))
    print(f"\n{profiling.shown(found)}\n\ntrace in {config.profile}")
    return {"profile": found.facts()}


def measure_engine(config: BenchConfig) -> None:
    """Measures the engine, prints the table and writes `output`."""
    llm = config.load_llm()
    rows = traffic.measure(
        llm, config.decode, config.traffic, config.batch_size, config.seed, config.profile
    )
    print(f"\n{config.traffic.requests} requests\n\n{traffic.shown(rows)}")
    facts: dict[str, Any] = dict(rows) | profiled(config)
    facts |= {
        "config": dataclasses.asdict(config) | placed(llm),
        "command": cli.command(config, "jdllm.bench"),
        "environment": environment() | {"kernels": choices()},
    }
    write_json(config.output, facts)
    print(f"wrote {config.output}")


def main(config: BenchConfig) -> None:
    """Runs both, prints the table and writes `output`."""
    enable_compilation_cache()
    if config.engine:
        measure_engine(config)
        return
    asked = read_questions(config)
    llm = config.load_llm()
    if llm.tokenizer is None:
        raise ValueError("the questions are text, and this model has no tokenizer; try grid")
    own = llm.defaults.gen_length or 128
    rows = {
        name: measure(llm, asked, decode, config.batch_size, NAMES[name])
        for name, decode in config.settings(own).items()
    }
    if config.profile:  # once more: recording takes time, and compilation is no kernel
        with profiling.recording(config.profile):
            list(
                llm.stream(
                    [question.prompt for question in asked],
                    config.settings(own)["blockinfer"],
                    batch_size=config.batch_size,
                )
            )
    facts: dict[str, Any] = dict(rows) | profiled(config)
    if len(rows) == 2:
        facts["comparison"] = compare(rows)
    facts |= {
        "config": dataclasses.asdict(config) | config.lengths(own) | placed(llm),
        "command": cli.command(config, "jdllm.bench"),
        "environment": environment() | {"kernels": choices()},
    }
    sources = ", ".join(dict.fromkeys(question.source for question in asked if question.source))
    print(f"\n{len(asked)} questions ({sources or 'of no named source'})\n\n{shown(rows)}")
    write_json(config.output, facts)
    print(f"wrote {config.output}")
