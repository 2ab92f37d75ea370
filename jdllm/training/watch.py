"""What a run is watched by while it trains: held-out loss at fixed noise, and a sample."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdllm.decode import DecodeConfig
from jdllm.llm import LLM
from jdllm.model.model import Model
from jdllm.runtime import files, processes, sharding
from jdllm.runtime.progress import Bar
from jdllm.tokenizer import load_tokenizer, read_lengths
from jdllm.train.objective import Batch, Objective
from jdllm.train.step import Join, held_out
from jdllm.training.config import SFTConfig
from jdllm.training.metrics import Metrics
from jdllm.training.prepare import Job
from jdllm.training.rows import Rows

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of the response that are masked for held-out losses."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Rows that are never trained on, placed once and asked for their loss again and again."""

    parts: list[Batch]
    """Batches [1, B, T]."""
    key: jax.Array

    @classmethod
    def of(cls, rows: Rows, size: int, mesh: jax.sharding.Mesh, seed: int) -> "HeldOut":
        """All rows in batches of `size`; what fills the last batch is not counted."""
        by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
        parts = []
        for start in range(0, len(rows), size):
            numbers = np.arange(start, start + size)
            real = numbers < len(rows)
            index = np.where(real, numbers, 0)[None]
            batch = rows.place(index, np.zeros_like(index), by_row)
            learned = batch.learned & real[None, :, None]
            parts.append(dataclasses.replace(batch, learned=learned))
        key = processes.device_put(jax.random.key(seed), sharding.replicated(mesh))
        return cls(parts, key)

    def ask(
        self, trained: Any, frozen: Model, objective: Objective, join: Join
    ) -> dict[str, float]:
        """Mean nll of masked columns per level, and the mean of those: eval_nll."""
        total = None
        for part in self.parts:
            found = held_out(
                trained, part, self.key,
                frozen=frozen, objective=objective, levels=LEVELS, join=join,
            )  # fmt: skip
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        assert total is not None
        nll = np.asarray(total[0]) / np.maximum(np.asarray(total[1]), 1)
        each = {f"eval_nll_{level}": float(x) for level, x in zip(LEVELS, nll, strict=True)}
        return {"eval_nll": float(nll.mean())} | each


class Sampler:
    """Completes one prompt as training goes on; samples.jsonl keeps what came out.

    Opening it drops the lines after step `start`, which the run will write again.
    """

    def __init__(self, folder: Path, prompt: str, frozen: Model, tokenizer: Any, start: int):
        self.path, self.prompt = folder / "samples.jsonl", prompt
        self.llm = LLM(frozen, tokenizer)
        if processes.is_main() and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [json.loads(line) for line in lines if line.endswith("}")]
            files.write_json_lines(self.path, [one for one in kept if one["step"] <= start])

    def ask(self, step: int, model: Model, config: DecodeConfig) -> str:
        """The completion by `model`, also written behind the others."""
        self.llm.model = model
        text = self.llm.generate(self.prompt, config)[0].text or ""
        if processes.is_main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "prompt": self.prompt, "text": text}) + "\n")
        return text


class Watch:
    """All that looks at a run from beside: nothing of it changes what is trained."""

    def __init__(self, config: SFTConfig, job: Job, metrics: Metrics, start: int):
        self.config, self.job, self.metrics = config, job, metrics
        mesh = job.subject.frozen.mesh
        self.held_out = self.sampler = None
        if job.held_out is not None:
            size = config.batch // config.accumulation
            self.held_out = HeldOut.of(job.held_out, size, mesh, config.seed)
        if config.sample_prompt is not None:
            tokenizer = load_tokenizer(job.tokenizer)
            self.sampler = Sampler(
                config.output, config.sample_prompt, job.subject.frozen, tokenizer, start
            )

    def look(self, step: int, trained: Any) -> None:
        """Held-out losses and a sample, where this step is one of theirs or the last one."""
        subject, last = self.job.subject, step == self.job.recipe.steps
        asks = self.held_out and (last or step % self.config.eval_every == 0)
        samples = self.sampler and (last or step % self.config.sample_every == 0)
        if asks or samples:
            self.metrics.pause()
        if asks:
            assert self.held_out
            found = self.held_out.ask(trained, subject.frozen, self.job.objective, subject.join)
            self.metrics.write(step, time.time(), found)
        if samples:
            assert self.sampler
            model = subject.join(trained, subject.frozen, None)
            lengths = DecodeConfig(**read_lengths(self.job.tokenizer))
            text = self.sampler.ask(step, model, lengths)
            if processes.is_main():  # above the bar
                Bar.write(f"step {step}: {' '.join(text.split())[:200]}", file=sys.stderr)
