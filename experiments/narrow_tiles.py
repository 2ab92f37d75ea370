"""Which tiles serve products with 8-bit weights best: the four of a LLaDA-8B layer, by rows.

python experiments/narrow_tiles.py output=experiments/results/narrow_tiles.json      (four minutes)

A program multiplies by several weights, one after the other, so that none is in the cache. Beside:
XLA's own fusion of the same product, with either order of axes, the product in bfloat16, and the
time that the bytes take at the copy rate.
"""

import concurrent.futures
import dataclasses
import datetime
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jdllm.kernels.product import narrow
from jdllm.kernels.product.narrow import Tiles
from jdllm.runtime import cli, files

# [N, K] of the products of a layer.
SHAPES = {
    "qkv": (12288, 4096),
    "out": (4096, 4096),
    "gate_up": (24576, 4096),
    "down": (4096, 12288),
}
# columns, inner, warps, stages, turned
FEW = (
    (64, 128, 4, 4, 0), (64, 128, 4, 6, 0), (64, 256, 4, 4, 0), (128, 128, 4, 4, 0),
    (128, 128, 8, 4, 0), (128, 64, 4, 6, 0), (32, 256, 4, 4, 0), (128, 256, 8, 3, 0),
    (64, 256, 8, 4, 0), (64, 64, 4, 6, 0),
    (64, 128, 4, 4, 1), (64, 128, 4, 6, 1), (64, 256, 4, 3, 1), (128, 128, 4, 4, 1),
    (128, 128, 8, 4, 1), (128, 64, 4, 6, 1),
)  # fmt: skip
MANY = (
    (128, 64, 4, 4, 0), (128, 128, 8, 3, 0), (256, 64, 8, 3, 0),
    (64, 128, 4, 4, 1), (128, 64, 4, 4, 1), (128, 128, 8, 3, 1), (128, 64, 8, 4, 1),
)  # fmt: skip
PROGRAMS = (130, 800)  # as many as may work on a product
LOOPS = 5


@dataclasses.dataclass(frozen=True)
class TilesConfig:
    """What is measured."""

    output: Path
    rows: tuple[int, ...] = (32, 256)
    shapes: tuple[str, ...] = tuple(SHAPES)
    dtypes: tuple[str, ...] = ("int8",)
    weights: int = 12
    """Weights of a program, each read once."""
    threads: int = 12
    repeats: int = 5
    copy_megabytes: int = 2048


def candidates(rows: int, N: int, K: int) -> Iterator[Tiles]:
    """Tiles that divide the product, with splits that give a sensible number of programs."""
    heights = (max(16, rows),) if rows <= 64 else (64, 128)
    for height, one in itertools.product(heights, FEW if rows <= 64 else MANY):
        columns, inner, warps, stages, turned = one
        tiles = -(-rows // height) * N // columns
        for split in (1, 2, 3, 4, 6, 8, 12, 16):
            enough = PROGRAMS[0] <= tiles * split <= PROGRAMS[1] or split == 8
            if enough and K % (split * inner) == 0:
                yield Tiles(height, columns, inner, warps, stages, bool(turned), split)


def einsum(spec: str, x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """What XLA makes of the product."""
    x, values = jax.lax.optimization_barrier((x, values))
    return jnp.einsum(spec, x, values.astype(x.dtype)) * scale.astype(x.dtype)


def mosaic(
    x: jax.Array, values: jax.Array, scale: jax.Array, tile_m: int, tile_k: int, steps: int
) -> jax.Array:
    """JAX's example of a product of int8 and bfloat16 for Hopper, the weight on the left."""
    from jax.experimental.pallas.ops.gpu import hopper_mixed_type_matmul_mgpu as example

    wide = example.TuningConfig(
        tile_m=tile_m, tile_n=len(x), tile_k=tile_k, max_concurrent_steps=steps,
        epi_tile_n=len(x), epi_tile_m=64, wg_dimension=example.MatmulDimension.M,
    )  # fmt: skip
    found = example.mixed_matmul_kernel(values, x.T, out_dtype=x.dtype, config=wide)
    return found.T * scale.astype(x.dtype)


def looped(multiply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Products of several inputs and weights, over and over."""

    def run(xs: jax.Array, scale: jax.Array, weights: Any) -> jax.Array:
        def once(_: Any, xs: jax.Array) -> jax.Array:
            found = [multiply(xs[i], values, scale) for i, values in enumerate(weights)]
            touch = jnp.stack([one[0, 0].astype(jnp.float32) for one in found]).sum() * 1e-6
            return xs + touch.astype(xs.dtype)

        return jax.lax.fori_loop(0, LOOPS, once, xs)

    return run


def variants(config: TilesConfig, rows: int, N: int, K: int) -> Iterator[tuple[Any, ...]]:
    """Name, facts, function and layout of what is compared."""
    yield "xla [N, K]", {}, partial(einsum, "mk,nk->mn"), "NK"
    yield "xla [K, N]", {}, partial(einsum, "mk,kn->mn"), "KN"
    yield "bfloat16 [K, N]", {}, partial(einsum, "mk,kn->mn"), "wide"
    for tiles in candidates(rows, N, K):
        yield "triton", tiles._asdict(), partial(narrow.run, tiles=tiles), "NK"
    for tile_m, tile_k, steps in ((64, 128, 4), (64, 128, 6), (128, 128, 4)):
        facts = {"tile_m": tile_m, "tile_k": tile_k, "steps": steps}
        if N % (2 * tile_m) == 0 and rows <= 64:
            yield "mosaic", facts, partial(mosaic, **facts), "NK"


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median wall time after one run that is not counted."""
    jax.block_until_ready(run())
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def copy_rate(config: TilesConfig) -> float:
    """Bytes per second that the memory moves, read and written."""
    x, copy = jnp.zeros(config.copy_megabytes << 20, jnp.int8), jax.jit(jnp.copy)
    spent = seconds(lambda: [copy(x) for _ in range(10)], config.repeats)
    return 10 * 2 * x.nbytes / spent


def drawn(config: TilesConfig, dtype: str, N: int, K: int) -> dict[str, list[jax.Array]]:
    """Weights by layout."""
    if dtype == "int8":
        draw: Any = partial(jax.random.randint, minval=-127, maxval=128, dtype=jnp.int8)
    else:
        draw = lambda key, shape: (jax.random.normal(key, shape) * 100).astype(dtype)  # noqa: E731
    keys = jax.random.split(jax.random.key(1), config.weights)
    values = [jax.jit(draw, static_argnums=1)(key, (N, K)) for key in keys]
    turned = [jnp.array(one.T, copy=True) for one in values]
    return {"NK": values, "KN": turned, "wide": [one.astype(jnp.bfloat16) for one in turned]}


def compared(config: TilesConfig, name: str, dtype: str, rows: int, rate: float) -> list[dict]:
    """All variants of one product, the quickest first."""
    N, K = SHAPES[name]
    weights = drawn(config, dtype, N, K)
    xs = jax.random.normal(jax.random.key(0), (config.weights, rows, K), jnp.bfloat16)
    scale = jax.random.uniform(jax.random.key(2), (N,), minval=0.5) / 127 / math.sqrt(K)
    exact = jax.jit(partial(jnp.einsum, "mk,nk->mn", precision="highest"))
    wanted = exact(xs[0].astype(jnp.float32), weights["NK"][0].astype(jnp.float32)) * scale

    def compiled(one: tuple[Any, ...]) -> tuple[Any, ...]:
        kind, facts, multiply, layout = one
        try:
            loop = jax.jit(looped(multiply)).lower(xs, scale, weights[layout]).compile()
            return kind, facts, jax.jit(multiply), loop, layout
        except Exception as error:
            return kind, facts, None, f"{type(error).__name__}: {error}"[:200], layout

    found = []
    with concurrent.futures.ThreadPoolExecutor(config.threads) as pool:
        ready = list(pool.map(compiled, variants(config, rows, N, K)))
    for kind, facts, multiply, loop, layout in ready:
        row = {"product": name, "dtype": dtype, "rows": rows, "kind": kind} | facts
        try:
            if multiply is None:
                raise RuntimeError(loop)
            got = multiply(xs[0], weights[layout][0], scale).astype(jnp.float32)
            row["error"] = float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))
            spent = seconds(partial(loop, xs, scale, weights[layout]), config.repeats)
            row["us"] = 1e6 * spent / LOOPS / config.weights
            row["of_copy_rate"] = weights[layout][0].nbytes / row["us"] * 1e6 / rate
        except Exception as error:
            row["failed"] = str(error)[:200]
        found.append(row)
    return sorted(found, key=lambda row: row.get("us", math.inf))


def main(config: TilesConfig) -> None:
    """Measures, shows the best, and writes all rows after every product."""
    rate, found = copy_rate(config), []
    facts = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jax-triton", "triton")},
        "command": " ".join(["python experiments/narrow_tiles.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "copy_rate": rate,
    }
    print(f"copy rate {rate / 1e12:.2f} TB/s", flush=True)
    for rows, dtype, name in itertools.product(config.rows, config.dtypes, config.shapes):
        start = time.perf_counter()
        own = compared(config, name, dtype, rows, rate)
        found += own
        best = [row for row in own if row["kind"] == "triton"][:5]
        others = [row for row in own if row["kind"] != "triton"]
        print(f"{name} {dtype} {rows} rows, {time.perf_counter() - start:.0f} s")
        for row in [*best, *others]:
            print({k: v for k, v in row.items() if k not in ("product", "dtype")}, flush=True)
        files.write_json(config.output, facts | {"rows": found})


if __name__ == "__main__":
    cli.run(main, TilesConfig, "python experiments/narrow_tiles.py")
