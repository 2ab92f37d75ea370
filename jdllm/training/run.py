"""Fine-tuning runs: a killed one is continued and ends in the same bits."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp

from jdllm.load import enable_compilation_cache
from jdllm.runtime import files, processes, sharding, signals
from jdllm.runtime.progress import Bar
from jdllm.train import step as train
from jdllm.train.memory import plan_step, shown
from jdllm.train.objective import Batch
from jdllm.train.optimiser import make_optimizer
from jdllm.training.config import SFTConfig
from jdllm.training.dynamics import draw_heat_maps, open_log
from jdllm.training.metrics import Metrics, draw_curve, logging
from jdllm.training.prepare import Job, prepare, split_rows
from jdllm.training.subject import new_run, refuse_other, result, write_result
from jdllm.training.watch import Watch


def batches(config: SFTConfig, job: Job, mesh: jax.sharding.Mesh, start: int) -> Iterator[Batch]:
    """Batches [A, B, ...] from step `start` on, rows split over the data axis."""
    shape = config.accumulation, split_rows(config, mesh)
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    for step in range(start, job.recipe.steps):
        index, visit = job.order.at(step)
        draw = (config.seed, step)
        yield job.rows.place(index.reshape(shape), visit.reshape(shape), by_row, draw)


def interruptible() -> contextlib.AbstractContextManager[Callable[[], BaseException | None]]:
    """Puts Ctrl-C and SIGTERM off until a step is saved.

    Several processes do not hear of it at the same step, so they end at once, as after a kill.
    """
    if jax.process_count() > 1:
        return contextlib.nullcontext(lambda: None)
    return signals.deferred("saving after this step; once more ends at once")


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
    facts, args, start = job.facts | {"run": new_run()}, ocp.args, 0
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    folder = config.output.absolute() / "checkpoints"
    with ocp.CheckpointManager(folder, options=options) as manager:
        start = int(processes.broadcast_text(str(manager.latest_step() or 0)))
        if start:
            found = manager.restore(start, args=args.Composite(run=args.JsonRestore()))
            refuse_other(folder / str(start), found.run, job.facts)
            facts["run"] = found.run["run"]
            like = args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
            state = manager.restore(start, args=args.Composite(state=like)).state
            processes.say(f"resumed at step {start}")

        def save(step: int, state: train.TrainState) -> None:
            parts = {"state": args.StandardSave(state), "run": args.JsonSave(facts)}
            manager.save(step, args=args.Composite(**parts), force=True)

        settings = dataclasses.asdict(config)
        with logging(config.logger, config.output, facts["run"], settings) as logger:
            path, leads = config.output / "metrics.jsonl", processes.is_main()
            metrics = Metrics(path, config.log_every, start, leads, logger)
            with metrics.file:
                return loop(config, job, state, optimizer, metrics, start, save)


def loop(
    config: SFTConfig,
    job: Job,
    state: train.TrainState,
    optimizer: optax.GradientTransformation,
    metrics: Metrics,
    start: int,
    save: Callable[[int, train.TrainState], Any],
) -> train.TrainState:
    """The steps from `start` on, with what watches them, and saves."""
    subject, steps = job.subject, job.recipe.steps
    mesh = subject.frozen.mesh
    key = processes.device_put(jax.random.key(config.seed), sharding.replicated(mesh))
    fixed: dict[str, Any] = {
        "frozen": subject.frozen, "join": subject.join, "objective": job.objective,
        "optimizer": optimizer, "remat": config.remat, "micro": config.normalise == "micro",
    }  # fmt: skip
    for first in itertools.islice(batches(config, job, mesh, start), 1):
        device = jax.local_devices()[0].memory_stats() or {}
        plan = plan_step(state, first, key, **fixed)
        processes.say(shown(plan, device.get("bytes_limit")))
    bar = Bar(
        total=steps, initial=start, unit="step", mininterval=1.0, disable=not processes.is_main()
    )
    with bar, interruptible() as asked:
        watch = Watch(config, job, metrics, start)
        log = open_log(config.output, config.log_every, start, state.dynamics)
        if not start:
            watch.look(0, state.trained)
        for step, batch in enumerate(batches(config, job, mesh, start), start + 1):
            state, values = train.train_step(state, batch, key, **fixed)
            metrics.add(step, values)
            log.add(step, state.moments)
            bar.update()
            bar.set_postfix(metrics.shown(), refresh=False)
            watch.look(step, state.trained)
            ended = asked()
            if step % config.save_every == 0 or step == steps or ended:
                metrics.flush()
                log.flush()
                save(step, state)
            if ended:
                raise ended
        metrics.flush()
    return state


@processes.joined()
def fine_tune(config: SFTConfig) -> None:
    """Trains, then writes what was trained; a finished run is left as it is.

    ValueError or OSError, in one sentence, where the input or the disk is at fault.
    """
    enable_compilation_cache()
    final = result(config)
    with files.alone(config.output) if processes.is_main() else contextlib.nullcontext():
        job = prepare(config)
        if job is None:
            processes.say(f"{final} is there already: this run is finished, nothing to do")
            return
        optimizer = make_optimizer(job.recipe)
        subject = job.subject
        begin = config.dynamics.begin(job.recipe)
        state = train.create_state(subject.trained, optimizer, subject.frozen.mesh, begin)
        state = fit(config, job, state, optimizer)
        if processes.is_main() and (curve := draw_curve(config.output)):
            processes.say(f"drew {curve}")
        if begin and processes.is_main():
            draw_heat_maps(config.output)
        write_result(config, subject, state.trained, job.tokenizer, state.dynamics)
