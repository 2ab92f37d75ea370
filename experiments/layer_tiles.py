"""Which tiles serve the products of a layer and the head best: a model's widths, few rows.

python experiments/layer_tiles.py output=FILE                       (about four minutes, one GPU)
python experiments/layer_tiles.py output=FILE model=dream-7b rows=33 parts=out,down
python experiments/layer_tiles.py output=FILE weights=int8 parts=mlp,out,down

Products run one after the other over weights that no cache holds, each waiting for the one before.
Beside: the reference, and the time that the weights take at the copy rate.
"""

import dataclasses
import datetime
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from layer_parts import median_seconds, versions

from jdllm.kernels import choose
from jdllm.kernels import split_product as split
from jdllm.kernels.head import fused as head
from jdllm.kernels.mlp import fused as mlp
from jdllm.kernels.quantised import KINDS, quantise
from jdllm.kernels.triton_call import power_of_2
from jdllm.load import enable_compilation_cache
from jdllm.model.config import NAMED
from jdllm.model.head import Sampling
from jdllm.runtime import cli, files

COPY_RATE = 3.0e12  # bytes per second that an H100 moves
GATED = (
    (64, 64, 4, 4), (64, 64, 4, 3), (32, 64, 4, 6), (32, 128, 4, 4), (64, 128, 4, 3),
    (64, 32, 4, 6), (128, 64, 8, 3), (64, 64, 8, 4), (32, 64, 2, 5),
)  # fmt: skip
CLOSING = (
    (64, 64, 256, 4, 4), (64, 64, 512, 4, 4), (128, 64, 256, 4, 4), (32, 128, 512, 4, 4),
    (32, 128, 256, 4, 5), (64, 128, 256, 4, 3), (64, 128, 512, 4, 3), (128, 64, 256, 8, 4),
    (64, 64, 128, 4, 6), (32, 64, 512, 2, 6), (64, 64, 256, 4, 6),
)  # fmt: skip
NARROW_GATED = (
    (64, 128, 4, 4), (64, 128, 4, 3), (64, 64, 4, 6), (32, 128, 4, 5), (64, 256, 4, 3),
    (64, 128, 8, 4), (128, 128, 8, 3),
)  # fmt: skip
NARROW_CLOSING = (
    (64, 128, 250, 4, 4), (64, 128, 500, 4, 4), (64, 128, 128, 4, 4), (64, 64, 250, 4, 6),
    (128, 128, 250, 4, 4), (128, 128, 500, 4, 4), (64, 256, 250, 4, 3), (32, 128, 250, 4, 5),
)  # fmt: skip
HEAD = (
    (128, 64, 4, 4), (64, 64, 4, 5), (256, 64, 8, 3), (128, 128, 4, 3), (64, 128, 4, 4),
    (128, 64, 8, 4), (128, 32, 4, 6), (128, 64, 4, 3),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TilesConfig:
    """What is measured."""

    output: Path
    model: str = "llada-8b"
    """Whose widths: a name in model/config.py."""
    rows: int = 32
    weights: Literal["bf16", "int8", "fp8"] = "bf16"
    """How they are held; the head's always in bf16."""
    parts: tuple[str, ...] = ("mlp", "out", "down", "head", "sampled head")
    gigabytes: float = 1.5
    """Of weights that a product goes through."""
    repeats: int = 3


def weights(count: int, kind: str, *shape: int) -> list[Any]:
    """Random ones; the first axis is that of the inputs."""

    @jax.jit
    def make(key: jax.Array) -> Any:
        one = jax.random.normal(key, shape, jnp.bfloat16) * shape[0] ** -0.5
        return quantise(one, (0,), kind) if kind in KINDS else one

    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def microseconds(one: Callable[..., Any], config: TilesConfig, given: list, carry: Any) -> float:
    """Of one product: `one` takes the carry and a weight, and gives the next carry."""

    @jax.jit
    def run(carry: Any, given: list, count: jax.Array) -> Any:
        def all_of_them(_: Any, carry: Any) -> Any:
            for weight in given:
                carry = one(carry, weight)
            return carry

        return jax.lax.fori_loop(0, count, all_of_them, carry)

    few, many = (
        median_seconds(partial(run, carry, given, jnp.int32(n)), config.repeats) for n in (1, 21)
    )
    return 1e6 * (many - few) / (20 * len(given))


def gated(kernel: str) -> Callable[..., Any]:
    """A layer's gate and up, and a little of it in the next one's inputs."""

    def one(x: jax.Array, weight: jax.Array) -> jax.Array:
        return x + 1e-3 * choose.gated(x, weight, kernel)[..., : x.shape[-1]]

    return one


def closed(kernel: str) -> Callable[..., Any]:
    """A closing product, its sum and its norm, and a little of it in the next one's inputs."""

    def one(carry: Any, weight: jax.Array) -> Any:
        x, total, scale = carry
        total, normed = choose.close(x, weight, total, scale, 1e-5, kernel)
        return x + 1e-3 * normed[..., :1], total, scale

    return one


def best(kernel: str) -> Callable[..., Any]:
    """The head, and a little of what it finds in the next one's inputs."""

    def one(carry: Any, weight: jax.Array) -> Any:
        x, *flags_and_noise = carry
        found = choose.head(x, weight, *flags_and_noise, kernel=kernel)
        return x + (1e-3 * found.rest[..., None]).astype(x.dtype), *flags_and_noise

    return one


def cases(config: TilesConfig) -> Iterator[tuple[Any, ...]]:
    """Name, how it is made, the module and the form of its tiles, the tiles, weights and carry."""
    D, F, V = (getattr(NAMED[config.model], name) for name in ("embed", "mlp", "vocab"))
    rows = jax.random.normal(jax.random.key(1), (1, config.rows, F), jnp.bfloat16)
    ones, all_V = jnp.ones(D, jnp.bfloat16), jnp.ones(V, bool)
    x = rows[..., :D]
    narrow = config.weights in KINDS
    first, last = (NARROW_GATED, NARROW_CLOSING) if narrow else (GATED, CLOSING)
    yield "mlp", gated, mlp, first, (D, 2, F), x
    yield "out", closed, split, last, (D, D), (x, x, ones)
    yield "down", closed, split, last, (F, D), (rows, x, ones)
    if narrow:
        return
    flags = all_V.at[5].set(False), all_V
    yield "head", best, head, HEAD, (D, V), (x, *flags)
    noise = Sampling(jax.random.split(jax.random.key(2), 1), 1.0).noise(config.rows, V)
    yield "sampled head", best, head, HEAD, (D, V), (x, *flags, noise)


def main(config: TilesConfig) -> None:
    """Measures every tile, and writes the file anew after each."""
    enable_compilation_cache()
    facts: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": versions("jax", "jaxlib", "jax-triton", "triton"),
        "command": " ".join(["python experiments/layer_tiles.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "rows": [],
    }
    for name, make, module, tiles, shape, carry in cases(config):
        if name not in config.parts:
            continue
        size = math.prod(shape) * (1 if config.weights in KINDS else 2)
        given = weights(max(int(config.gigabytes * 1e9 / size), 1), config.weights, *shape)
        operation = "closing" if module is split else name.removeprefix("sampled ")
        fused = "split" if module is split else "fused"
        for tile in (None, *tiles):
            row: dict[str, Any] = {"part": name, "rows": config.rows, "tiles": tile}
            row["floor_us"] = 1e6 * size / COPY_RATE
            try:
                if tile is not None:
                    height = max(power_of_2(config.rows), 16)
                    table = "NARROW" if config.weights in KINDS else "TILES"
                    setattr(module, table, ((math.inf, module.Tiles(height, *tile)),))
                kernel = f"{operation}:{fused if tile else 'reference'}"
                row["us"] = microseconds(make(kernel), config, given, carry)
            except Exception as error:  # one that fails says why; the others go on
                row["failed"] = str(error)[:300]
            facts["rows"].append(row)
            files.write_json(config.output, facts)
            print(
                {k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()}, flush=True
            )
        del given


if __name__ == "__main__":
    cli.run(main, TilesConfig, "python experiments/layer_tiles.py")
