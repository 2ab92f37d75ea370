"""EDIT from end to end: trains an adapter with its dynamics, then compares exits and maps.

python experiments/edit_run.py output=runs/edit        (the bundled model; an hour on two cores)
python experiments/edit_run.py output=runs/edit8b model=GSAI-ML/LLaDA-8B-Instruct data=s1k.jsonl \
    length=4096 rank=128 tasks=countdown,sudoku lengths=128,256,512 limit=256    (a GPU)
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

from jdllm.evaluation import sweeps
from jdllm.model.lora import LoraConfig
from jdllm.runtime import cli, files
from jdllm.runtime.environment import environment
from jdllm.train.objective import Remat
from jdllm.train.optimiser import Recipe, make_optimizer
from jdllm.train.step import create_state, train_step
from jdllm.training import run
from jdllm.training.config import SFTConfig
from jdllm.training.dynamics import DynamicsConfig
from jdllm.training.prepare import prepare

WINDOWS = "mean,late,ema,momentum"


@dataclasses.dataclass(frozen=True)
class EditConfig:
    """What is trained, and what is compared. A killed run goes on where it was."""

    output: Path = Path("runs/edit")
    """Folder for the run (train/), the comparison (exits/) and summary.json."""
    model: str = "bundled"
    data: str | None = None
    """Training text, as data= of jdllm.sft; default: generated puzzles."""
    rank: int = 16
    steps: int = 100
    """Updates."""
    length: int = 72
    """Columns of a training canvas."""
    learning_rate: float = 1e-5
    batch: int = 8
    accumulation: int = 1
    tasks: str = "sudoku,countdown"
    lengths: str = "40"
    documents: Path | None = None
    """Folder with the tasks' documents (data= of jdllm.eval)."""
    rules: str = ""
    """Patterns of rules, with commas (default: all)."""
    limit: int = 100
    """Documents of each task."""
    batch_size: int = 32
    remat: Remat = "none"
    mesh: str = "auto"
    timed: int = 20
    """Steps that are timed with and without dynamics; 0 leaves that out."""


def training(config: EditConfig) -> SFTConfig:
    """The fine-tuning run: EDIT's recipe, but for what the model's size asks."""
    generated = None if config.data else "sudoku:1,countdown:4"
    return SFTConfig(
        output=config.output / "train", model=config.model, data=config.data, task=generated,
        examples=20_000, length=config.length, batch=config.batch,
        accumulation=config.accumulation, remat=config.remat, mesh=config.mesh,
        lora=LoraConfig(rank=config.rank, alpha=2.0 * config.rank, targets="q,k,v", dropout=0.05),
        dynamics=DynamicsConfig(WINDOWS), save_every=50, log_every=2,
        recipe=Recipe(steps=config.steps, learning_rate=config.learning_rate, weight_decay=0.1),
    )  # fmt: skip


def overhead(config: EditConfig) -> dict[str, float]:
    """Milliseconds of a training step with and without dynamics: the least of `timed` steps."""
    own = dataclasses.replace(training(config), output=config.output / "timing")
    files.make_folder(own.output)
    job = prepare(own)
    assert job is not None
    optimizer, subject = make_optimizer(job.recipe), job.subject
    mesh = subject.frozen.mesh
    batch = next(run.batches(own, job, mesh, 0))
    found = {}
    for name, begin in (("plain", None), ("dynamics", own.dynamics.begin(job.recipe))):
        factors = jax.tree.map(lambda x: x.copy(), subject.trained)
        state = create_state(factors, optimizer, mesh, begin)
        spent = []
        for _ in range(config.timed + 2):
            start = time.perf_counter()
            state, _ = train_step(
                state, batch, jax.random.key(0), frozen=subject.frozen, join=subject.join,
                objective=job.objective, optimizer=optimizer, remat=own.remat,
            )  # fmt: skip
            jax.block_until_ready(state)
            spent.append(1000 * (time.perf_counter() - start))
        found[f"{name}_ms"] = min(spent[2:])
    found["overhead_percent"] = 100 * (found["dynamics_ms"] / found["plain_ms"] - 1)
    return found


def comparison(config: EditConfig) -> sweeps.SweepConfig:
    """The sweep over rules, maps and schedules with the trained adapter."""
    return sweeps.SweepConfig(
        plan="edit", model=config.model, adapter=config.output / "train" / "adapter",
        task=config.tasks, lengths=tuple(int(one) for one in config.lengths.split(",")),
        rules=config.rules, limit=config.limit, data=config.documents,
        batch_size=config.batch_size, mesh=config.mesh, output=config.output / "exits",
    )  # fmt: skip


def main(config: EditConfig) -> None:
    """Trains, times and compares; writes summary.json beside what the two leave."""
    files.make_folder(config.output)
    facts: dict[str, Any] = {"config": dataclasses.asdict(config)} | environment()
    if config.timed:
        facts["step"] = overhead(config)
        print(f"a step with dynamics takes {facts['step']['overhead_percent']:+.2f} % longer")
    run.fine_tune(training(config))
    sweeps.main(comparison(config))
    files.write_json(config.output / "summary.json", json.loads(json.dumps(facts, default=str)))


if __name__ == "__main__":
    cli.run(main, EditConfig, "python experiments/edit_run.py")
