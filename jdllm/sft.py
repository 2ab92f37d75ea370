"""Fine-tunes (or trains from scratch) all parameters with the masked-diffusion objective.

python -m jdllm.sft data=chats.jsonl model=GSAI-ML/LLaDA-8B-Instruct output=runs/mine
python -m jdllm.sft task=sudoku model=random:bundled tokenizer=bundled output=runs/sudoku

A killed run is continued by the same command and ends in the same bits. docs/training.md explains.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from flax import nnx

from jdllm.arguments import ModelArgs
from jdllm.load import choose_mesh, compute_dtype, load_parts, locate
from jdllm.model.config import ModelConfig, count_parameters, require_trainable
from jdllm.runtime import cli, files, processes, sharding, signals
from jdllm.runtime.progress import Bar
from jdllm.store import checkpoint
from jdllm.tokenizer import FILES, copy_tokenizer, load_tokenizer
from jdllm.train import step as train
from jdllm.training.data import (
    Rows,
    batch_index,
    cached_rows,
    check_file,
    encode_rows,
    file_pairs,
    fingerprint,
    generated_pairs,
    parse_mixture,
)

SAVE_DTYPES = ("float32", "bfloat16", "float16")
# Settings that a resumed run may change; on another mesh sums are ordered differently, so its loss
# curve goes on alike, but not bit for bit.
FREE = {"output", "allow_unknown", "save_every", "log_every", "mesh"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(ModelArgs):
    """Masked-diffusion fine-tuning."""

    output: Path
    """Folder for checkpoints, metrics.jsonl and, at the end, model/. An old run here resumes."""
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
    seed: int = 0
    """Of random weights, generated examples, the order of rows and the corruption."""
    save_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self):
        if (self.data is None) == (self.task is None):
            raise ValueError("name exactly one source of training text: data=FILE or task=NAME")
        counts = ("examples", "length", "batch", "accumulation", "save_every", "log_every")
        for name in counts + ("response_length",) * (self.response_length is not None):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if self.batch % self.accumulation:
            raise ValueError(
                f"accumulation={self.accumulation} must divide batch={self.batch}: "
                "micro-batches have equal size"
            )
        if self.save_dtype not in SAVE_DTYPES:
            names = ", ".join(SAVE_DTYPES)
            raise ValueError(f"save_dtype={self.save_dtype} must be one of {names}")
        if self.dtype != "auto":  # which asks the devices: too early where processes will join
            compute_dtype(self.dtype, "bfloat16")
        if self.task is not None:
            parse_mixture(self.task)

    @property
    def going_on(self) -> str:
        """How to go on after an interrupt."""
        return f"the same command goes on from the last checkpoint in {self.output}"


def flatten(facts: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted name: recipe.steps stands for facts["recipe"]["steps"]."""
    flat = {}
    for name, value in facts.items():
        inner = flatten(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{k}" if k else name: v for k, v in inner.items()}
    return flat


def settle(config: SFTConfig, rows: Rows | None = None) -> None:
    """Refuses an output folder whose run has other settings; with `rows`, writes config.json.

    It is written when everything could be loaded, so that a mistyped first start blocks nobody.
    Settings that the old run did not know yet are taken to agree. ValueError names each change.
    """
    facts = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    if rows is not None:
        facts["training_text"] = rows.digest()
    path = config.output / "config.json"
    if path.exists():
        try:
            old = flatten(json.loads(path.read_text()))
            old["recipe.steps"]
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{path} is not of a training run; name another output") from None
        new = flatten(facts)
        changed = [
            f"{name}={new[name]} (there {old[name]})"
            for name in sorted(new.keys() & old.keys() - FREE)
            if new[name] != old[name]
        ]
        if changed:
            raise ValueError(
                f"{config.output} holds a run with other settings: {', '.join(changed)}; "
                "resume it with its own or name another output"
            )
    if rows is not None:
        files.write_json(path, facts)


def split_rows(config: SFTConfig, mesh: jax.sharding.Mesh) -> int:
    """Rows of a micro-batch; ValueError where the data axis of the mesh does not divide them."""
    micro = config.batch // config.accumulation
    if micro % mesh.shape["data"]:
        raise ValueError(
            f"a micro-batch of {micro} rows (batch / accumulation) cannot be split over "
            f"{mesh.shape['data']} devices; change batch, accumulation or mesh"
        )
    return micro


def load_rows(config: SFTConfig, model: ModelConfig, source: Path) -> Rows:
    """Encodes the training text once; later starts of the same run read it back.

    `source` is the tokenizer's folder. The cache goes by the content of the files, not their age.
    """
    if config.length > model.max_length:
        raise ValueError(f"length={config.length} exceeds the model's {model.max_length} columns")
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer.json; name a tokenizer's folder: tokenizer=")

    def build() -> Rows:
        if config.data is not None:
            pairs = file_pairs(config.data)
        else:
            pairs = generated_pairs(config.task or "", config.examples, config.seed)
        return encode_rows(tokenizer, pairs, model, config.length, config.response_length)

    key = {
        name: getattr(config, name)
        for name in ("task", "examples", "seed", "length", "response_length")
    } | {
        "data": (config.data.suffix, fingerprint(config.data)) if config.data else None,
        "tokenizer": [fingerprint(source / name) for name in FILES],
        "model": [model.vocab, model.pad_id, *model.stop_ids],
        "prompts": "whole conversations",  # rows of before had the last question alone
    }
    return cached_rows(config.output / "cache", key, build)


def batches(
    config: SFTConfig, rows: Rows, mesh: jax.sharding.Mesh, start: int
) -> Iterator[train.Batch]:
    """Batches [A, B, ...] from step `start` on, rows split over the data axis."""
    shape = config.accumulation, split_rows(config, mesh)
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    for step in range(start, config.recipe.steps):
        index = batch_index(len(rows.tokens), config.batch, step, config.seed)
        yield train.Batch(*rows.place(index.reshape(shape), by_row))


class Metrics:
    """metrics.jsonl: one line every `every` steps. Values are fetched one line late, so that the
    device never waits for the host.

    Opening it drops the lines after step `start` (the run will write them again) and a torn one.
    Of several processes one `writes`.
    """

    def __init__(self, path: Path, every: int, start: int, writes: bool = True):
        self.every, self.writes = every, writes
        self.pending: tuple[int, float, dict[str, jax.Array]] | None = None
        self.last: dict[str, float] = {}
        if writes:
            self._cut(path, start)
        self.file = (path if writes else Path(os.devnull)).open("a")

    def _cut(self, path: Path, start: int) -> None:
        kept = []
        if path.exists():
            lines = (line for line in path.read_text().splitlines() if line.endswith("}"))
            kept = [line for line in lines if json.loads(line)["step"] <= start]
        with files.atomic_file(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Notes the metrics of update `step` (counted from 1)."""
        if self.writes and step % self.every == 0:
            self.flush()
            self.pending = (step, time.time(), values)

    def flush(self) -> None:
        """Writes what was noted last; a value that is not finite becomes null, which is JSON."""
        if self.pending:
            step, now, values = self.pending
            self.last = {name: float(value) for name, value in values.items()}
            line = {k: v if math.isfinite(v) else None for k, v in self.last.items()}
            self.file.write(json.dumps({"step": step, "time": now} | line) + "\n")
            self.file.flush()
        self.pending = None


def interruptible() -> contextlib.AbstractContextManager[Callable[[], BaseException | None]]:
    """Puts Ctrl-C and SIGTERM off until a step is saved.

    Several processes do not hear of it at the same step, so they end at once, as after a kill.
    """
    if jax.process_count() > 1:
        return contextlib.nullcontext(lambda: None)
    return signals.deferred("saving after this step; once more ends at once")


def fit(
    config: SFTConfig,
    rows: Rows,
    graph: nnx.GraphDef,
    state: train.TrainState,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> train.TrainState:
    """Runs the remaining steps, saving as it goes; picks up the newest checkpoint in the output.

    A checkpoint is a state of the run: its metrics are on disk before it is, and its name says
    after how many updates it was taken. Orbax writes it beside and renames it when it is complete.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    key = processes.place(jax.random.key(config.seed), sharding.replicated(mesh))
    dtype = compute_dtype(config.dtype, "bfloat16")
    folder = config.output.absolute() / "checkpoints"
    steps = config.recipe.steps
    with ocp.CheckpointManager(folder, options=options) as manager:
        start = int(processes.tell(str(manager.latest_step() or 0)))
        if start:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(start, args=ocp.args.StandardRestore(like))
            processes.say(f"resumed at step {start}")
        leads = processes.leads()
        metrics = Metrics(config.output / "metrics.jsonl", config.log_every, start, writes=leads)
        bar = Bar(total=steps, initial=start, unit="step", mininterval=1.0, disable=not leads)
        with metrics.file, bar, interruptible() as asked:
            bar.set_postfix_str("compiling")
            for step, batch in enumerate(batches(config, rows, mesh, start), start + 1):
                state, values = train.train_step(
                    state, batch, key,
                    graph=graph, optimizer=optimizer, dtype=dtype, remat=config.remat,
                )  # fmt: skip
                metrics.add(step, values)
                bar.update()
                bar.set_postfix({k: f"{v:.4f}" for k, v in metrics.last.items()}, refresh=False)
                ended = asked()
                if step % config.save_every == 0 or step == steps or ended:
                    metrics.flush()
                    manager.save(step, args=ocp.args.StandardSave(state), force=True)
                if ended:
                    raise ended
            metrics.flush()
    return state


def write_model(
    folder: Path, model: ModelConfig, state: train.TrainState, dtype: str, source: Path
) -> None:
    """Writes the trained weights as `dtype`, with the tokenizer from `source`, or nothing."""
    with processes.shared_folder(folder) as partial:
        params = jax.tree.map(lambda x: x.astype(dtype), state.params)
        checkpoint.save_model(partial, dataclasses.replace(model, dtype=dtype), params)
        if processes.leads():
            copy_tokenizer(source, partial)
    processes.say(f"wrote {folder}")


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that training needs, loaded and checked."""

    mesh: jax.sharding.Mesh
    model: ModelConfig
    graph: nnx.GraphDef
    params: nnx.State
    rows: Rows
    tokenizer: Path


def prepare(config: SFTConfig) -> Job | None:
    """Loads the model and the rows, and settles the output folder; None for a finished run.

    ValueError or OSError, in one sentence, for whatever is wrong with the input.
    """
    finished = False
    if processes.leads():
        settle(config)
        finished = (config.output / "model").exists()
    if processes.tell("finished" * finished):
        return None
    if not config.output.is_dir():  # process 0 has made it
        raise ValueError(
            f"output={config.output} is not there for process {jax.process_index()}; name a folder "
            "on a disk that all processes share"
        )
    mesh = choose_mesh(config.mesh, config.model, "float32", config.allow_unknown, copies=4)
    processes.say(f"{processes.describe()}, {sharding.describe(mesh)}")
    split_rows(config, mesh)
    if config.data is not None:
        check_file(config.data)  # before a large model is loaded
    source = locate(config.tokenizer or config.model, config.allow_unknown)
    if source is None:
        raise ValueError(f"model={config.model} has no tokenizer of its own; add tokenizer=bundled")
    model, graph, params = load_parts(
        config.model, mesh, "float32", config.seed, config.allow_unknown
    )
    require_trainable(model)
    rows = processes.first(lambda: load_rows(config, model, source))
    if processes.leads():
        settle(config, rows)
    processes.say(f"{len(rows.tokens)} examples, {count_parameters(model):,} parameters")
    return Job(mesh, model, graph, params, rows, source)


@processes.joined()
def main(config: SFTConfig) -> None:
    """Trains, then writes the weights to output/model; a finished run is left as it is.

    ValueError or OSError, in one sentence, where the input or the disk is at fault.
    """
    final = config.output / "model"
    with files.alone(config.output) if processes.leads() else contextlib.nullcontext():
        job = prepare(config)
        if job is None:
            processes.say(f"{final} is there already: this run is finished, nothing to do")
            return
        optimizer = train.make_optimizer(config.recipe)
        state = train.create_state(job.params, optimizer, job.mesh)
        state = fit(config, job.rows, job.graph, state, optimizer, job.mesh)
        write_model(final, job.model, state, config.save_dtype, job.tokenizer)


if __name__ == "__main__":
    cli.run(main, SFTConfig, "python -m jdllm.sft")
