"""What the decode loop costs besides its model calls: LLaDA-8B's shapes, random weights, one GPU.

python experiments/gpu_loop.py                  (about six minutes; appends rows to gpu.jsonl)
python experiments/gpu_loop.py model=random:llada2-mini cache=block parts=step \
  kernels=auto/experts:reference
python experiments/gpu_loop.py parts=step weights=bf16,int8,fp8 kernels=auto/product:reference

Four kinds of rows. step: a block step with the cache, from two requests that differ in the number
of steps alone. full: the pass over all columns of 8 rows that opens a block. request: a whole
completion, against the same model calls in a bare loop. schedule: tokens and forwards per second
where every step takes 1, 2 or 4 tokens. Random weights never pass a threshold, hence the imposed
numbers. Each is measured with every choice of kernels, one after the other, and all of it with
every form of weights.
"""

import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdllm import DecodeConfig
from jdllm.decode import Request, Setup, State, decode, make_setup
from jdllm.decode.layout import put
from jdllm.decode.look import Call, look_at
from jdllm.decode.loop import enter_block
from jdllm.decode.start import start
from jdllm.decode.work import Work
from jdllm.kernels.quantised import KINDS
from jdllm.llm import LLM
from jdllm.load import enable_compilation_cache, read_facts
from jdllm.model.config import count_parameters
from jdllm.model.model import Model
from jdllm.model.quantise import quantise_params
from jdllm.runtime import cli, sharding
from jdllm.runtime.programs import LOOPS
from jdllm.store.checkpoint import random_model

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.jsonl"


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Timings of the decode loop."""

    output: Path = RESULTS
    model: str = "random:llada-8b"
    kernels: str = "auto"
    """What `kernel=` says, several with / between them."""
    layers: int | None = None
    """Of random weights: fewer than the shape has, where compiling must be short."""
    weights: str = "bf16"
    """How the layers' linear maps are held: bf16, int8, fp8, several with commas between them."""
    cache: str = "dual"
    """Of step, full and request: dual, or block for block-causal models."""
    parts: str = "step,full,request,schedule"
    block: int = 32
    positions: int = 1024
    """Columns of the canvases of step and request."""
    gen_length: int = 256
    """Columns that request and schedule generate."""
    prompt: int = 896
    """Prompt of schedule: about that of gsm8k with five shots."""
    batches: tuple[int, ...] = (1, 8)
    """Rows of a step's batch."""
    schedules: tuple[int, ...] = (1, 2, 4)
    """Tokens that a step takes."""
    repeats: int = 3
    threads: int = 1
    """More compile the programs of step and request first, side by side, into the cache on disk;
    then compile_seconds tells how long it takes to read them."""
    copy_megabytes: int = 2048
    """Size of the array whose copying tells the memory's rate."""
    product_width: int = 8192
    """Of the square matrices whose product tells the rate of arithmetic."""

    def __post_init__(self):
        if unknown := set(self.parts.split(",")) - set(PARTS):
            raise ValueError(f"parts={unknown.pop()} is none of {', '.join(PARTS)}")
        if unknown := set(self.weights.split(",")) - {"bf16", *KINDS}:
            raise ValueError(f"weights={unknown.pop()} is none of bf16, {', '.join(KINDS)}")
        for name in ("positions", "gen_length", "prompt"):
            if getattr(self, name) % 32:
                raise ValueError(f"{name}={getattr(self, name)} must be a multiple of 32")
        if self.positions <= max(self.gen_length, 4 * self.block):
            raise ValueError(f"positions={self.positions} leaves no room for a prompt")


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of requests of one shape, with as many tokens in every step as asked."""

    rows: int
    prompt: int
    gen_length: int
    block: int
    cache: Any
    tokens_per_step: int

    def config(self) -> DecodeConfig:
        return DecodeConfig(
            gen_length=self.gen_length,
            block_length=self.block,
            rule="quota",
            tokens_per_step=self.tokens_per_step,
            cache=self.cache,
            stop="none",
        )


def prepare(llm: LLM, case: Case) -> tuple[Request, Setup]:
    """Random prompts, and what the loop is compiled for."""
    config = llm.resolve(case.config())
    setup = make_setup(config, llm.config)
    rng = np.random.default_rng(0)
    low = min(llm.config.mask_id, llm.config.eos_id, *llm.config.stop_ids)
    prompts = rng.integers(0, low, (case.rows, case.prompt)).tolist()
    return llm._request(prompts, list(range(case.rows)), config, setup), setup


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Wall time of one run, after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@partial(jax.jit, static_argnames=("setup",))
def bare_loop(model: Model, request: Request, setup: Setup):
    """The model calls of a request with one token per step, and next to nothing besides.

    Every call writes one column, by the odds of its best token, so that none can be left out, nor
    the search for tokens, which is part of it.
    """
    work = Work(model, setup, request)

    def call(state: State, full: bool) -> State:
        rows = state.rows
        seen, cache = look_at(work.model, setup, rows, state.cache, Call(~rows.done, full))
        assert seen.view.best is not None, "a rule that reads best tokens alone"
        odds_B1 = jnp.take_along_axis(seen.view.best.odds, rows.step[:, None], axis=1)
        likely_B1 = (odds_B1 > 0).astype(jnp.int32)
        tokens_BT = put(rows.tokens, likely_B1, (rows.first + rows.step)[:, None])
        rows = dataclasses.replace(rows, tokens=tokens_BT, step=rows.step + 1)
        return dataclasses.replace(state, rows=rows, cache=cache, forwards=state.forwards + 1)

    def run_block(_: Any, state: State) -> State:
        state = dataclasses.replace(state, rows=enter_block(setup, state.rows, ~state.rows.done))
        state, steps = call(state, True), setup.block_length - 1
        state = jax.lax.fori_loop(0, steps, lambda _, s: call(s, False), state)
        rows = dataclasses.replace(state.rows, block=state.rows.block + 1)
        return dataclasses.replace(state, rows=rows)

    state = jax.lax.fori_loop(0, setup.blocks, run_block, start(work))
    return state.rows.tokens, state.forwards


def copy_rate(megabytes: int, repeats: int) -> float:
    """Bytes per second that the memory moves, read and written, in copies of a large array."""
    x, copies, copy = jnp.zeros(megabytes * 2**20 // 2, jnp.bfloat16), 20, jax.jit(jnp.copy)

    def run() -> jax.Array:
        for _ in range(copies - 1):
            copy(x)  # nobody holds it: a large model may leave little memory
        return copy(x)

    return copies * 2 * x.nbytes / median_seconds(run, repeats)


def floor_seconds(llm: LLM, case: Case, rate: float) -> float:
    """A block step's weights and keys at the memory's rate; the embedding is not read whole."""
    config = llm.config
    weights = sum(x.nbytes for x in jax.tree.leaves(llm.model))
    width = jnp.dtype(config.dtype).itemsize
    embedding = config.vocab * config.embed * width
    columns = case.rows * (case.prompt + case.gen_length)
    keys = 2 * config.layers * columns * config.kv_heads * config.head_dim * width
    return (weights - embedding + keys) / rate


def measure(llm: LLM, case: Case, config: LoopConfig, rate: float) -> dict[str, Any]:
    """A whole request: seconds, calls, memory. ms_per_step is the mean over all calls."""
    request, setup = prepare(llm, case)
    program, compile_seconds = llm._program(request, setup)
    state = program(llm.model, request, None)
    forwards = int(state.forwards)
    seconds = median_seconds(lambda: program(llm.model, request, None).rows.tokens, config.repeats)
    memory = program.memory_analysis()
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return {
        "shapes": {"model": config.model, **dataclasses.asdict(case)},
        "kernel": llm.model.kernel,
        "ms_per_step": 1e3 * seconds / forwards,
        "forwards_per_second": forwards / seconds,
        "floor_ms": 1e3 * floor_seconds(llm, case, rate),
        "tokens_per_second": case.rows * case.gen_length / seconds,
        "forwards": forwards,
        "seconds": seconds,
        "peak_gb": (sum(sizes) - memory.alias_size_in_bytes) / 1e9,
        "compile_seconds": compile_seconds,
    }


def step_cases(rows: int, config: LoopConfig) -> list[Case]:
    """Requests that differ in the number of their steps alone."""
    prompt, gen_length = config.positions - 4 * config.block, 4 * config.block
    return [Case(rows, prompt, gen_length, config.block, config.cache, n) for n in (1, 2)]


def request_case(config: LoopConfig) -> Case:
    """A whole completion."""
    prompt = config.positions - config.gen_length
    return Case(1, prompt, config.gen_length, config.block, config.cache, 1)


def compile_ahead(llm: LLM, config: LoopConfig) -> None:
    """The programs of step and request into the cache on disk, in so many threads as asked."""
    cases = [case for rows in config.batches for case in step_cases(rows, config)]
    chosen = cases * ("step" in config.parts) + [request_case(config)] * ("request" in config.parts)
    with ThreadPoolExecutor(config.threads) as pool:
        jobs = [
            pool.submit(lambda given: decode.lower(llm.model, *given).compile(LOOPS), given)
            for given in map(partial(prepare, llm), chosen if config.threads > 1 else [])
        ]
    for job in jobs:
        if failed := job.exception():
            print(f"not compiled ahead: {str(failed)[:200]}", flush=True)


def step_row(llm: LLM, rows: int, config: LoopConfig, rate: float) -> dict[str, Any]:
    """A block step inside the loop: what a request of half as many tokens per step takes longer."""
    one, two = (measure(llm, case, config, rate) for case in step_cases(rows, config))
    seconds = (one["seconds"] - two["seconds"]) / (one["forwards"] - two["forwards"])
    return one | {"ms_per_step": 1e3 * seconds, "forwards_per_second": 1 / seconds}


def request_row(llm: LLM, config: LoopConfig, rate: float) -> dict[str, Any]:
    """A whole completion with the dual cache, and the share of its time outside model calls."""
    case = request_case(config)
    row = measure(llm, case, config, rate)
    request, setup = prepare(llm, case)
    bare = bare_loop.lower(llm.model, request, setup).compile(LOOPS)
    _, forwards = bare(llm.model, request)
    if int(forwards) != row["forwards"]:
        raise ValueError(f"the bare loop makes {forwards} calls, the loop {row['forwards']}")
    seconds = median_seconds(lambda: bare(llm.model, request), config.repeats)
    return row | {"bare_seconds": seconds, "outside_share": 1 - seconds / row["seconds"]}


@partial(jax.jit, static_argnames=("setup", "calls"))
def full_passes(model: Model, request: Request, setup: Setup, calls: int):
    """Model calls over all columns, each after the other's keys."""
    work = Work(model, setup, request)
    state = start(work)
    rows = enter_block(setup, state.rows, ~state.rows.done)

    def call(_: Any, carry: Any) -> Any:
        cache, mean = carry
        seen, cache = look_at(work.model, setup, rows, cache, Call(~rows.done, True))
        return cache, mean + jnp.mean(seen.hidden_BWD)

    return jax.lax.fori_loop(0, calls, call, (state.cache, jnp.zeros((), model.dtype)))[1]


def operations(llm: LLM, columns: int, rows: int) -> float:
    """Of a pass over all columns: products of the layers, and attention over the canvas."""
    config = llm.config
    if config.moe:
        picked = dict(experts=config.moe.top_k, groups=1, top_groups=1)
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **picked))
    active = count_parameters(config) - 2 * config.vocab * config.embed
    attention = 4 * config.layers * config.heads * config.head_dim * columns
    return rows * columns * (2 * active + attention)


def full_row(llm: LLM, config: LoopConfig, rate: float) -> dict[str, Any]:
    """The pass that opens a block, over 8 rows, and its share of the rate of a large product."""
    case = Case(8, config.positions - config.block, config.block, config.block, config.cache, 1)
    request, setup = prepare(llm, case)
    few, many = (
        median_seconds(lambda n=n: full_passes(llm.model, request, setup, n), config.repeats)
        for n in (1, 5)
    )
    seconds = (many - few) / 4
    done = operations(llm, config.positions, case.rows) / seconds
    return {
        "shapes": {"model": config.model, **dataclasses.asdict(case)},
        "kernel": llm.model.kernel,
        "ms_per_step": 1e3 * seconds,
        "teraflops": done / 1e12,
        "share_of_product": done / product_rate(config.product_width, config.repeats),
    }


def product_rate(width: int, repeats: int) -> float:
    """Operations per second of products of large bfloat16 matrices."""
    x = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda _, y: (x @ y) * 0.01, x))
    return 10 * 2 * width**3 / median_seconds(lambda: multiply(x), repeats)


Timings = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def steps(llm: LLM, config: LoopConfig, rate: float) -> Timings:
    """A row per size of a batch."""
    for rows in config.batches:
        yield "loop step", partial(step_row, llm, rows, config, rate)


def schedules(llm: LLM, config: LoopConfig, rate: float) -> Timings:
    """Rows per cache, and tokens per step."""
    for cache, name in (("none", "vanilla"), ("prefix", "prefix"), ("dual", "dual")):
        for n in config.schedules:
            case = Case(1, config.prompt, config.gen_length, config.block, cache, n)
            yield f"schedule {name}", partial(measure, llm, case, config, rate)


PARTS: dict[str, Callable[[LLM, LoopConfig, float], Timings]] = {
    "step": steps,
    "full": lambda *given: iter([("full pass", partial(full_row, *given))]),
    "request": lambda *given: iter([("loop request", partial(request_row, *given))]),
    "schedule": schedules,
}


def measured(llm: LLM, config: LoopConfig) -> Iterator[dict[str, Any]]:
    """All rows, the most wanted first; of each part with one choice of kernels after the other.

    One that fails says why.
    """
    rate = copy_rate(config.copy_megabytes, config.repeats)
    for kernel in config.kernels.split("/"):
        model = dataclasses.replace(llm.model, kernel=kernel)
        compile_ahead(LLM(model, None, llm.defaults, engine="off"), config)
    for part in config.parts.split(","):
        for kernel in config.kernels.split("/"):
            model = dataclasses.replace(llm.model, kernel=kernel)
            own = LLM(model, None, llm.defaults, engine="off")
            for name, run in PARTS[part](own, config, rate):
                try:
                    found = run()
                except Exception as error:
                    found = {"kernel": kernel, "failed": str(error)[:300]}
                facts = {"weights": llm.config.weights or "bf16", "layers": llm.config.layers}
                yield {"name": name} | facts | found


def load(config: LoopConfig) -> LLM:
    """The model, with as many layers as asked for."""
    mesh = sharding.parse_mesh("1x1")
    if config.layers is None:
        return LLM.load(config.model, mesh)
    facts = dataclasses.replace(read_facts(config.model), layers=config.layers)
    return LLM(random_model(facts, mesh), None, engine="off")


def held(llm: LLM, weights: str) -> LLM:
    """The same model with its linear maps held as `weights` says."""
    if weights == "bf16":
        return llm
    params = quantise_params(llm.model.params, weights)
    facts: Any = dataclasses.replace(llm.model.config, weights=weights)
    model = dataclasses.replace(llm.model, params=params, config=facts)
    return LLM(model, None, llm.defaults, engine="off")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, that of docs/decoding.md."""
    names = ["what", "rows", "columns", "cache", "tokens per step", "ms per step"]
    names += ["forwards/s", "tokens/s", "peak GB"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        of = row["shapes"]
        cells = [row["name"], of["rows"], of["prompt"] + of["gen_length"], of["cache"]]
        cells += [of["tokens_per_step"], f"{row['ms_per_step']:.2f}"]
        cells += [f"{row[name]:.0f}" for name in ("forwards_per_second", "tokens_per_second")]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['peak_gb']:.1f} |")
    return "\n".join(lines)


def main(config: LoopConfig) -> None:
    """Appends every row to the file as soon as it is measured."""
    enable_compilation_cache()
    llm = load(config)
    jax.block_until_ready(llm.model)
    facts = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "command": " ".join(["python experiments/gpu_loop.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    rows = (row for kind in config.weights.split(",") for row in measured(held(llm, kind), config))
    for row in rows:
        with config.output.open("a") as file:
            file.write(json.dumps(row | facts) + "\n")
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print(shown, flush=True)


if __name__ == "__main__":
    cli.run(main, LoopConfig, "python experiments/gpu_loop.py")
