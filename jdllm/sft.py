"""Fine-tunes (or trains from scratch) all parameters with the masked-diffusion objective.

python -m jdllm.sft data=chats.jsonl model=GSAI-ML/LLaDA-8B-Instruct output=runs/mine
python -m jdllm.sft task=sudoku model=random:bundled tokenizer=bundled output=runs/sudoku
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

from jdllm import checkpoint, cli, sharding, train
from jdllm.configs import ModelConfig
from jdllm.data import Rows, batch_index, cached_rows, encode_rows, file_pairs, generated_pairs
from jdllm.load import compute_dtype, load_parts, locate
from jdllm.tokenizer import copy_tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Masked-diffusion fine-tuning."""

    output: Path
    """Folder for checkpoints, metrics.jsonl and, at the end, model/. An old run here resumes."""
    model: str = "bundled"
    """Start weights: bundled, a converted folder, random:<name>, or a Hugging Face folder or id."""
    tokenizer: str | None = None
    """Folder of the tokenizer (or "bundled"); default: the model's own."""
    data: Path | None = None
    """Training text: .jsonl (prompt and response, or messages, or text) or .txt."""
    task: str | None = None
    """Generated tasks instead of a file, with shares: sudoku:1,countdown:3."""
    examples: int = 100_000
    """How many examples to generate."""
    length: int = 512
    """Columns of a canvas."""
    response_length: int | None = None
    """End each canvas this many columns after its prompt (default: every row fills `length`)."""
    batch: int = 8
    """Rows of one update."""
    accumulation: int = 1
    """Micro-batches that an update is split into."""
    recipe: train.Recipe = train.Recipe()
    save_dtype: str = "bfloat16"
    """Dtype of the weights in output/model."""
    dtype: str = "auto"
    """Compute dtype; auto is bfloat16, on a CPU float32. Weights and moments stay float32."""
    remat: bool = False
    """Compute layers again in the backward pass: less memory, a third more time."""
    mesh: str = "auto"
    seed: int = 0
    save_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self):
        if (self.data is None) == (self.task is None):
            raise ValueError("name exactly one source of training text: data=FILE or task=NAME")
        if self.batch % self.accumulation:
            raise ValueError(
                f"accumulation={self.accumulation} must divide batch={self.batch}: "
                "micro-batches have equal size"
            )


def settle(config: SFTConfig) -> None:
    """Writes the resolved config into the output folder, or refuses to resume under another one.

    Only the number of steps between saves and logs may differ from the interrupted run.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "config.json"
    facts = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    free = {"output", "save_every", "log_every"}
    if path.exists():
        old = json.loads(path.read_text())
        changed = sorted(k for k in facts.keys() | old if k not in free and facts.get(k) != old.get(k))
        if changed:
            raise SystemExit(
                f"{config.output} holds a run with another {', '.join(changed)}; "
                "resume it with its own settings or name another output"
            )
    path.write_text(json.dumps(facts, indent=2) + "\n")


def load_rows(config: SFTConfig, model: ModelConfig, tokenizer: Any) -> Rows:
    """Encodes the training text once; later starts of the same run read it back."""
    if config.length > model.max_length:
        raise SystemExit(f"length={config.length} exceeds the model's {model.max_length} columns")

    def build() -> Rows:
        if config.data is not None:
            pairs = file_pairs(config.data)
        else:
            pairs = generated_pairs(config.task or "", config.examples, config.seed)
        return encode_rows(tokenizer, pairs, model, config.length, config.response_length)

    stamp = config.data.stat().st_mtime if config.data else None
    key = {
        name: str(getattr(config, name))
        for name in ("data", "task", "examples", "seed", "length", "response_length", "tokenizer")
    } | {"stamp": stamp, "model": config.model}
    return cached_rows(config.output / "cache", key, build)


def batches(
    config: SFTConfig, rows: Rows, mesh: jax.sharding.Mesh, start: int
) -> Iterator[train.Batch]:
    """Batches [A, B, ...] from step `start` on, rows split over the data axis."""
    micro = config.batch // config.accumulation
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    if micro % mesh.shape["data"]:
        raise SystemExit(
            f"a micro-batch of {micro} rows cannot be split over {mesh.shape['data']} devices; "
            "change batch, accumulation or mesh"
        )
    for step in range(start, config.recipe.steps):
        index = batch_index(len(rows.tokens), config.batch, step, config.seed)
        arrays = rows.take(index.reshape(config.accumulation, micro))
        yield train.Batch(*jax.device_put(arrays, place))


class Metrics:
    """metrics.jsonl: one line every `every` steps. Values are fetched one line late, so that the
    device never waits for the host."""

    def __init__(self, path: Path, every: int, start: int):
        kept = []
        if path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a")
        self.every = every
        self.pending: tuple[int, float, dict[str, jax.Array]] | None = None
        self.last: dict[str, float] = {}

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Notes the metrics of update `step` (counted from 1)."""
        if step % self.every == 0:
            self.flush()
            self.pending = (step, time.time(), values)

    def flush(self) -> None:
        """Writes what was noted last."""
        if self.pending:
            step, now, values = self.pending
            self.last = {name: float(value) for name, value in values.items()}
            self.file.write(json.dumps({"step": step, "time": now} | self.last) + "\n")
            self.file.flush()
        self.pending = None


def fit(
    config: SFTConfig,
    rows: Rows,
    graph: nnx.GraphDef,
    state: train.TrainState,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> train.TrainState:
    """Runs the remaining steps, saving as it goes; picks up the newest checkpoint in the output."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=config.save_every, enable_async_checkpointing=True
    )
    key = jax.random.key(config.seed)
    dtype = compute_dtype(config.dtype, "bfloat16")
    folder = config.output.absolute() / "checkpoints"
    with ocp.CheckpointManager(folder, options=options) as manager:
        latest = manager.latest_step()
        if latest is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(latest, args=ocp.args.StandardRestore(like))
            print(f"resumed at step {latest}")
        start = latest or 0
        metrics = Metrics(config.output / "metrics.jsonl", config.log_every, start)
        bar = tqdm(total=config.recipe.steps, initial=start, unit="step", mininterval=1.0)
        for step, batch in enumerate(batches(config, rows, mesh, start), start + 1):
            state, values = train.train_step(
                state, batch, key, graph=graph, optimizer=optimizer, dtype=dtype, remat=config.remat
            )
            metrics.add(step, values)
            bar.update()
            bar.set_postfix({k: f"{v:.4f}" for k, v in metrics.last.items()}, refresh=False)
            last = step == config.recipe.steps
            manager.save(step, args=ocp.args.StandardSave(state), force=last)
        metrics.flush()
        bar.close()
    return state


def main(config: SFTConfig) -> None:
    """Trains, then writes the weights to output/model."""
    settle(config)
    mesh = sharding.parse_mesh(config.mesh)
    print(sharding.describe(mesh))
    model, graph, params = load_parts(config.model, mesh, dtype="float32", seed=config.seed)
    source = locate(config.tokenizer or config.model)
    tokenizer = load_tokenizer(source) if source else None
    if tokenizer is None:
        raise SystemExit(f"{source or config.model} has no tokenizer; name one with tokenizer=")
    rows = load_rows(config, model, tokenizer)
    print(f"{len(rows.tokens)} examples, {jax.tree.reduce(np.add, jax.tree.map(np.size, params)):,}"
          " parameters")
    optimizer = train.make_optimizer(config.recipe)
    state = fit(config, rows, graph, train.create_state(params, optimizer, mesh), optimizer, mesh)
    final = config.output / "model"
    if final.exists():
        print(f"{final} is there already; nothing to write")
        return
    with checkpoint.atomic_folder(final) as folder:
        model = dataclasses.replace(model, dtype=config.save_dtype)
        params = jax.tree.map(lambda x: x.astype(config.save_dtype), state.params)
        checkpoint.save_model(folder, model, params)
        if source:
            copy_tokenizer(source, folder)
    print(f"wrote {final}")


if __name__ == "__main__":
    main(cli.parse(SFTConfig, prog="python -m jdllm.sft"))
