"""What needs a GPU, in one call: memory plans, golden runs in float32, attention kernels, the
bundled model, random weights of every named shape. (gpu_loop.py has the timings of decoding.)

python experiments/gpu_check.py output=experiments/results/gpu_check.json
"""

import dataclasses
import datetime
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdllm import DecodeConfig
from jdllm.batches import bucket
from jdllm.decode.memory import Planner
from jdllm.kernels import choose, shapes
from jdllm.kernels.attention import reference
from jdllm.kernels.attention.split import in_pages
from jdllm.kernels.experts import dense, grouped
from jdllm.kernels.opening.reference import Projection
from jdllm.kernels.quantised import Quantised, quantise
from jdllm.kernels.rotary.reference import Facts, Target
from jdllm.kernels.routing.reference import Rule
from jdllm.llm import LLM
from jdllm.load import weight_bytes
from jdllm.model.config import NAMED
from jdllm.model.head import Sampling
from jdllm.runtime import cli, sharding
from jdllm.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """GPU checks and timings."""

    output: Path
    model: str = "random:llada-8b"
    """The large model whose memory is planned and measured."""
    parts: tuple[str, ...] = ("plans", "goldens", "kernels", "blocks", "bundled", "named_shapes")
    """What to check. The replay of the recorded runs (goldens) takes minutes."""

    def __post_init__(self):
        if unknown := set(self.parts) - set(PARTS):
            raise ValueError(f"parts={min(unknown)} must be among {', '.join(PARTS)}")


def goldens() -> str:
    """The golden replay on this device; pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    environment = dict(os.environ, JAX_PLATFORMS="cuda", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    run = subprocess.run(
        [*command, "tests/model/test_goldens.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    return run.stdout.strip().splitlines()[-1]


def bundled() -> dict[str, Any]:
    """Accuracy and speed on 1000 generated sudoku and countdown puzzles, second run timed."""
    llm = LLM.load("bundled")
    found: dict[str, Any] = {}
    for name in ("sudoku", "countdown"):
        task = TASKS[name]
        docs = task.generate(1000, 0, held_out=True)
        prompts = [task.prompt(doc) for doc in docs]
        llm.generate(prompts, batch_size=256)
        batches = list(llm.stream(prompts, batch_size=256))
        solved = sum(
            task.grade(docs[i], completion.text or "")["solved"]
            for batch in batches
            for i, completion in zip(batch.index, batch.completions, strict=True)
        )
        tokens = sum(len(c.ids) for batch in batches for c in batch.completions)
        seconds = sum(batch.seconds for batch in batches)
        found[name] = {"solved": solved / len(docs), "tokens_per_second": tokens / seconds}
    return found


def kernels() -> list[dict[str, Any]]:
    """Each implementation in bfloat16: its error, microseconds, and whether rows are alone.

    Fresh numbers; rows of all lengths, and queries with ranges of their own; keys in pages; several
    rows with few queries, one row with many.
    """
    found = []
    for number, shape in enumerate(shapes.PUBLISHED_ATTENTION):
        B, T, S, H, G, K = shape
        rng = np.random.default_rng(number)
        sizes = (B, T, H, K), (B, S, G, K), (B, S, G, K)
        q, k, v = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in sizes)
        lengths = jnp.asarray(rng.integers(1, S + 1, B), jnp.int32)
        first = rng.integers(0, S, (B, T))
        last = np.minimum(first + rng.integers(1, S + 1, (B, T)), S)
        ranges = jnp.asarray(np.stack([first, last], -1), jnp.int32)
        for visible in (lengths, ranges):
            with jax.enable_x64(True):
                expected = jnp.asarray(exact(q, k, v, visible), jnp.float32)
            arrays = (q, k, v, visible)
            found += compared("attention", shape, expected, arrays, (0, 1, 2, 3))
            if S % shapes.PAGE == 0:
                arrays = q, *in_pages(k, v, shapes.PAGE), visible
                found += compared("paged_attention", shape, expected, arrays, (0, 3, 4))
    for number, shape in enumerate(shapes.PUBLISHED_EXPERTS):
        T, P, E, D, M = shape
        x, gate_up, down = (
            (jax.random.normal(jax.random.key(number), size) * scale).astype(jnp.bfloat16)
            for size, scale in (((T, D), 1), ((E, D, 2, M), D**-0.5), ((E, M, D), M**-0.5))
        )
        _, picks = jax.lax.top_k(jax.random.uniform(jax.random.key(number + 9), (T, E)), P)
        weights = jax.random.uniform(jax.random.key(number + 99), (T, P))
        with jax.default_matmul_precision("highest"):
            high = (array.astype(jnp.float32) for array in (x, gate_up, down))
            expected = jax.jit(dense.experts)(*high, picks, weights)
        found += compared("experts", shape, expected, (x, gate_up, down, picks, weights))
        found += gradients(shape, [x, gate_up, down], picks, weights)
    return found


def blocks() -> list[dict[str, Any]]:
    """What surrounds attention, in bfloat16, against the references in float32: by field of what an
    implementation returns its relative error, or for ids the share that is the same."""
    found = [
        row
        for shape in shapes.PUBLISHED_BLOCKS
        for operation, arrays, facts in block_cases(shape)
        for row in held(operation, shape, arrays, facts)
    ]
    for shape in shapes.PUBLISHED_EXPERTS:
        found += held("routing", shape, *routing_case(shape))
    return found


def routing_case(shape: shapes.Experts) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random tokens, router and bias, and LLaDA2's rule."""
    T, P, E, D, _ = shape
    x, router, bias = (
        jax.random.normal(key, size) * scale
        for key, (size, scale) in zip(
            jax.random.split(jax.random.key(3), 3),
            (((T, D), 1), ((D, E), D**-0.5), ((E,), 0.1)),
            strict=True,
        )
    )
    rule = Rule(P, "sigmoid", "selection", groups=8, top_groups=4, renormalise=True, scale=2.5)
    return (x.astype(jnp.bfloat16), router, bias), {"rule": rule}


def block_cases(shape: shapes.Block) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Every operation of a block with random numbers, and what it takes besides arrays."""
    B, T, D, F, H, G, K, V, head_norms = shape
    keys = iter(jax.random.split(jax.random.key(7), 32))

    def normal(*size: int, scale: float = 1.0) -> jax.Array:
        return (jax.random.normal(next(keys), size) * scale).astype(jnp.bfloat16)

    x, branch, scale, eps = normal(B, T, D), normal(B, T, D), normal(D), {"eps": 1e-5}
    yield "norm", (x, branch, scale), eps

    def narrow(weight: jax.Array) -> Quantised:
        return quantise(weight, (0,), "int8")

    inner, both = normal(B, T, F), (normal(D, 2, F, scale=D**-0.5), normal(F, D, scale=F**-0.5))
    for gate_up, down in (both, tuple(map(narrow, both))):
        yield "mlp", (x, gate_up), {}
        yield "closing", (inner, down, x, scale), eps
    one = narrow(normal(D, F, scale=D**-0.5))
    yield "product", (x.reshape(-1, D), one.values, one.scale), {}
    packed = (normal(B, T, 3, H, K),) if H == G else (normal(B, T, H, K), normal(B, T, 2, G, K))
    sizes = [one.shape[2:] for one in packed]
    pairs = [(normal(D, *size, scale=D**-0.5), normal(*size)) for size in sizes]
    maps = tuple(Projection(weight, bias) for weight, bias in pairs)
    small = tuple(Projection(narrow(weight), bias) for weight, bias in pairs)
    norms = (normal(K), normal(K)) if head_norms else ()
    k, v, paged = normal(B, 1024, G, K), normal(B, 1024, G, K), (-1, shapes.PAGE, G, K)
    places = jnp.broadcast_to(jnp.arange(512, 512 + T, dtype=jnp.int32), (B, T))
    through = places + 1024 * jnp.arange(B - 1, -1, -1, dtype=jnp.int32)[:, None]
    by_page = Target(k.reshape(paged), v.reshape(paged), through)
    for by_row, target in ((True, Target(k, v, places)), (False, by_page)):
        facts = Facts(1e4, None, 1e-6 if head_norms else None, by_row)
        yield "rotary", (packed, norms, places, target), {"facts": facts}
        for each in (maps, small):
            yield "opening", (x, each, norms, places, target), {"facts": facts}
    head, all_V = normal(D, V, scale=D**-0.5), jnp.ones(V, bool)
    noise = Sampling(jax.random.split(next(keys), B), 0.7, 1.3).noise(T, V)
    for drawn in (None, noise):
        yield "head", (x, head, all_V.at[3].set(False), all_V.at[5].set(False), drawn), {}


def held(
    operation: str, shape: Any, arrays: tuple[Any, ...], facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A row for each implementation of an operation; its reason if it declines."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays)
    with jax.default_matmul_precision("highest"):
        run = partial(choose.TABLES[operation]["reference"], **facts)
        expected = [np.asarray(x) for x in jax.tree.leaves(jax.jit(run)(*wide))]
    for name in choose.TABLES[operation]:
        row: dict[str, Any] = {"operation": operation, "name": name, "shapes": shape._asdict()}
        if any(x.dtype == jnp.int8 for x in jax.tree.leaves(arrays)):
            row["weights"] = "int8"
        if operation == "head":
            row["sampled"] = arrays[-1] is not None
        if operation in ("rotary", "opening"):
            row["pages"] = not facts["facts"].by_row
        try:
            run = partial(choose.run, operation, f"{operation}:{name}", **facts)
            found = jax.tree.leaves(jax.jit(run)(*arrays))
        except ValueError as error:
            yield row | {"declined": str(error)[-160:]}
            continue
        pairs = zip(found, expected, strict=True)
        yield row | {"errors": [difference(np.asarray(x, y.dtype), y) for x, y in pairs]}


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative error of numbers that are finite in both; of ids the share that differs."""
    if np.issubdtype(expected.dtype, np.integer):
        return float(np.mean(found != expected))
    if not np.array_equal(finite := np.isfinite(expected), np.isfinite(found)):
        return math.inf
    wrong, right = found[finite] - expected[finite], expected[finite]
    return float(np.linalg.norm(wrong) / np.linalg.norm(right))


def gradients(
    shape: shapes.Experts, low: list[jax.Array], picks: jax.Array, weights: jax.Array
) -> list[dict[str, Any]]:
    """The grouped experts' gradients in bfloat16 against the dense reference's in float32.

    Only of few tokens: the reference keeps every expert's numbers of every token.
    """
    if shape.tokens > 128:
        return []
    served = partial(choose.experts, kernel="experts:grouped")
    row = {"operation": "experts, gradients", "name": "grouped", "shapes": shape._asdict()}
    errors = {}
    for number, name in grouped.SLOPES.items():
        with jax.default_matmul_precision("highest"):
            wide = (x.astype(jnp.float32) for x in low)
            expected = jax.jit(grouped.slope(dense.experts, number))(*wide, picks, weights)
        try:
            one = jax.jit(grouped.slope(served, number))(*low, picks, weights)
        except ValueError as error:
            return [row | {"declined": str(error)}]
        wrong = one.astype(jnp.float32) - expected
        errors[name] = float(jnp.linalg.norm(wrong.ravel()) / jnp.linalg.norm(expected.ravel()))
    return [row | {"relative_error": errors}]


@jax.jit
def exact(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention in float64, as it is defined."""
    (B, T, H, K), G = q.shape, k.shape[2]
    q_BTGRK, k, v = (x.astype(jnp.float64) for x in (q.reshape(B, T, G, H // G, K), k, v))
    scores = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k) * K**-0.5
    seen = reference.by_query(visible, k.shape[1])[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("BGRTS,BSGK->BTGRK", weights, v).reshape(B, T, H, K)


def compared(
    operation: str,
    shape: Any,
    expected: jax.Array,
    arrays: tuple[jax.Array, ...],
    by_row: tuple[int, ...] = (),
) -> list[dict[str, Any]]:
    """A row for each implementation in the table of an operation; its reason if it declines.

    Those of `arrays` that lead with rows are named by number: a row is then computed alone, too.
    """
    found = []
    for name in choose.TABLES[operation]:
        row = {"operation": operation, "name": name, "shapes": shape._asdict()}
        row["visible"] = str(arrays[-1].shape) if by_row else ""
        run = jax.jit(partial(choose.run, operation, f"{operation}:{name}"))
        try:
            together = run(*arrays)
        except ValueError as error:
            found.append(row | {"declined": str(error)})
            continue
        wrong = together.astype(jnp.float32) - expected
        error = float(jnp.linalg.norm(wrong.ravel()) / jnp.linalg.norm(expected.ravel()))
        seconds = chained(run, *arrays)
        row |= {"relative_error": error, "microseconds": round(1e6 * seconds, 1)}
        for b in {0, len(expected) - 1} if by_row else ():
            own = [x[b : b + 1] if i in by_row else x for i, x in enumerate(arrays)]
            same = bool(jnp.array_equal(run(*own), together[b : b + 1]))
            row["alone_as_together"] = same and row.get("alone_as_together", True)
        found.append(row)
    return found


def chained(run: Callable, first: jax.Array, *rest: jax.Array, times: int = 50) -> float:
    """Seconds of a call that waits for the one before, inside one program."""

    @jax.jit
    def loop(x: jax.Array, *rest: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: 0.5 * x + 0.5 * run(x, *rest), x)

    found = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(loop(first, *rest))
        found.append(time.perf_counter() - start)
    return sorted(found)[1] / times


def named_shapes() -> dict[str, dict[str, float]]:
    """Random weights of every named model that the device has room for: seconds and gigabytes."""
    found, mesh = {}, sharding.parse_mesh("1x1")
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    for name, config in NAMED.items():
        if weight_bytes(config, mesh) > limit:
            continue
        start = time.perf_counter()
        params = LLM.load(f"random:{name}", mesh).model.params
        jax.block_until_ready(params)
        size = sum(x.nbytes for x in jax.tree.leaves(params)) / 1e9
        found[name] = {"seconds": time.perf_counter() - start, "gigabytes": size}
        if found[name]["gigabytes"] < 0.99 * weight_bytes(config, mesh) / 1e9:
            raise ValueError(f"random:{name} has {size} GB of weights, fewer than its config says")
    return found


def plan_and_peak(model: str, batch: int, length: int) -> dict[str, Any]:
    """The planned bytes of one device, and the peak that it reports, loading included.

    Where loading alone reached the peak (`load_peak` equals `peak`), the run says nothing about
    decoding. The allocator's own waste is part of `peak`. Needs a process of its own.
    """
    device = jax.devices()[0]
    decoding = DecodeConfig(gen_length=64, block_length=32, stop="none")
    llm = LLM.load(model, sharding.parse_mesh("1x1"))
    jax.block_until_ready(llm.model)
    loaded = (device.memory_stats() or {})["peak_bytes_in_use"]
    prompt = [7] * (length - 64)
    next(iter(llm.stream([prompt] * batch, decoding, batch_size=batch)))
    peak = (device.memory_stats() or {})["peak_bytes_in_use"]
    columns = min(bucket(len(prompt)), llm.config.max_length - 64) + 64
    planner = Planner(llm.config, sharding.abstract_mesh("1x1"), columns, llm.resolve(decoding))
    plan = planner.plan(batch)
    return {
        "model": model,
        "batch": batch,
        "columns": columns,
        "plan": dataclasses.asdict(plan) | {"total": plan.total},
        "load_peak": loaded,
        "peak": peak,
        "plan_over_peak": plan.total / peak,
    }


def plans(model: str) -> list[dict[str, Any]]:
    """`plan_and_peak` of the bundled model and of `model`, each in a fresh process.

    Run before this process takes the device: peaks cannot be reset.
    """
    found = []
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    for words in (["bundled", "512", "512"], [model, "32", "576"]):
        command = [sys.executable, __file__, "plan", *words]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            found.append({"model": words[0], "error": run.stderr.strip().splitlines()[-1:]})
        else:
            found.append(json.loads(run.stdout.splitlines()[-1]))
    return found


# In this order: the first two start processes, before this one holds the device's memory.
PARTS: dict[str, Callable[[CheckConfig], Any]] = {
    "plans": lambda config: plans(config.model),
    "goldens": lambda _: goldens(),
    "kernels": lambda _: kernels(),
    "blocks": lambda _: blocks(),
    "bundled": lambda _: bundled(),
    "named_shapes": lambda _: named_shapes(),
}


def main(config: CheckConfig) -> None:
    """Runs the parts and writes one JSON file, anew after each; parts left out stay as they are."""
    found = json.loads(config.output.read_text()) if config.output.exists() else {}
    for name in (name for name in PARTS if name in config.parts):
        result = PARTS[name](config)
        found[name] = {
            "command": f"python experiments/gpu_check.py parts={name} model={config.model}",
            "device": jax.devices()[0].device_kind,
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
            "date": datetime.date.today().isoformat(),
            "result": result,
        }
        config.output.write_text(json.dumps(found, indent=2) + "\n")
        print(name, json.dumps(result), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["plan"]:
        print(json.dumps(plan_and_peak(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
        raise SystemExit
    cli.run(main, CheckConfig, "python experiments/gpu_check.py")
