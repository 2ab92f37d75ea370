"""Which tiles serve the grouped experts best: a layer of a published model's, by its tokens.

python experiments/expert_tiles.py output=experiments/results/expert_tiles.json      (two minutes)
python experiments/expert_tiles.py output=FILE weights=int8
python experiments/expert_tiles.py output=FILE model=llada-moe

A program runs several layers, each with weights of its own, so that none is in the cache. Beside:
the dense reference, and the time that the bytes of the touched experts take at the copy rate.
"""

import dataclasses
import datetime
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jdllm.kernels.experts import dense, grouped
from jdllm.kernels.experts.grouped import Tiles
from jdllm.kernels.quantised import quantise
from jdllm.kernels.shapes import PUBLISHED_LAYERS, Experts
from jdllm.runtime import cli, files

COPY_RATE = 3.0e12  # bytes per second that an H100 moves
WIDE = ((64, 64, 4, 4), (128, 64, 4, 3), (64, 64, 8, 4), (64, 64, 4, 5), (64, 128, 4, 3))
DEEP = ((128, 64, 4, 4), (128, 128, 4, 3), (64, 128, 4, 4), (256, 64, 8, 4), (128, 64, 4, 6))
NARROW_WIDE = ((64, 128, 4, 4), (64, 128, 4, 3), (128, 64, 4, 4), (64, 256, 4, 3), (32, 128, 4, 5))
NARROW_DEEP = ((128, 128, 4, 4), (64, 128, 4, 4), (128, 128, 4, 3), (128, 256, 8, 2))


@dataclasses.dataclass(frozen=True)
class TilesConfig:
    """What is measured."""

    output: Path
    model: str = "llada2-mini"
    """Whose layer: a name in kernels/shapes.py."""
    tokens: tuple[int, ...] = (8, 32, 128, 256, 1024)
    weights: Literal["bf16", "int8", "fp8"] = "bf16"
    layers: int = 6
    repeats: int = 20
    heights: tuple[int, ...] = (16, 32, 64)
    """Rows of a tile."""

    def __post_init__(self):
        if self.model not in PUBLISHED_LAYERS:
            raise ValueError(f"model={self.model} is none of {', '.join(PUBLISHED_LAYERS)}")


def inputs(tokens: int, layers: int, shape: Experts) -> tuple[Any, ...]:
    """Tokens, picks and weights of every layer: all experts are as likely."""
    rng = np.random.default_rng(tokens)
    D, E, P = shape.embed, shape.experts, shape.picks
    x = jnp.asarray(rng.normal(size=(tokens, D)), jnp.bfloat16)
    picks = np.stack([[rng.permutation(E)[:P] for _ in range(tokens)] for _ in range(layers)])
    return x, jnp.asarray(picks, jnp.int32), jnp.asarray(rng.random(picks.shape), jnp.float32)


def milliseconds(layer: Callable[..., jax.Array], config: TilesConfig, *arrays: Any) -> float:
    """Median time of one layer."""

    @jax.jit
    def run(x: jax.Array, picks: Any, weights: Any, gate_ups: Any, downs: Any) -> jax.Array:
        for one in zip(gate_ups, downs, picks, weights, strict=True):
            x = (0.3 * layer(x, *one) + 0.5 * x).astype(x.dtype)
        return x

    jax.block_until_ready(run(*arrays))
    spent = []
    for _ in range(config.repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        spent.append(time.perf_counter() - start)
    return 1e3 * statistics.median(spent) / config.layers


def error_of(best: dict[str, Any], x: jax.Array, *layer: Any) -> float:
    """Relative error of a layer with these tiles, against float32."""
    rows = ((float("inf"), Tiles(*best["gate_up"]), Tiles(*best["down"])),)
    grouped.TILES = grouped.NARROW = rows
    got = jax.jit(grouped.experts)(x, *layer).astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(dense.experts)(x.astype(jnp.float32), *layer)
    return float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))


def main(config: TilesConfig) -> None:
    """Measures every pair of tiles, the best first, and writes the file anew after each row."""
    shape = PUBLISHED_LAYERS[config.model]
    E, D, M = shape.experts, shape.embed, shape.expert_mlp
    keys = jax.random.split(jax.random.key(0), 2 * config.layers)
    gate_ups, downs = [], []
    for one, two in itertools.batched(keys, 2):
        gate_ups.append(jax.random.normal(one, (E, D, 2, M), jnp.bfloat16) * D**-0.5)
        downs.append(jax.random.normal(two, (E, M, D), jnp.bfloat16) * M**-0.5)
    if config.weights != "bf16":
        gate_ups = [quantise(one, (1,), config.weights) for one in gate_ups]
        downs = [quantise(one, (1,), config.weights) for one in downs]
    facts: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jax-triton", "triton")},
        "command": " ".join(["python experiments/expert_tiles.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "rows": [],
    }
    for tokens in config.tokens:
        x, picks, weights = inputs(tokens, config.layers, shape)
        arrays = x, list(picks), list(weights), gate_ups, downs
        touched = len(np.unique(np.asarray(picks[0])))
        row: dict[str, Any] = {"model": config.model, "tokens": tokens, "experts_touched": touched}
        row["floor_ms"] = 1e3 * touched * 3 * D * M * downs[0].dtype.itemsize / COPY_RATE
        row["reference_ms"] = milliseconds(dense.experts, config, *arrays)
        tiles = []
        wides, deeps = (WIDE, DEEP) if config.weights == "bf16" else (NARROW_WIDE, NARROW_DEEP)
        for rows, wide, deep in itertools.product(config.heights, wides, deeps):
            grouped.TILES = ((float("inf"), Tiles(rows, *wide), Tiles(rows, *deep)),)
            grouped.NARROW = grouped.TILES
            tried: dict[str, Any] = {"gate_up": (rows, *wide), "down": (rows, *deep)}
            try:
                tried["ms"] = milliseconds(grouped.experts, config, *arrays)
            except Exception as error:
                tried |= {"ms": math.inf, "failed": str(error)[:200]}
            tiles.append(tried)
        row["grouped"] = sorted(tiles, key=lambda one: one["ms"])
        row["error"] = error_of(row["grouped"][0], x, gate_ups[0], downs[0], picks[0], weights[0])
        print({k: v for k, v in row.items() if k != "grouped"}, row["grouped"][0], flush=True)
        facts["rows"].append(row)
        files.write_json(config.output, facts)


if __name__ == "__main__":
    cli.run(main, TilesConfig, "python experiments/expert_tiles.py")
