"""Our loop beside PyTorch and tokamax on one card, in one run: a table.

python experiments/bench_peers.py output=experiments/results/bench_peers.json  (ten minutes, a GPU)
python experiments/bench_peers.py output=FILE parts=ours,torch models=llada-8b

Rows: a block step of LLaDA-8B's and LLaDA2-mini's shapes with random weights, 1024 columns, block
32, in our loop (gpu_loop.py), in PyTorch eager and compiled under a CUDA graph (torch_step.py); and
the experts of one layer of LLaDA2-mini, ours and tokamax's ragged product, as it comes and at the
best of several tiles. Every peer runs in a process of its own, one after the other, and one that
cannot run says why. The floor is the time in
which the memory of this card, by its measured copy rate, moves what the step must read.
"""

import dataclasses
import datetime
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the scripts beside this one

from jdllm.runtime import cli, files  # noqa: E402

# Of tokamax's Mosaic kernel for 16-bit numbers on Hopper, whose matrix units take 64 rows or more:
# fewer are in its own search, and here to show that they do not compile. Loads in flight are as
# many as shared memory holds.
TOKAMAX = [
    {"block_m": rows, "block_n": 64, "block_k": inner, "num_stages": stages, "split_k": 1}
    | {"persistent": persistent, "grid_minor_dim": minor}
    for rows, inner, stages in (
        *((16, 128, 4), (32, 128, 4)),
        *((64, 64, 6), (64, 128, 2), (64, 128, 4), (64, 256, 2)),
    )
    for persistent in (True, False)
    for minor in ("M", "N")
]
CACHES = {"llada2-mini": "block"}  # of our loop; every other model has the dual cache


@dataclasses.dataclass(frozen=True)
class PeersConfig:
    """Our loop beside its peers."""

    output: Path
    parts: str = "ours,torch,experts"
    models: str = "llada-8b:1+8,llada2-mini:1"
    """Shapes, and numbers of rows behind a colon."""
    kernel: str = "auto"
    """What ours are computed with, as of kernel= elsewhere."""
    columns: int = 1024
    block: int = 32
    expert_tokens: tuple[int, ...] = (32, 128)
    repeats: int = 3
    copy_megabytes: int = 2048
    timeout: float = 400.0
    """Seconds that one process may take."""
    here: bool = False
    """Measure in this process: what the others are started with."""

    def __post_init__(self):
        if unknown := set(self.parts.split(",")) - set(PARTS):
            raise ValueError(f"parts={unknown.pop()} is none of {', '.join(PARTS)}")
        self.cases  # noqa: B018 - says what is wrong

    @property
    def cases(self) -> list[tuple[str, tuple[int, ...]]]:
        """The models, each with its numbers of rows."""
        found = []
        for word in self.models.split(","):
            name, _, rows = word.partition(":")
            if not all(one.isdigit() and int(one) for one in (rows or "1").split("+")):
                raise ValueError(f"models={word} must be a name such as llada-8b:1+8")
            found.append((name, tuple(map(int, (rows or "1").split("+")))))
        return found


def ours(config: PeersConfig) -> list[dict[str, Any]]:
    """A step of our loop, by model and rows; the first row also tells the copy rate."""
    import gpu_loop
    import jax

    from jdllm.load import enable_compilation_cache

    enable_compilation_cache()
    rate, found = gpu_loop.copy_rate(config.copy_megabytes, config.repeats), []
    facts = {"device": jax.devices()[0].device_kind, "versions": versions("jax", "jaxlib")}
    for model, batches in config.cases:
        loop = gpu_loop.LoopConfig(
            model=f"random:{model}",
            cache=CACHES.get(model, "dual"),
            positions=config.columns,
            block=config.block,
            gen_length=32,
            repeats=config.repeats,
        )
        llm = gpu_loop.load(loop)
        forced = dataclasses.replace(llm.model, kernel=config.kernel)
        llm = gpu_loop.LLM(forced, None, llm.defaults, engine="off")
        for rows in batches:
            row = {"name": "jdllm loop", "model": model, "rows": rows, "copy_rate": rate} | facts
            row["kernel"] = config.kernel
            try:
                told = gpu_loop.step_row(llm, rows, loop, rate)
                row |= {"ms": told["ms_per_step"], "floor_ms": told["floor_ms"]}
                row["compile_seconds"] = told["compile_seconds"]
            except Exception as error:
                row["reason"] = f"{type(error).__name__}: {str(error)[:300]}"
            found.append(row)
        del llm
    return found


def torch_steps(config: PeersConfig) -> Iterator[list[dict[str, Any]]]:
    """PyTorch's steps; every model in a process of its own."""
    for model, rows in config.cases:
        words = [f"model={model}", f"rows={','.join(map(str, rows))}"]
        words += [f"{name}={getattr(config, name)}" for name in ("columns", "block", "repeats")]
        what = {"name": "torch", "model": model, "rows": rows[0]}
        yield started("torch_step.py", words, what, config.timeout)


def versions(*names: str) -> dict[str, str]:
    """Of packages that are installed."""
    return {name: version(name) for name in names}


def by_ragged_dot(ragged_dot: Callable[..., Any]) -> Callable[..., Any]:
    """The experts of a layer, over such a product; picks as our kernels take them."""
    import jax
    import jax.numpy as jnp

    def layer(x: Any, gate_up: Any, down: Any, picks: Any, weights: Any) -> Any:
        (E, D, C, M), P = gate_up.shape, picks.shape[1]
        order = jnp.argsort(picks.reshape(-1))
        sizes = jnp.bincount(picks.reshape(-1), length=E).astype(jnp.int32)
        wide = ragged_dot(x[order // P], gate_up.reshape(E, D, C * M), sizes)
        inner = jax.nn.silu(wide[:, :M]) * wide[:, M:]
        deep = ragged_dot(inner.astype(x.dtype), down, sizes)
        scaled = deep.astype(jnp.float32) * weights.reshape(-1)[order, None]
        return jnp.zeros(x.shape, jnp.float32).at[order // P].add(scaled).astype(x.dtype)

    return layer


def tokamax_layer() -> Callable[..., Any]:
    """With the tiles that tokamax chooses by itself."""
    return by_ragged_dot(importlib.import_module("tokamax").ragged_dot)


def tokamax_tiled(tiles: dict[str, Any]) -> Callable[..., Any]:
    """With these tiles of its Mosaic kernel for GPUs."""
    tokamax = importlib.import_module("tokamax")
    gpu = importlib.import_module("tokamax._src.ops.ragged_dot.pallas_mosaic_gpu")
    minor = getattr(gpu.common.MatmulDimension, tiles["grid_minor_dim"])
    own = gpu.PallasMosaicGpuRaggedDot(config=gpu.Config(**tiles | {"grid_minor_dim": minor}))
    return by_ragged_dot(partial(tokamax.ragged_dot, implementation=[own]))


def quickest(measure: Callable[[Any], float], tiles: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds with the best of several tiles, and each, best first, or the reason why it does
    not run; raises the last reason where none does."""
    tried: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    reason: Exception = ValueError("no tiles")
    for one in tiles:
        try:
            tried.append(one | {"ms": measure(tokamax_tiled(one))})
        except Exception as error:
            reason = error
            refused.append(one | {"reason": f"{type(error).__name__}: {str(error)[:300]}"})
    if not tried:
        raise reason
    tried.sort(key=lambda one: one["ms"])
    return {"ms": tried[0]["ms"], "tiles": tried + refused}


def experts(config: PeersConfig) -> list[dict[str, Any]]:
    """One layer's experts: ours, and tokamax's where it is installed."""
    import expert_tiles as tiles
    import gpu_loop
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jdllm.kernels.experts import grouped
    from jdllm.kernels.shapes import PUBLISHED_LAYERS

    rate = gpu_loop.copy_rate(config.copy_megabytes, config.repeats)
    setting = tiles.TilesConfig(config.output)
    facts = {"device": jax.devices()[0].device_kind, "versions": versions("jax", "jaxlib")}
    keys = jax.random.split(jax.random.key(0), setting.layers)
    shape = PUBLISHED_LAYERS[setting.model]
    E, D, M = shape.experts, shape.embed, shape.expert_mlp
    ups = [jax.random.normal(k, (E, D, 2, M), jnp.bfloat16) * D**-0.5 for k in keys]
    downs = [jax.random.normal(k, (E, M, D), jnp.bfloat16) * M**-0.5 for k in keys]

    ways: dict[str, Callable[[Callable[[Any], float]], dict[str, Any]]] = {
        "jdllm grouped experts": lambda measure: {"ms": measure(grouped.experts)},
        "tokamax ragged_dot": lambda measure: {"ms": measure(tokamax_layer())},
        "tokamax ragged_dot, best tiles": lambda measure: quickest(measure, TOKAMAX),
    }
    found = []
    for tokens in config.expert_tokens:
        x, picks, weights = tiles.inputs(tokens, setting.layers, shape)
        touched = len(np.unique(np.asarray(picks[0])))
        floor = 1e3 * touched * 3 * D * M * 2 / rate
        arrays = x, list(picks), list(weights), ups, downs

        def measure(layer: Any, arrays: Any = arrays) -> float:
            return tiles.milliseconds(layer, setting, *arrays)

        for name, run in ways.items():
            row = {"name": name, "model": "llada2-mini, experts of a layer", "rows": tokens}
            row |= facts | {"floor_ms": floor}
            try:
                row |= run(measure)
            except Exception as error:
                row["reason"] = f"{type(error).__name__}: {str(error)[:300]}"
            found.append(row)
    return found


def alone(part: str, config: PeersConfig) -> Iterator[list[dict[str, Any]]]:
    """This script once more, for one part."""
    passed = ("models", "kernel", "columns", "block", "repeats", "copy_megabytes", "timeout")
    words = [f"{name}={getattr(config, name)}" for name in passed]
    words += [f"expert_tokens={','.join(map(str, config.expert_tokens))}", "here=true"]
    what = {"name": part, "model": config.cases[0][0], "rows": 0}
    yield started(Path(__file__).name, [f"parts={part}", *words], what, config.timeout)


HERE_PARTS: dict[str, Callable[[PeersConfig], list[dict[str, Any]]]] = {
    "ours": ours,
    "experts": experts,
}
"""What this script measures itself."""
PARTS: dict[str, Callable[[PeersConfig], Iterator[list[dict[str, Any]]]]] = {
    "ours": partial(alone, "ours"),
    "torch": torch_steps,
    "experts": partial(alone, "experts"),
}
"""The rows of one process after the other."""


def started(
    script: str, words: list[str], what: dict[str, Any], timeout: float
) -> list[dict[str, Any]]:
    """The rows that a script writes; one with the reason where it ends without any."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / script), f"output={path}", *words]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
            said = (ran.stderr.strip() or ran.stdout.strip()).splitlines()[-1:]
        except subprocess.TimeoutExpired:
            said = [f"it did not end within {timeout:.0f} s"]
        rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return rows or [what | {"reason": said[0][-300:] if said else "it wrote nothing"}]


def joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with floor and ratio: that of our row of the same step, where one has none."""
    floors = {(row["model"], row["rows"]): row["floor_ms"] for row in rows if "floor_ms" in row}
    found = []
    for row in rows:
        floor = floors.get((row["model"], row["rows"]))
        more = {} if floor is None else {"floor_ms": floor}
        if floor is not None and "ms" in row:
            more["ratio"] = row["ms"] / floor
        found.append(row | more)
    return found


def shown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, sorted by step."""

    def number(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.2f}" if name in row else "-"

    names = ["what", "shape", "rows or tokens", "ms", "floor, ms", "times the floor", "note"]
    lines = [
        [
            row["name"], row["model"], str(row["rows"]),
            *(number(row, name) for name in ("ms", "floor_ms", "ratio")),
            row.get("reason", "").replace("|", "/").replace("\n", " ")[:120],
        ]
        for row in sorted(rows, key=lambda row: (row["model"], row["rows"]))
    ]  # fmt: skip
    head = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])


def main(config: PeersConfig) -> None:
    """Runs every part in processes of its own, and writes rows and table after each."""
    if config.here:
        files.write_json(config.output, HERE_PARTS[config.parts](config))
        return
    rows, about = [], {
        "command": " ".join(["python experiments/bench_peers.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    for part in config.parts.split(","):
        for found in PARTS[part](config):
            rows += [row | about for row in found]
            files.write_json(config.output, joined(rows))
            with files.atomic_file(config.output.with_suffix(".md")) as file:
                file.write(f"{shown(joined(rows))}\n".encode())
            print(f"{part}: {len(found)} rows", flush=True)
    print(f"\n{shown(joined(rows))}")


if __name__ == "__main__":
    cli.run(main, PeersConfig, "python experiments/bench_peers.py")
