"""Measures decoding: blocked and cached against vanilla, and forwards per second over a grid.

python -m jdllm.bench                                          # bundled model, generated countdown
python -m jdllm.bench dataset=sample_200.jsonl source=gsm8k model=GSAI-ML/LLaDA-8B-Instruct
python -m jdllm.bench grid model=random:tiny blocks=8,16 batches=1,4 caches=none,dual
"""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdllm.decode import DecodeConfig
from jdllm.evaluation.report import table
from jdllm.evaluation.settings import loading
from jdllm.kernels.choose import choices
from jdllm.load import enable_compilation_cache
from jdllm.model.config import count_parameters
from jdllm.runtime import cli, sharding
from jdllm.runtime.environment import environment
from jdllm.runtime.files import atomic_file
from jdllm.runtime.progress import Bar
from jdllm.tasks import TASKS

GENERATED = 50  # questions of a generated task
NAMES = {"blockinfer": "blocked, cached", "vanilla_llada": "vanilla"}
TAILS = {  # our wording of what BlockInfer asks of each source
    "gsm8k": "Work it out step by step. Write the final number in curly braces, like {{answer}}.",
    "math500": "Solve it. Write the final answer in curly braces, like {{answer}}.",
    "mmlu": "Write nothing but the number of the right option in curly braces, like {{0}}.",
    "longbench_hotpotqa": "Answer briefly, with the answer in curly braces, like {{answer}}.",
    "": "Write the answer in curly braces, like {{answer}}.",
}
ANSWER = r"answer(?: is)?:?\s*(.+?)(?:\.|<|$)"
# Where there are no braces: patterns in this order, of which the first match counts
FALLBACKS = {
    "gsm8k": [r"####\s*([\d,.]+)", r"(?:answer|result):\s*([\d,.]+)", r"=\s*([\d,.]+)",
              r"([\d,.]+)(?!.*[\d,.])"],
    "math500": [r"\\boxed\{([^}]+)\}", ANSWER],
    "mmlu": [r"(?<!\d)([0-3])(?!\d)", r"([0-3])"],
    "longbench_hotpotqa": [ANSWER],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """BlockInfer's benchmark: blocked, cached decoding against vanilla LLaDA."""

    model: str = "bundled"
    """bundled, a converted folder, random:<name>, or a Hugging Face folder or id."""
    allow_unknown: tuple[str, ...] = ()
    """Keys of a Hugging Face config.json to ignore although their meaning is not known here."""
    dataset: Path | None = None
    """jsonl with question, answer, choices, source (default: a generated task, see source)."""
    source: str | None = None
    """Only the rows of this source; without a dataset, countdown (the default) or sudoku."""
    num_samples: int | None = None
    """Questions at most."""
    skip_sample: int = 0
    """Questions to leave out first."""
    block_length: int = 32
    max_tokens: int = 128
    """Columns to generate."""
    denoising_steps: int = 32
    """Steps of a block."""
    cache: str = "dual"
    """Of the blocked run: none, prefix, dual."""
    ignore_eos: bool = True
    """Fill every canvas to its end, as BlockInfer does, in both runs."""
    skip_vanilla: bool = False
    batch_size: int = 32
    mesh: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    output: Path = Path("benchmark_results.json")

    def __post_init__(self):
        for name in ("block_length", "max_tokens", "denoising_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.skip_sample < 0 or (self.num_samples is not None and self.num_samples < 1):
            raise ValueError("skip_sample counts from 0, num_samples from 1")
        if self.dataset is None and (self.source or "countdown") not in ("countdown", "sudoku"):
            raise ValueError(f"source={self.source} needs dataset=FILE.jsonl")
        if self.dataset and not self.dataset.is_file():
            raise ValueError(f"dataset={self.dataset} is not a file")
        if self.denoising_steps > self.block_length:
            raise ValueError(
                f"denoising_steps={self.denoising_steps} are those of one block: at most "
                f"block_length={self.block_length}"
            )
        if self.max_tokens % self.block_length:
            raise ValueError(
                f"block_length={self.block_length} must divide max_tokens={self.max_tokens}"
            )
        self.settings()

    def settings(self) -> dict[str, DecodeConfig]:
        """Both ways of decoding, by BlockInfer's names; ValueError where lengths do not divide."""
        blocks = max(self.max_tokens // self.block_length, 1)
        shared: Any = {
            "gen_length": self.max_tokens,
            "rule": "quota",
            "stop": "none" if self.ignore_eos else "eos",
            "seed": self.seed,
        }
        ways = {
            "blockinfer": DecodeConfig(
                block_length=self.block_length,
                steps=self.denoising_steps * blocks,
                cache=self.cache,  # type: ignore[arg-type]
                **shared,
            ),
            "vanilla_llada": DecodeConfig(
                block_length=self.max_tokens, steps=self.max_tokens, cache="none", **shared
            ),
        }
        return {name: way.resolve() for name, way in ways.items()}


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, and the verdict on a completion."""

    prompt: str
    right: Callable[[str], bool]
    source: str


def extract(text: str, source: str) -> str:
    """The answer in a completion: first in curly braces, else by the patterns of the source."""
    for pattern in [r"\{([^}]+)\}", *FALLBACKS.get(source, [])]:
        if match := re.search(pattern, text, re.I | re.S if "(?!.*" in pattern else re.I):
            return match[1].strip()
    return " ".join(text.split()[:10])


def same(answer: str, gold: str) -> bool:
    """Equal up to case, spaces and commas."""
    plain = [re.sub(r"[\s,]", "", text).lower() for text in (answer, gold)]
    return plain[0] == plain[1]


def read_questions(config: BenchConfig) -> list[Question]:
    """The questions asked for; ValueError where there are none."""
    questions: list[Question] = []
    if config.dataset is None:
        task = TASKS[config.source or "countdown"]
        count = config.skip_sample + (config.num_samples or GENERATED)
        for doc in task.generate(count, config.seed, held_out=True):

            def solved(text: str, doc: Any = doc) -> bool:
                return task.grade(doc, text)[task.metric] == 1

            questions.append(Question(task.prompt(doc), solved, task.name))
    else:
        for line in config.dataset.read_text().splitlines():
            row = json.loads(line)
            source = row.get("source", "")
            if config.source in (None, source):
                questions.append(_question(row, source))
    chosen = questions[config.skip_sample :][: config.num_samples]
    if not chosen:
        raise ValueError(
            f"dataset={config.dataset} has no question of source={config.source} after "
            f"skip_sample={config.skip_sample}"
        )
    return chosen


def _question(row: dict[str, Any], source: str) -> Question:
    choices = row.get("choices") or []
    choices = json.loads(choices) if isinstance(choices, str) else choices
    options = "\n".join(f"{i}. {choice}" for i, choice in enumerate(choices))
    tail = TAILS.get(source, TAILS[""]).replace("{{", "{").replace("}}", "}")
    prompt = "\n\n".join(filter(None, [row["question"], options, tail]))
    gold = str(row.get("answer", "")).strip()
    return Question(prompt, lambda text: same(extract(text, source), gold), source)


def measure(
    llm: Any, questions: Sequence[Question], decode: DecodeConfig, batch_size: int, name: str
) -> dict[str, Any]:
    """BlockInfer's figures of one way of decoding, and ours."""
    from jdllm.evaluation.speed import Cost, Speed

    found = {}
    prompts = [question.prompt for question in questions]
    with Bar(total=len(prompts), desc=name, unit="prompt") as bar:
        for batch in llm.stream(prompts, decode, batch_size=batch_size):
            cost = Cost.of(batch)
            pairs = zip(batch.index, batch.completions, strict=True)
            found |= {i: (completion, cost) for i, completion in pairs}
            bar.update(len(batch.index))
    speed = Speed.of(found[i] for i in range(len(prompts)))
    right = sum(q.right(found[i][0].text or "") for i, q in enumerate(questions))
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


def main(config: BenchConfig) -> None:
    """Runs both, prints the table and writes `output`."""
    from jdllm.llm import LLM

    enable_compilation_cache()
    questions = read_questions(config)
    llm = LLM.load(**loading(config))
    if llm.tokenizer is None:
        raise ValueError("the questions are text, and this model has no tokenizer; try grid")
    ways = config.settings()
    if config.skip_vanilla:
        del ways["vanilla_llada"]
    rows = {
        name: measure(llm, questions, decode, config.batch_size, NAMES[name])
        for name, decode in ways.items()
    }
    facts: dict[str, Any] = dict(rows)
    if len(rows) == 2:
        facts["comparison"] = compare(rows)
    facts |= {"config": dataclasses.asdict(config), "environment": environment()}
    facts["environment"] |= {"mesh": sharding.describe(llm.mesh), "kernels": choices()}
    columns = ["throughput", "total_time", "latency_p50", "latency_p95", "forwards_per_second",
               "tokens_per_forward", "accuracy", "compile_seconds"]  # fmt: skip
    cells = [[name, *(f"{rows[name][c]:.2f}" for c in columns)] for name in rows]
    heads = [name.replace("_", " ") for name in columns]
    print("\n" + table([["decoding", *heads], *([NAMES[c[0]], *c[1:]] for c in cells)]))
    if len(rows) == 2:
        print("  ".join(f"{name} {value:.2f}" for name, value in facts["comparison"].items()))
    with atomic_file(config.output) as file:
        file.write(json.dumps(facts, indent=2, default=str).encode() + b"\n")
    print(f"wrote {config.output}")


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """Forwards and tokens per second by block length, batch, cache and tokens per step.

    Prompts are synthetic ids and the schedule is imposed, so random weights serve.
    """

    model: str = "bundled"
    """bundled, a converted folder, random:<name>, or a Hugging Face folder or id."""
    allow_unknown: tuple[str, ...] = ()
    """Keys of a Hugging Face config.json to ignore although their meaning is not known here."""
    blocks: str = "32"
    """Block lengths, separated by commas."""
    batches: str = "1,8"
    """Rows of a batch."""
    caches: str = "none,prefix,dual"
    tokens_per_step: str = "1"
    prompt_lengths: str = "96"
    """Prompt lengths, dealt out to the rows in turn."""
    gen_length: int = 128
    repeats: int = 2
    """Timed runs of each point, after one that is not timed; the median counts."""
    mesh: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    output: Path | None = None
    """jsonl that a row a point is appended to."""

    def points(self) -> list[tuple[int, int, str, DecodeConfig]]:
        """Block, batch, cache and settings of every point; ValueError for one that cannot be."""
        found = []
        numbers = [numbers_in(self, name) for name in ("blocks", "batches", "tokens_per_step")]
        for block, batch, tokens in itertools.product(*numbers):
            for cache in self.caches.split(","):
                blocks = max(self.gen_length // block, 1)
                decode = DecodeConfig(
                    gen_length=self.gen_length,
                    block_length=block,
                    rule="quota",
                    steps=blocks * -(-block // tokens),
                    cache=cache,  # type: ignore[arg-type]
                    stop="none",
                ).resolve()
                found.append((batch, tokens, cache, decode))
        return found

    def __post_init__(self):
        numbers_in(self, "prompt_lengths")
        self.points()


def numbers_in(config: GridConfig, name: str) -> list[int]:
    """The numbers of a comma-separated setting; ValueError where one is none."""
    words = getattr(config, name).split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{name}={getattr(config, name)} must be numbers like 1,8")
    return [int(word) for word in words]


def grid(config: GridConfig) -> None:
    """Measures every point, prints the table, and appends rows where `output` says."""
    from jdllm.llm import LLM

    enable_compilation_cache()
    llm = LLM.load(**loading(config))
    lengths = numbers_in(config, "prompt_lengths")
    chance = np.random.default_rng(config.seed)
    facts = {"model": config.model, "parameters": count_parameters(llm.config)}
    facts |= {"dtype": llm.config.dtype, "mesh": sharding.describe(llm.mesh)}
    rows = []
    for batch, tokens, cache, decode in Bar(config.points(), unit="point"):
        prompts = [
            chance.integers(0, min(llm.config.mask_id, *llm.config.stop_ids) or 1, n).tolist()
            for n in itertools.islice(itertools.cycle(lengths), batch)
        ]
        runs = [
            list(llm.stream(prompts, decode, batch_size=batch)) for _ in range(config.repeats + 1)
        ]
        seconds = float(np.median([sum(b.seconds for b in run) for run in runs[1:]]))
        forwards = sum(b.forwards for b in runs[0])
        rows.append(
            facts
            | {
                "block_length": decode.block_length, "batch": batch, "cache": cache,
                "tokens_per_step": tokens, "gen_length": config.gen_length,
                "forwards": forwards, "seconds": seconds,
                "forwards_per_second": forwards / seconds,
                "columns_per_second": batch * config.gen_length / seconds,
                "compile_seconds": sum(b.compile_seconds for b in runs[0]),
            }
        )  # fmt: skip
    names = ["block_length", "batch", "cache", "tokens_per_step", "forwards"]
    rates = ["seconds", "forwards_per_second", "columns_per_second", "compile_seconds"]
    cells = [[str(r[n]) for n in names] + [f"{r[n]:.2f}" for n in rates] for r in rows]
    print("\n" + table([[name.replace("_", " ") for name in names + rates], *cells]))
    if config.output:
        where = environment()
        with config.output.open("a") as file:
            file.writelines(json.dumps(row | where) + "\n" for row in rows)
        print(f"appended {len(rows)} rows to {config.output}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["grid"]:
        settings = cli.parse(GridConfig, sys.argv[2:], "python -m jdllm.bench grid")
        with cli.one_sentence():
            grid(settings)
    else:
        cli.run(main, BenchConfig, "python -m jdllm.bench")
