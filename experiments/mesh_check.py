"""A block step on one and on two GPUs: data parallel, tensor parallel, XLA's and NCCL's settings.

python experiments/mesh_check.py output=experiments/results/mesh_check.json

The weights are cheap to make; the number of steps is fixed, so their values do not matter. A case
runs one compiled loop with many and with few masks: the difference is block steps alone.
"""

import dataclasses
import datetime
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# NVLink multicast stays off: it can put a shared host's GPUs out of service.
os.environ["NCCL_NVLS_ENABLE"] = "0"
# The processes of the settings need memory beside this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from jdllm import DecodeConfig  # noqa: E402
from jdllm.decode import Request, decode  # noqa: E402
from jdllm.load import compute_dtype, weight_bytes  # noqa: E402
from jdllm.model.config import NAMED, ModelConfig  # noqa: E402
from jdllm.model.model import Model, abstract, assemble, named  # noqa: E402
from jdllm.parity import make_setup  # noqa: E402
from jdllm.runtime import cli, sharding  # noqa: E402
from jdllm.store import checkpoint  # noqa: E402

# mesh, rows: the first of each pair is the other's measure
CASES = (("1x1", 1), ("1x1", 8), ("1x2", 1), ("1x2", 8), ("2x1", 2), ("2x1", 16))
# name -> XLA flags and environment of a process of its own, on ("1x2", 1 row)
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("", {}),
    "one-shot all-reduce": ("--xla_gpu_unsupported_use_all_reduce_one_shot_kernel=true", {}),
    "collectives in command buffers": ("--xla_gpu_enable_command_buffer=+COLLECTIVES", {}),
    "no async all-reduce": ("--xla_gpu_disable_async_collectives=ALLREDUCE", {}),
    "NCCL low latency": ("", {"NCCL_PROTO": "LL"}),
}
WAIT = 100  # seconds for the process of a setting


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Timings on meshes of up to two devices."""

    output: Path
    model: str = "llada-8b"
    """A named configuration."""
    prompt_length: int = 448
    gen_length: int = 64
    block_length: int = 32
    repeats: int = 5
    """Timed runs of each case, of which the median counts."""
    variants: bool = True
    """Run the XLA and NCCL settings, each in a process of its own."""
    variant: str = ""
    """Run this one of them only, on two devices; what the others start."""
    minutes: float = 6.0
    """No further case or setting starts after this long; what is left out is listed."""

    def __post_init__(self):
        if self.model not in NAMED:
            raise ValueError(f"model={self.model} must be one of {', '.join(NAMED)}")
        if self.variant and self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant} must be one of {', '.join(VARIANTS)}")


def cheap_weights(config: ModelConfig, mesh: jax.sharding.Mesh) -> Model:
    """A model whose weights are waves of the right size: one small program per shape."""
    leaves = named(abstract(config))
    places = checkpoint.placements(config, mesh)

    @functools.cache
    def maker(shape: tuple[int, ...], dtype: Any, place: NamedSharding) -> Any:
        def wave() -> jax.Array:
            index = sum(
                jax.lax.broadcasted_iota(jnp.float32, shape, axis) * (0.7 + 0.31 * axis)
                for axis in range(len(shape))
            )
            return (jnp.sin(index) / config.embed**0.5).astype(dtype)

        return jax.jit(wave, out_shardings=place)

    arrays = {n: maker(leaf.shape, leaf.dtype, places[n])() for n, leaf in leaves.items()}
    return assemble(config, arrays, mesh)


def request(config: ModelConfig, options: MeshConfig, mesh: Any, rows: int, masks: int) -> Request:
    """Rows whose blocks hold `masks` masks each; the other columns are filled from the start."""
    shape = rows, options.prompt_length + options.gen_length
    tokens = np.random.default_rng(0).integers(0, config.vocab - 200, shape).astype(np.int32)
    columns = np.arange(options.gen_length) % options.block_length < masks
    tokens[:, options.prompt_length :][:, columns] = config.mask_id
    lengths = np.full(rows, options.prompt_length, np.int32)
    keys = jax.random.split(jax.random.key(0), rows)
    parts = (tokens, lengths, keys, np.zeros(rows, bool))
    return Request(*jax.device_put(parts, sharding.by_row(mesh)))


def median_seconds(run: Any, repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def measure(options: MeshConfig, model: Model, rows: int, trace: Path | None) -> dict:
    """One case: milliseconds per block step and an opening pass, rates, memory."""
    config, mesh = model.config, model.mesh
    wanted = DecodeConfig(
        gen_length=options.gen_length,
        block_length=options.block_length,
        rule="quota",
        cache="dual",
        stop="none",
    ).resolve()
    full = request(config, options, mesh, rows, options.block_length)
    few = request(config, options, mesh, rows, 2)
    start = time.perf_counter()
    program = decode.lower(model, full, make_setup(wanted, config)).compile()
    compiled = time.perf_counter() - start

    def run(asked: Request) -> Any:
        return jax.block_until_ready(program(model, asked))

    seconds, less = (median_seconds(lambda r=r: run(r), options.repeats) for r in (full, few))
    forwards, fewer = int(run(full).forwards), int(run(few).forwards)
    step = (seconds - less) / (forwards - fewer)
    blocks = options.gen_length // options.block_length
    memory = program.memory_analysis()
    profile = {} if trace is None else {"profile": profiled(lambda: run(full), trace)}
    return {
        "mesh": "{data}x{model}".format(**mesh.shape),
        "rows": rows,
        "ms_per_block_step": 1e3 * step,
        "ms_per_opening_pass": 1e3 * (seconds - (forwards - blocks) * step) / blocks,
        "forwards": forwards,
        "forwards_per_second": forwards / seconds,
        "tokens_per_second": rows * options.gen_length / seconds,
        "weight_gigabytes_a_device": weight_bytes(config, mesh) / 1e9,
        "temporary_gigabytes_a_device": memory.temp_size_in_bytes / 1e9 if memory else None,
        "peak_gigabytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
        "compile_seconds": compiled,
    } | profile


def all_reduce_microseconds(config: ModelConfig, block_length: int) -> dict[str, float]:
    """Time of one all-reduce of the activations of 1, 8 and 64 rows, over two devices in a loop."""
    mesh, found = sharding.parse_mesh("1x2"), {}
    count = 100

    def again(_: Any, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "model") * jnp.asarray(0.5, x.dtype)

    def body(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, again, x)

    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    for rows in (1, 8, 64):
        x = jnp.ones(rows * block_length * config.embed, config.dtype)
        x = jax.device_put(x, sharding.replicated(mesh))
        seconds = median_seconds(functools.partial(lambda y: jax.block_until_ready(run(y)), x), 5)
        found[f"{x.nbytes} bytes"] = 1e6 * seconds / count
    return found


def profiled(run: Any, folder: Path) -> dict[str, Any]:
    """Where the time of a run goes; what the profiler says if it cannot."""
    try:
        with jax.profiler.trace(str(folder)):
            run()
        return where_time_goes(folder)
    except (RuntimeError, OSError, ValueError) as error:
        return {"error": str(error)[:500]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def where_time_goes(folder: Path, top: int = 12) -> dict[str, Any]:
    """Milliseconds of a device's streams by kind of kernel, and the longest kernels by name."""
    kinds: dict[str, float] = {}
    names: dict[str, float] = {}
    seen: list[str] = []
    for path in folder.rglob("*.xplane.pb"):
        data = jax.profiler.ProfileData.from_file(str(path))
        for plane in data.planes:
            seen.append(plane.name)
            if not plane.name.startswith("/device:GPU:0"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    spent = event.duration_ns / 1e6
                    names[event.name] = names.get(event.name, 0) + spent
                    kinds[kind_of(event.name)] = kinds.get(kind_of(event.name), 0) + spent
    longest = dict(sorted(names.items(), key=lambda item: -item[1])[:top])
    return {"planes": seen, "milliseconds_by_kind": kinds, "longest": longest}


def kind_of(kernel: str) -> str:
    """A kernel's kind by its name."""
    marks = {
        "all-reduce": ("nccl", "allreduce", "all_reduce", "all-reduce"),
        "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma"),
        "copies": ("memcpy", "memset", "copy", "transpose"),
    }
    lower = kernel.lower()
    return next((kind for kind, words in marks.items() if any(w in lower for w in words)), "others")


def efficiencies(rows: list[dict]) -> dict[str, float]:
    """Speed-ups over one device: the same rows split over two, and twice the rows."""
    step = {(row["mesh"], row["rows"]): row["ms_per_block_step"] for row in rows}
    rate = {(row["mesh"], row["rows"]): row["tokens_per_second"] for row in rows}
    found = {}
    for count in (1, 8):
        if {("1x1", count), ("1x2", count)} <= step.keys():
            speedup = step["1x1", count] / step["1x2", count]
            found[f"tensor parallel, {count} rows, of the ideal 2"] = speedup
        if {("1x1", count), ("2x1", 2 * count)} <= rate.keys():
            gain = rate["2x1", 2 * count] / rate["1x1", count]
            found[f"data parallel, {count} rows per device, of the ideal 2"] = gain
    return found


def run_variant(options: MeshConfig, name: str) -> dict[str, Any]:
    """A setting in a process of its own; an error, such as an unknown flag, is a result too."""
    flags, environment = VARIANTS[name]
    words = [f"{f.name}={getattr(options, f.name)}" for f in dataclasses.fields(options)]
    words = [w for w in words if not w.startswith(("variant=", "variants=", "output="))]
    target = options.output.with_suffix(f".{list(VARIANTS).index(name)}.tmp")
    command = [sys.executable, __file__, *words, f"variant={name}", f"output={target}"]
    merged = dict(os.environ, **environment)
    merged["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    try:
        run = subprocess.run(command, env=merged, capture_output=True, text=True, timeout=WAIT)
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {WAIT} s"}
    if run.returncode or not target.exists():
        lines = run.stderr.strip().splitlines() or ["no message"]
        telling = [x for x in lines if re.search("error|unknown|not", x, re.IGNORECASE)]
        return {"error": (telling or lines)[0][:500]}
    found = json.loads(target.read_text())
    target.unlink()
    return found | {"flags": flags, "environment": environment}


def one_variant(options: MeshConfig) -> dict[str, Any]:
    """What a process of `run_variant` does."""
    config = named_config(options)
    row = measure(options, cheap_weights(config, sharding.parse_mesh("1x2")), 1, None)
    sums = all_reduce_microseconds(config, options.block_length)
    return {"ms_per_block_step": row["ms_per_block_step"], "all_reduce_microseconds": sums}


def named_config(options: MeshConfig) -> ModelConfig:
    """The model in the dtype of this machine: bfloat16 on GPUs, float32 on a CPU."""
    config = NAMED[options.model]
    return dataclasses.replace(config, dtype=compute_dtype("auto", config.dtype))


def facts(options: MeshConfig) -> dict[str, Any]:
    """What was measured on what."""
    words = [f"{f.name}={getattr(options, f.name)}" for f in dataclasses.fields(options)]
    return {
        "command": f"python experiments/mesh_check.py {' '.join(words)}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "nvlink_multicast": os.environ["NCCL_NVLS_ENABLE"] != "0",
        "rows": [],
        "left_out": [],
    }


def main(options: MeshConfig) -> None:
    """Runs every case, then every setting, and writes the file after each."""
    start, trace = time.perf_counter(), options.output.with_suffix(".trace")
    if jax.device_count() < 2:
        raise ValueError("this needs two devices, but there is one; run it on two GPUs")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.variant:
        options.output.write_text(json.dumps(one_variant(options)))
        return
    found, config = facts(options), named_config(options)

    def late() -> bool:
        return time.perf_counter() - start > 60 * options.minutes

    def save() -> None:
        found["minutes"] = (time.perf_counter() - start) / 60
        options.output.write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps(found, indent=2), flush=True)

    for mesh_text in dict.fromkeys(mesh for mesh, _ in CASES):
        model = None
        for rows in (rows for mesh, rows in CASES if mesh == mesh_text):
            if late():
                found["left_out"].append(f"{mesh_text} rows={rows}")
                continue
            model = model or cheap_weights(config, sharding.parse_mesh(mesh_text))
            watched = trace if rows == 1 else None
            found["rows"].append(measure(options, model, rows, watched))
            save()
        del model  # before the next mesh's weights are made
    found["efficiency"] = efficiencies(found["rows"])
    if not late():
        found["all_reduce_microseconds"] = all_reduce_microseconds(config, options.block_length)
    for name in VARIANTS if options.variants else ():
        if late():
            found["left_out"].append(name)
            continue
        found.setdefault("variants", {})[name] = run_variant(options, name)
        save()
    save()


if __name__ == "__main__":
    cli.run(main, MeshConfig, "python experiments/mesh_check.py")
