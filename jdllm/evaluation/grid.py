"""A grid of model calls per second: block lengths, batches, caches and tokens per step."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np

from jdllm.arguments import ModelArgs
from jdllm.decode import DecodeConfig
from jdllm.evaluation.report import table
from jdllm.load import enable_compilation_cache
from jdllm.model.config import count_parameters
from jdllm.runtime import sharding
from jdllm.runtime.environment import environment
from jdllm.runtime.progress import Bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig(ModelArgs):
    """Model calls and columns per second by block length, batch, cache and tokens per step.

    Prompts are synthetic ids and the schedule is imposed, so random weights serve.
    """

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
    seed: int = 0
    """Seed of the prompts' ids, and of the weights of random:<name>."""
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
        super().__post_init__()
        numbers_in(self, "prompt_lengths")
        self.points()


def numbers_in(config: GridConfig, name: str) -> list[int]:
    """The numbers of a comma-separated setting; ValueError where one is none."""
    words = getattr(config, name).split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"{name}={getattr(config, name)} must be numbers like 1,8")
    return [int(word) for word in words]


def main(config: GridConfig) -> None:
    """Measures every point, prints the table, and appends rows where `output` says."""
    enable_compilation_cache()
    llm = config.load_llm()
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
        calls = sum(b.forwards for b in runs[0])
        rows.append(
            facts
            | {
                "block_length": decode.block_length, "batch": batch, "cache": cache,
                "tokens_per_step": tokens, "gen_length": config.gen_length,
                "calls": calls, "seconds": seconds,
                "calls_per_second": calls / seconds,
                "columns_per_second": batch * config.gen_length / seconds,
                "compile_seconds": sum(b.compile_seconds for b in runs[0]),
            }
        )  # fmt: skip
    names = ["block_length", "batch", "cache", "tokens_per_step", "calls"]
    rates = ["seconds", "calls_per_second", "columns_per_second", "compile_seconds"]
    cells = [[str(r[n]) for n in names] + [f"{r[n]:.2f}" for n in rates] for r in rows]
    print("\n" + table([[name.replace("_", " ") for name in names + rates], *cells]))
    if config.output:
        where = environment()
        with config.output.open("a") as file:
            file.writelines(json.dumps(row | where) + "\n" for row in rows)
        print(f"appended {len(rows)} rows to {config.output}")
