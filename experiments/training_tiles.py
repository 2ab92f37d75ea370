"""The experts of a layer in training, and attention in two streams: LLaDA2-mini's widths, one GPU.

python experiments/training_tiles.py output=experiments/results/training_tiles.json      (a minute)

Each product of the grouped experts by the tiles that it is cut into, several layers with weights of
their own in one program; then a layer forwards, and forwards and backwards as LoRA needs it;
then attention under the two-stream mask, by cuDNN and by XLA.
"""

import dataclasses
import datetime
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jdllm.kernels import choose
from jdllm.kernels.experts import grouped_grad
from jdllm.kernels.triton_call import Tiles
from jdllm.model.mask import Mask
from jdllm.runtime import cli, files

E, D, M, P = 256, 2048, 512, 8
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128
TIMES = (
    Tiles(64, 128, 64, 4, 3), Tiles(64, 128, 64, 4, 4), Tiles(64, 256, 64, 8, 3),
    Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3),
)  # fmt: skip
OUTER = (Tiles(128, 128, 32, 8, 3), Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 32, 8, 3))
OPERATIONS = {"gate_up": 2, "down": 1, "down turned": 1, "gate_up turned": 2, "outer": 2}
"""Products, by how often 2 T P D M operations they are."""


@dataclasses.dataclass(frozen=True)
class TilesConfig:
    """What is measured."""

    output: Path
    tokens: int = 4096
    layers: int = 3
    repeats: int = 8


type Layers = list[tuple[jax.Array, jax.Array]]


def draw(config: TilesConfig) -> tuple[dict[str, jax.Array], Layers]:
    """Rows, picks and factors, and the weights of every layer: all experts are as likely."""
    T, keys = config.tokens, jax.random.split(jax.random.key(0), 6 + 2 * config.layers)
    sizes = {"x": (T, D), "change": (T, D), "both": (T * P, 2 * M), "hidden": (T * P, M)}
    rows = {
        name: jax.random.normal(key, size, jnp.bfloat16)
        for key, (name, size) in zip(keys, sizes.items(), strict=False)
    }
    _, rows["picks"] = jax.lax.top_k(jax.random.uniform(keys[4], (T, E)), P)
    rows["factors"] = jax.random.uniform(keys[5], (T, P)) / P

    def weights(key: jax.Array, *size: int) -> jax.Array:
        return jax.random.normal(key, size, jnp.bfloat16) * size[1] ** -0.5

    pairs = zip(keys[6::2], keys[7::2], strict=True)
    return rows, [(weights(a, E, D, 2, M), weights(b, E, M, D)) for a, b in pairs]


def product(name: str, rows: dict[str, jax.Array], layers: Layers) -> jax.Array:
    """A number that hangs on this product of every layer."""
    pairs, total, products = grouped_grad.sort(rows["picks"], E), 0.0, grouped_grad.TRITON
    for gate_up, down in layers:
        wide = gate_up.reshape(E, D, 2 * M)
        if name == "outer":
            found = products.outer(rows["x"], rows["both"], pairs, tokens="left")[0]
        elif name == "gate_up":
            found = products.times(rows["x"], wide, pairs, tokens=True)
        elif name == "down":
            found = products.times(rows["hidden"], down, pairs, scatter=True)
        elif name == "down turned":
            found = products.times(rows["change"], down, pairs, tokens=True, turned=True)
        else:
            found = products.times(rows["both"], wide, pairs, turned=True, scatter=True)
        total += found[0, 0].astype(jnp.float32)
    return jnp.asarray(total)


def layer(back: bool, rows: dict[str, jax.Array], layers: Layers) -> jax.Array:
    """Layers behind one another, or each one's gradients of tokens and factors."""
    x, serve = rows["x"], partial(choose.experts, kernel="experts:grouped")
    for gate_up, down in layers:

        def run(x: jax.Array, factors: jax.Array, gate_up: Any = gate_up, down: Any = down) -> Any:
            return serve(x, gate_up, down, rows["picks"], factors)

        found, pull = jax.vjp(run, x, rows["factors"])
        x = (0.5 * x + 0.3 * found).astype(x.dtype)
        if back:
            x = (x + 0.1 * pull(rows["change"])[0]).astype(x.dtype)
    return x


def attend(name: str, rows: dict[str, jax.Array], _: Layers) -> tuple[jax.Array, ...]:
    """Attention of one row in two streams, and its gradients."""
    T = len(rows["x"])
    positions = jnp.tile(jnp.arange(T // 2), 2)[None]
    seen = Mask(jnp.ones((1, T), bool), kind="two_stream", size=32).resolve(positions)
    pile = rows["both"].reshape(T, -1, HEAD_DIM)
    cuts = jnp.split(pile, (HEADS, HEADS + KV_HEADS, HEADS + 2 * KV_HEADS), axis=1)
    q, k, v, rest = (cut[None] for cut in cuts)
    run = partial(choose.attention, visible=seen, kernel=f"attention:{name}")
    found, pull = jax.vjp(run, q, k, v)
    return found, *pull(rest[:, :, :HEADS])


def milliseconds(run: Callable[..., Any], config: TilesConfig, *arrays: Any) -> float | str:
    """The median of several runs; the first line of the error where there is one."""
    try:
        program = jax.jit(run).lower(*arrays).compile()
    except Exception as error:
        return str(error).splitlines()[0][:200]
    spent = []
    for _ in range(config.repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        spent.append(time.perf_counter() - start)
    return 1e3 * statistics.median(spent[1:])


def main(config: TilesConfig) -> None:
    """Measures everything, a row at a time, and writes all rows."""
    rows, layers = draw(config)
    found: list[dict[str, Any]] = []

    def add(run: Callable[..., Any], count: int, row: dict[str, Any]) -> None:
        spent = milliseconds(run, config, rows, layers)
        row["ms"] = spent / count if isinstance(spent, float) else spent
        if isinstance(spent, float) and row["what"] in OPERATIONS:
            work = 2 * config.tokens * P * D * M * OPERATIONS[row["what"]]
            row["tflops"] = work * count / spent / 1e9
        found.append(row)
        print(row, flush=True)

    served = grouped_grad.STRAIGHT, grouped_grad.TURNED, grouped_grad.OUTER
    for back, what in ((False, "layer"), (True, "layer and gradients")):
        add(partial(layer, back), config.layers, {"what": what})
    for name in ("cudnn", "xla"):
        add(partial(attend, name), 1, {"what": "attention and gradients", "name": name})
    for what in OPERATIONS:
        for tiles in OUTER if what == "outer" else TIMES:
            grouped_grad.STRAIGHT = grouped_grad.TURNED = grouped_grad.OUTER = tiles
            add(partial(product, what), config.layers, {"what": what, "tiles": tuple(tiles)})
    grouped_grad.STRAIGHT, grouped_grad.TURNED, grouped_grad.OUTER = served
    facts = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jax-triton", "triton")},
        "command": " ".join(["python experiments/training_tiles.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "rows": found,
    }
    files.write_json(config.output, facts)


if __name__ == "__main__":
    cli.run(main, TilesConfig, "python experiments/training_tiles.py")
