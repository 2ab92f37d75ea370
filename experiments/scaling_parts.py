"""What experiments/scaling.py measures: its settings, and the tasks of each part on one mesh."""

import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from convert_memory import Peak
from gpu_loop import Case, prepare
from lora_speed import CASES, abstract_of, advance, batch_of, spread_keys, timed

from jdllm.decode import Request, Setup
from jdllm.engine.config import EngineConfig
from jdllm.engine.dials import shared
from jdllm.engine.job import Job, Listener, Outcome, Progress, make_canvas
from jdllm.engine.replicas import Engines
from jdllm.llm import LLM
from jdllm.load import compute_dtype
from jdllm.model.config import NAMED, ModelConfig, MoEConfig
from jdllm.model.linear import modules
from jdllm.model.lora import Adapter, find, initial
from jdllm.model.model import named
from jdllm.parity import make_setup
from jdllm.runtime import processes, sharding
from jdllm.store.checkpoint import restore_model, stored_bytes
from jdllm.train.objective import Batch, choose
from jdllm.train.optimiser import Recipe, make_optimizer
from jdllm.train.step import beside, create_state, train_step

SHAPES = NAMED | {
    "tiny-experts": dataclasses.replace(
        NAMED["tiny"], block_causal=8, moe=MoEConfig(experts=8, top_k=2, expert_mlp=32)
    )
}
# Which parts use the same model and compile side by side; those of a group run mesh by mesh.
GROUPS = {
    "step": "dense", "requests": "dense", "lora": "dense", "moe": "experts", "engine": "engine",
    "restore": "restore",
}  # fmt: skip
FEW = 2  # masks per block of the shorter request


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """Timings on meshes of one host's devices."""

    output: Path = Path(__file__).resolve().parent / "results" / "scaling.jsonl"
    """Rows are appended, each as soon as it is measured."""
    parts: str = "step,requests,lora,restore,moe,engine"
    """The first come first; parts of the same model share it and run mesh by mesh."""
    meshes: str = "auto"
    """With commas between them; auto is 1x1, Nx1, 1xN, and 2x(N/2) from four devices on."""
    rows: tuple[int, ...] = (1, 8, 32)
    """Rows per replica of step."""
    expert_rows: tuple[int, ...] = (1, 8)
    """Rows per replica of moe."""
    seconds: float = 3600.0
    """Of wall time since the start, after which nothing more begins."""
    model: str = "llada-8b"
    experts: str = "llada2-mini"
    """The shape of moe and engine: one with blocks of its own."""
    lora: str = "all"
    """A case of experiments/lora_speed.py, with one row per replica; its model must be `model`."""
    layers: int | None = None
    """Of all models: fewer than the shapes have, where it must be short."""
    restore_layers: int = 4
    """Of the checkpoint that is saved and restored: it must fit the disk, and the time."""
    prompt: int = 896
    """About that of gsm8k with five shots."""
    gen_length: int = 256
    block: int = 32
    batch: int = 8
    """Rows per replica of requests, and slots of an engine."""
    batches: int = 2
    """So many times as many requests as there are rows, or slots."""
    repeats: int = 2
    steps: int = 6
    """Of lora."""

    def __post_init__(self):
        if unknown := set(self.parts.split(",")) - set(GROUPS):
            raise ValueError(f"parts={unknown.pop()} is none of {', '.join(GROUPS)}")
        for name in ("model", "experts"):
            if (shape := getattr(self, name)) not in SHAPES:
                raise ValueError(f"{name}={shape} must be one of {', '.join(SHAPES)}")
        if not SHAPES[self.experts].block_causal:
            raise ValueError(f"experts={self.experts} must be a block-causal model: llada2-mini")
        if self.lora not in CASES or CASES[self.lora].model != self.model:
            fitting = [name for name, case in CASES.items() if case.model == self.model]
            raise ValueError(f"lora={self.lora} is no case of {self.model}: {', '.join(fitting)}")
        if self.prompt % 32 or self.gen_length % (2 * self.block):
            raise ValueError(
                f"prompt={self.prompt} must be a multiple of 32 and gen_length={self.gen_length} "
                f"of two blocks of {self.block}"
            )

    def rows_of(self, part: str) -> tuple[int, ...]:
        """Per replica."""
        listed = {"step": self.rows, "moe": self.expert_rows, "lora": (1,), "restore": (0,)}
        return listed.get(part, (self.batch,))

    @property
    def mesh_texts(self) -> list[str]:
        """The meshes that are asked for."""
        if self.meshes != "auto":
            return self.meshes.split(",")
        n = jax.device_count()
        wanted = ["1x1", f"{n}x1", f"1x{n}"] + ([f"2x{n // 2}"] if n >= 4 and n % 2 == 0 else [])
        return list(dict.fromkeys(wanted))


@dataclasses.dataclass(frozen=True)
class Task:
    """One row to measure. Tasks of equal keys share what `compile` gives."""

    part: str
    rows: int
    """Per replica."""
    key: Hashable
    compile: Callable[[], Any]
    run: Callable[[Any], dict[str, Any]]


def shape(config: ScalingConfig, group: str) -> tuple[str, ModelConfig]:
    """The name and the facts of a group's model, in this machine's dtype."""
    name = config.experts if group in ("experts", "engine") else config.model
    facts = SHAPES[name]
    layers = config.layers or facts.layers
    layers = min(layers, config.restore_layers) if group == "restore" else layers
    dtype = compute_dtype("auto", facts.dtype)
    return name, dataclasses.replace(facts, layers=layers, dtype=dtype)


def case_of(config: ScalingConfig, llm: LLM, rows: int) -> Case:
    """So many rows per replica: those of `batch` as in requests, others over two blocks alone.

    The canvas has the same columns either way, hence a step the same work.
    """
    generated = config.gen_length if rows == config.batch else 2 * config.block
    prompt = config.prompt + config.gen_length - generated
    cache = "block" if llm.config.block_causal else "dual"
    return Case(rows * llm.mesh.shape["data"], prompt, generated, config.block, cache, 1)


def with_few_masks(llm: LLM, case: Case, request: Request) -> Request:
    """The same request, whose blocks are filled from the start but for FEW columns each."""
    tokens = np.array(request.tokens)
    columns = np.arange(tokens.shape[1]) - case.prompt
    filled = (columns >= 0) & (columns % case.block >= FEW)
    tokens[:, filled] = np.random.default_rng(1).integers(0, 100, (len(tokens), filled.sum()))
    placed = processes.device_put(tokens, sharding.by_row(llm.mesh))
    return dataclasses.replace(request, tokens=placed)


def seconds_of(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The median wall time of a run, and what the last one gave."""
    times, found = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        found = jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times), found


def step_row(llm: LLM, case: Case, config: ScalingConfig, program: Any) -> dict[str, Any]:
    """A block step: what the whole request takes longer than one with few masks."""
    request, _ = prepare(llm, case)
    few = with_few_masks(llm, case, request)
    jax.block_until_ready(program(llm.model, few, None))  # not counted
    less, fewer = seconds_of(lambda: program(llm.model, few, None), config.repeats)
    more, state = seconds_of(lambda: program(llm.model, request, None), config.repeats)
    forwards, memory = int(state.forwards), program.memory_analysis()
    steps = forwards - int(fewer.forwards)
    return {
        "ms_per_step": 1e3 * (more - less) / steps,
        "tokens_per_second": case.rows * case.gen_length / more,
        "forwards": forwards,
        "temporary_gb": memory.temp_size_in_bytes / 1e9 if memory else None,
        "columns": case.prompt + case.gen_length,
        "block": case.block,
    }


def random_prompts(llm: LLM, longest: int, count: int, seed: int = 2) -> list[list[int]]:
    """Random ids, so many as fall into the same bucket as the longest."""
    rng, facts = np.random.default_rng(seed), llm.config
    low = min(facts.mask_id, facts.eos_id, *facts.stop_ids)
    lengths = rng.integers(longest - 31, longest + 1, count)
    lengths[0] = longest
    return [rng.integers(0, low, n).tolist() for n in lengths]


def request_row(llm: LLM, case: Case, config: ScalingConfig, _: Any) -> dict[str, Any]:
    """Requests end to end: ids, canvases, the device, completions."""
    prompts = random_prompts(llm, case.prompt, case.rows * config.batches)
    start = time.perf_counter()
    found = list(llm.stream(prompts, case.config(), batch_size=case.rows))
    seconds = time.perf_counter() - start
    return {
        "requests": len(prompts),
        "seconds": seconds,
        "requests_per_second": len(prompts) / seconds,
        "tokens_per_second": len(prompts) * case.gen_length / seconds,
        "compile_seconds": sum(batch.compile_seconds for batch in found),  # 0: step's program
        "columns": case.prompt + case.gen_length,
    }


def loop_tasks(llm: LLM, part: str, config: ScalingConfig) -> Iterator[Task]:
    """Of step, moe and requests."""
    for count in config.rows_of(part):
        case = case_of(config, llm, count)
        run = request_row if part == "requests" else step_row
        make = partial(lambda case: llm._program(*prepare(llm, case))[0], case)
        yield Task(part, count, case, make, partial(run, llm, case, config))


def rows_of_batch(one: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """A batch's example once per replica, each with a number, and so with noise, of its own."""
    count = mesh.shape["data"]
    many = jax.tree.map(lambda x: np.repeat(np.array(x), count, 1), one)
    numbers = np.arange(count, dtype=np.int32)[None, :, None]
    many = dataclasses.replace(many, example=many.example + numbers)
    return processes.device_put(many, jax.NamedSharding(mesh, jax.P(None, "data")))


def lora_tasks(llm: LLM, part: str, config: ScalingConfig) -> Iterator[Task]:
    """A row per replica, all in one step."""
    case, mesh, facts = CASES[config.lora], llm.mesh, llm.config
    optimizer, objective = make_optimizer(Recipe()), choose("auto", facts)
    own = modules(named(llm.model))
    names, lora = find(own, case.lora.targets), case.lora
    frozen = dataclasses.replace(llm.model, adapter=Adapter({}, lora.dropout))
    count = mesh.shape["data"]
    batch = rows_of_batch(batch_of(facts, case.length), mesh)

    def state() -> Any:
        key = jax.random.key(0)
        return create_state(initial(own, names, lora.rank, lora.scale, key, mesh), optimizer, mesh)

    keys, share = spread_keys(objective, facts, batch, config.steps)

    def make() -> Any:
        return train_step.lower(
            abstract_of(state()), batch, keys[0], frozen=frozen, join=beside, objective=objective,
            optimizer=optimizer, remat="none",
        ).compile()  # fmt: skip

    def run(program: Any) -> dict[str, Any]:
        order = iter([keys[0], keys[-1], *keys])  # two steps that are not counted
        seconds, losses = timed(
            partial(advance, program, batch, order, frozen), state(), config.steps
        )
        return {
            "steps_per_second": 1 / seconds,
            "tokens_per_second": count * case.length / seconds,
            "columns": case.length,
            "rank": lora.rank,
            "masked": share,
            "loss": losses[-1],
        }

    yield Task(part, 1, "lora", make, run)


def jobs(
    llm: LLM, config: ScalingConfig, count: int, seed: int, listener: Listener
) -> Iterator[Job]:
    """Jobs of an engine, whose lengths vary.

    Every seed has prompts of its own: an engine keeps the keys of those that it has read.
    """
    rng = np.random.default_rng(seed)
    for number, prompt in enumerate(random_prompts(llm, config.prompt, count, seed)):
        blocks = config.gen_length // config.block
        length = config.block * int(rng.integers(1, blocks + 1) if number else blocks)
        case = Case(1, len(prompt), length, config.block, "block", 1)
        setup: Setup = make_setup(llm.resolve(case.config()), llm.config)
        canvas = make_canvas(prompt, setup, llm.config.mask_id)
        yield Job(canvas, len(prompt), *shared(setup), jax.random.key(number), listener)


def engine_tasks(llm: LLM, part: str, config: ScalingConfig) -> Iterator[Task]:
    """Requests of many lengths through an engine per replica."""
    count, block = llm.mesh.shape["data"], config.block
    page = -(-32 // block) * block
    columns = config.prompt + config.gen_length
    settings = EngineConfig(
        slots=config.batch, columns=columns, page=page, chunk=max(1, 256 // page) * page
    )

    def make() -> Engines:
        """Engines that have made every program: each compiles for devices of its own.

        Twice as many jobs as slots: a row that takes another's place may need programs, too.
        """
        engines = Engines(llm.model, settings)
        for engine in engines.engines:
            for job in jobs(llm, config, 2 * config.batch, 0, lambda _: None):
                engine.submit(job)
        threads = [threading.Thread(target=engine.drain) for engine in engines.engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return engines

    def run(engines: Engines) -> dict[str, Any]:
        ways = {"one_thread": engines.drain, "threads": partial(served, engines)}
        found: dict[str, Any] = {}
        for seed, (name, work) in enumerate(ways.items(), 1):
            ended: list[Outcome] = []
            listener, number = partial(keep_outcome, ended), count * config.batch * config.batches
            asked = list(jobs(llm, config, number, seed, listener))
            tokens = sum(job.end - job.prompt for job in asked)
            for job in asked:
                engines.submit(job)
            start = time.perf_counter()
            work()
            found[f"tokens_per_second_{name}"] = tokens / (time.perf_counter() - start)
            reasons = {event.reason for event in ended}
            if len(ended) != len(asked) or reasons != {"done"}:
                raise ValueError(f"{len(ended)} of {len(asked)} requests ended: {reasons}")
            found |= {f"tokens_{name}": tokens, "requests": len(asked), "columns": columns}
        return found

    yield Task(part, config.batch, "engine", make, run)


def keep_outcome(ended: list[Outcome], event: Progress) -> None:
    """Notes how a job ended."""
    if isinstance(event, Outcome):
        ended.append(event)


def served(engines: Engines) -> None:
    """What is submitted, each engine in its thread, as a server does it."""
    engines.start()
    engines.stop()


def uncached(folder: Path) -> None:
    """Writes files to the disk and asks the kernel to forget them, so that they are read again."""
    for path in filter(Path.is_file, folder.rglob("*")):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def restore_row(folder: Path, mesh: jax.sharding.Mesh, save_seconds: float) -> dict[str, Any]:
    """Seconds of a restore, and how much host memory it needs at most."""
    uncached(folder)
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    model = jax.block_until_ready(restore_model(folder, mesh))
    seconds = time.perf_counter() - start
    size = stored_bytes(model.config)
    return {
        "seconds": seconds,
        "gigabytes": size / 1e9,
        "gigabytes_per_second": size / 1e9 / seconds,
        "host_growth_gb": peak.growth() / 1e9,
        "save_seconds": save_seconds,
    }


TASKS: dict[str, Callable[[LLM, str, ScalingConfig], Iterator[Task]]] = {
    "step": loop_tasks, "requests": loop_tasks, "moe": loop_tasks, "lora": lora_tasks,
    "engine": engine_tasks,
}  # fmt: skip
