"""Fine-tuning runs: a killed one is continued and ends in the same bits."""

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

from jdllm.load import choose_mesh, locate
from jdllm.model.config import ModelConfig, count_parameters, require_trainable
from jdllm.runtime import files, processes, sharding, signals
from jdllm.runtime.progress import Bar
from jdllm.tokenizer import FILES, load_tokenizer
from jdllm.train import step as train
from jdllm.train.objective import Batch
from jdllm.train.optimiser import make_optimizer
from jdllm.training.config import SFTConfig
from jdllm.training.data import (
    Rows,
    batch_index,
    cached_rows,
    check_file,
    encode_rows,
    file_pairs,
    fingerprint,
    generated_pairs,
)
from jdllm.training.dynamics import LOG, Log, draw_heat_maps
from jdllm.training.subject import (
    Subject,
    load_subject,
    new_run,
    refuse_other,
    result,
    write_result,
)

# Settings that a resumed run may change; on another mesh sums are ordered differently, so its loss
# curve goes on alike, but not bit for bit.
FREE = {"output", "allow_unknown", "save_every", "log_every", "mesh"}


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


def batches(config: SFTConfig, rows: Rows, mesh: jax.sharding.Mesh, start: int) -> Iterator[Batch]:
    """Batches [A, B, ...] from step `start` on, rows split over the data axis."""
    shape = config.accumulation, split_rows(config, mesh)
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    for step in range(start, config.recipe.steps):
        index = batch_index(len(rows.tokens), config.batch, step, config.seed)
        yield Batch(*rows.place(index.reshape(shape), by_row))


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


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that training needs, loaded and checked."""

    subject: Subject
    rows: Rows
    tokenizer: Path
    facts: dict[str, Any]
    """What every checkpoint says besides its state; a run goes on only where they agree."""


def fit(
    config: SFTConfig,
    job: Job,
    state: train.TrainState,
    optimizer: optax.GradientTransformation,
) -> train.TrainState:
    """Runs the remaining steps, saving as it goes; picks up the newest checkpoint in the output.

    A checkpoint is a state of the run: its metrics are on disk before it is, and its name says
    after how many updates it was taken, which is also where the data goes on. Orbax writes it
    beside, with the facts of the job, and renames it when it is complete. ValueError where the
    newest one is of another base, target list or data.
    """
    subject, facts, args = job.subject, job.facts | {"run": new_run()}, ocp.args
    mesh = subject.frozen.mesh
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    key = processes.device_put(jax.random.key(config.seed), sharding.replicated(mesh))
    folder = config.output.absolute() / "checkpoints"
    steps = config.recipe.steps
    with ocp.CheckpointManager(folder, options=options) as manager:
        start = int(processes.broadcast_text(str(manager.latest_step() or 0)))
        if start:
            found = manager.restore(start, args=args.Composite(run=args.JsonRestore()))
            refuse_other(folder / str(start), found.run, job.facts)
            facts["run"] = found.run["run"]
            like = args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
            state = manager.restore(start, args=args.Composite(state=like)).state
            processes.say(f"resumed at step {start}")
        leads = processes.is_main()
        metrics = Metrics(config.output / "metrics.jsonl", config.log_every, start, writes=leads)
        bar = Bar(total=steps, initial=start, unit="step", mininterval=1.0, disable=not leads)
        watched = None
        if state.dynamics and leads:
            epsilon = config.recipe.epsilon
            watched = Log(config.output / LOG, config.log_every, start, epsilon)
        with metrics.file, bar, interruptible() as asked:
            bar.set_postfix_str("compiling")
            for step, batch in enumerate(batches(config, job.rows, mesh, start), start + 1):
                state, values = train.train_step(
                    state, batch, key,
                    frozen=subject.frozen, join=subject.join, optimizer=optimizer,
                    remat=config.remat,
                )  # fmt: skip
                metrics.add(step, values)
                if watched:
                    watched.add(step, state.moments)
                bar.update()
                bar.set_postfix({k: f"{v:.4f}" for k, v in metrics.last.items()}, refresh=False)
                ended = asked()
                if step % config.save_every == 0 or step == steps or ended:
                    metrics.flush()
                    if watched:
                        watched.flush()
                    parts = {"state": args.StandardSave(state), "run": args.JsonSave(facts)}
                    manager.save(step, args=args.Composite(**parts), force=True)
                if ended:
                    raise ended
            metrics.flush()
    return state


def prepare(config: SFTConfig) -> Job | None:
    """Loads the model and the rows, and settles the output folder; None for a finished run.

    ValueError or OSError, in one sentence, for whatever is wrong with the input.
    """
    finished = False
    if processes.is_main():
        settle(config)
        finished = result(config).exists()
    if processes.broadcast_text("finished" * finished):
        return None
    if not config.output.is_dir():  # process 0 has made it
        raise ValueError(
            f"output={config.output} is not there for process {jax.process_index()}; name a folder "
            "on a disk that all processes share"
        )
    dtype, copies = ("auto", 1) if config.lora.rank else ("float32", 4)  # of the weights
    mesh = choose_mesh(config.mesh, config.model, dtype, config.allow_unknown, copies)
    processes.say(f"{processes.describe()}, {sharding.describe(mesh)}")
    split_rows(config, mesh)
    if config.data is not None:
        check_file(config.data)  # before a large model is loaded
    source = locate(config.tokenizer or config.model, config.allow_unknown)
    if source is None:
        raise ValueError(f"model={config.model} has no tokenizer of its own; add tokenizer=bundled")
    subject = load_subject(config, mesh)
    model = subject.frozen.config
    require_trainable(model)
    rows = processes.main_first(lambda: load_rows(config, model, source))
    if processes.is_main():
        settle(config, rows)
    trained = sum(leaf.size for leaf in jax.tree.leaves(subject.trained))
    processes.say(
        f"{len(rows.tokens)} examples, {count_parameters(model):,} parameters, {trained:,} trained"
    )
    return Job(subject, rows, source, subject.facts | {"training_text": rows.digest()})


@processes.joined()
def fine_tune(config: SFTConfig) -> None:
    """Trains, then writes the weights to output/model; a finished run is left as it is.

    ValueError or OSError, in one sentence, where the input or the disk is at fault.
    """
    final = result(config)
    with files.alone(config.output) if processes.is_main() else contextlib.nullcontext():
        job = prepare(config)
        if job is None:
            processes.say(f"{final} is there already: this run is finished, nothing to do")
            return
        optimizer = make_optimizer(config.recipe)
        subject = job.subject
        begin = config.dynamics.begin(config.recipe)
        state = train.create_state(subject.trained, optimizer, subject.frozen.mesh, begin)
        state = fit(config, job, state, optimizer)
        write_result(config, subject, state.trained, job.tokenizer, state.dynamics)
        if begin and processes.is_main():
            draw_heat_maps(config.output)
