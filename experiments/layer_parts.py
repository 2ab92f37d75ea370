"""What the small kernels of a layer and the head cost: whole steps, by choice of kernels.

python experiments/layer_parts.py output=FILE                       (about four minutes, one GPU)
python experiments/layer_parts.py output=FILE model=random:llada2-mini rows=1 profile=True \
  kernels=auto/norm:fused/rotary:reference
XLA_FLAGS=--xla_gpu_enable_command_buffer=+CUDNN python experiments/layer_parts.py \
  output=FILE kernels=auto                              (the host turns the loop)

A step is a call of the model for one block of every row, over a cache, and the head; steps run in
one loop on the device, and the time of one is that of many more, divided. With profile=True the
dearest kernels of each choice are told. The head is also measured alone, by rows.
"""

import contextlib
import dataclasses
import datetime
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from gpu_loop import held

from jdllm.llm import LLM
from jdllm.load import enable_compilation_cache
from jdllm.model.cache import Cache
from jdllm.model.head import Special, best
from jdllm.model.mask import Mask
from jdllm.model.model import Model
from jdllm.runtime import cli, files, profiling, sharding
from jdllm.runtime.programs import LOOPS

OURS = ("norm:reference", "rotary:reference", "mlp:reference", "closing:reference")
KERNELS = (",".join(("attention:xla", *OURS)), "attention:xla", *OURS, "auto", "head:fused")


@dataclasses.dataclass(frozen=True)
class PartsConfig:
    """What is measured."""

    output: Path
    model: str = "random:llada-8b"
    weights: Literal["bf16", "int8", "fp8"] = "bf16"
    """How the layers' linear maps are held."""
    kernels: str = "/".join(KERNELS)
    """What `kernel=` says, several with / between them; what it does not name is chosen."""
    rows: tuple[int, ...] = (1, 8)
    columns: int = 1024
    block: int = 32
    steps: int = 40
    repeats: int = 3
    profile: bool = False
    """Whether the dearest kernels are told of the first number of rows."""
    head_rows: tuple[int, ...] = (32, 64, 256, 1024)
    """Rows of the head alone; none leaves it out."""
    head_width: int = 4096
    head_vocab: int = 126464


@partial(jax.jit, donate_argnums=(2,), compiler_options=LOOPS)
def steps(model: Model, tokens_BT: jax.Array, cache: Cache, count: jax.Array) -> Any:
    """So many calls for the last block, each of the tokens that the one before thinks best."""
    (B, T), S = tokens_BT.shape, cache.length
    positions_BT = jnp.broadcast_to(jnp.arange(S - T, S), (B, T))
    mask = Mask.of(model.config, jnp.full((B,), S, jnp.int32))

    def one(_: Any, carry: Any) -> Any:
        tokens_BT, cache, total = carry
        with jax.named_scope("step"):
            found = model(model.embed(tokens_BT), positions_BT, mask, cache)
            chosen = model.best(found.hidden, Special(excluded=(model.config.mask_id,)))
        return chosen.ids, found.cache, total + chosen.odds

    return jax.lax.fori_loop(0, count, one, (tokens_BT, cache, jnp.zeros((B, T))))


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Wall time of one run, after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def step_row(model: Model, rows: int, config: PartsConfig) -> dict[str, Any]:
    """Milliseconds of a step, and the tokens that the last one chose."""
    tokens = jnp.arange(rows * config.block, dtype=jnp.int32).reshape(rows, config.block)
    held = [jax.tree.map(jnp.ones_like, model.empty_cache(rows, config.columns))]

    def run(count: int) -> Any:
        found = steps(model, tokens, held.pop(), jnp.int32(count))
        held.append(found[1])
        return found[0], found[2]

    start = time.perf_counter()
    first, odds = jax.block_until_ready(run(1))
    compiled = time.perf_counter() - start
    few, many = (median_seconds(partial(run, n), config.repeats) for n in (1, 1 + config.steps))
    row = {"rows": rows, "kernel": model.kernel, "ms": 1e3 * (many - few) / config.steps}
    row |= {"compile_s": compiled, "tokens": first.ravel()[:8].tolist()}
    row["odds"] = float(jnp.mean(odds))
    if config.profile and rows == config.rows[0]:
        row |= dearest(partial(run, config.steps), config.steps)
    return row


def dearest(run: Callable[[], Any], steps: int, many: int = 30) -> dict[str, Any]:
    """The dearest kernels of a run, microseconds and starts per step; some in their order."""
    with tempfile.TemporaryDirectory() as folder:
        with profiling.recording(Path(folder)):
            jax.block_until_ready(run())
        devices = profiling.read(Path(folder))
    found, events = profiling.profile(devices), [one for own in devices.values() for one in own]

    def row(kernel: str, seconds: float, calls: int) -> dict[str, Any]:
        return {"kernel": kernel, "us": 1e6 * seconds / steps, "starts": calls / steps}

    whole = row("all", sum(one.seconds for one in events), len(events))
    rows = [row(one.name, one.seconds, one.calls) for one in found.kernels[:many]]
    middle = events[len(events) // 2 :][:many]
    order = [
        {
            "kernel": one.name,
            "us": 1e6 * one.seconds,
            "after_us": 1e6 * (one.start - before.start - before.seconds),
        }
        for before, one in itertools.pairwise(middle)
    ]
    return {"dearest": [whole, *rows], "in_order": order}


def head_row(rows: int, config: PartsConfig, kernel: str) -> dict[str, Any]:
    """Microseconds of the head alone, each search of hidden states that wait for the one before."""
    D, V = config.head_width, config.head_vocab
    hidden = jax.random.normal(jax.random.key(0), (1, rows, D), jnp.bfloat16)
    heads = [jax.random.normal(jax.random.key(i), (D, V), jnp.bfloat16) * D**-0.5 for i in range(2)]

    @jax.jit
    def run(hidden: jax.Array, heads: list[jax.Array], count: jax.Array) -> Any:
        def one(_: Any, carry: Any) -> Any:
            hidden, _ = carry
            for head in heads:
                found = best(hidden, head, Special(excluded=(5,)), kernel=kernel)
                hidden = hidden + (found.odds[..., None] * 1e-3).astype(hidden.dtype)
            return hidden, found

        nothing = best(hidden, heads[0][:, :128])
        return jax.lax.fori_loop(0, count, one, (hidden, nothing))[1]

    few, many = (
        median_seconds(partial(run, hidden, heads, jnp.int32(n)), config.repeats) for n in (1, 11)
    )
    ours = jax.jit(partial(best, kernel=kernel))(hidden, heads[0])
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(best)(*(x.astype(jnp.float32) for x in (hidden, heads[0])))
    row: dict[str, Any] = {"head_rows": rows, "kernel": kernel, "us": 1e6 * (many - few) / 20}
    row["same_ids"] = float(jnp.mean(ours.ids == exact.ids))
    for name in ("score", "rest", "second"):
        wrong = jnp.abs(getattr(ours, name) - getattr(exact, name))
        row[f"error_{name}"] = float(jnp.max(wrong))
    return row


def versions(*names: str) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main(config: PartsConfig) -> None:
    """Measures everything, and writes the file anew after each row."""
    enable_compilation_cache()
    facts: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": versions("jax", "jaxlib", "jax-triton", "triton"),
        "command": " ".join(["python experiments/layer_parts.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "rows": [],
    }

    def measured(what: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
        try:
            row = run()
        except Exception as error:  # one that fails says why; the others go on
            row = what | {"failed": str(error)[:300]}
        facts["rows"].append(row)
        files.write_json(config.output, facts)
        short = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print({k: v for k, v in short.items() if k not in ("dearest", "in_order")}, flush=True)
        for name in ("dearest", "in_order"):
            for one in row.get(name, ()):
                print(
                    "   ", {k: round(v, 2) if isinstance(v, float) else v for k, v in one.items()}
                )

    for rows in config.head_rows:
        for kernel in ("head:reference", "head:fused"):
            what = {"head_rows": rows, "kernel": kernel}
            measured(what, partial(head_row, rows, config, kernel))
    llm = LLM.load(config.model, sharding.parse_mesh("1x1"))
    model = held(llm, config.weights).model
    del llm
    for rows in config.rows:
        for kernel in config.kernels.split("/"):
            forced = dataclasses.replace(model, kernel=kernel)
            what = {"rows": rows, "kernel": kernel}
            measured(what, partial(step_row, forced, rows, config))


if __name__ == "__main__":
    cli.run(main, PartsConfig, "python experiments/layer_parts.py")
