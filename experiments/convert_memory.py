"""Measures how much host memory a conversion needs, and the restore after it.

python experiments/convert_memory.py
python experiments/convert_memory.py weights=int8 result=FILE

Writes a random LLaDA checkpoint of more than 1 GB whose embedding and head fill a shard each, which
is the hardest case, and converts it in a fresh process. Growth is peak resident memory, mapped
files included, over the value just before the first weight is read.
"""

import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jdllm.convert import llada
from jdllm.convert.commands import convert
from jdllm.convert.families import Source, open_source
from jdllm.convert.table import restore_sources
from jdllm.model.config import LLADA_8B, ModelConfig
from jdllm.runtime import cli, sharding
from jdllm.store import checkpoint

LIMIT = 1.15  # largest growth while converting, in shards
RESTORE_LIMIT = 1.2  # and while restoring, in models
RESULT = Path(__file__).parent / "results" / "convert_memory.json"


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Measures the memory of a conversion."""

    layers: int = 20
    """Layers of the random model; the default makes a checkpoint of 1.2 GB."""
    shard_bytes: int = 268_435_456
    """Largest size of one safetensors file."""
    weights: Literal["int8", "fp8"] | None = None
    """As `convert` takes it."""
    folder: Path | None = None
    """Where the checkpoints are written and removed again (default: the temporary folder)."""
    result: Path = RESULT
    """JSON file to write."""


class Peak:
    """Resident memory of this process over its value at `start`, in bytes."""

    def start(self) -> None:
        """Takes the baseline; what was allocated before does not count."""
        gc.collect()
        self._reset = _reset_high_water()
        self.base = self.highest = _status("VmRSS")
        self._running = True
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while self._running:
            self.highest = max(self.highest, _status("VmRSS"))
            time.sleep(0.002)

    def growth(self) -> int:
        """Stops, and returns the peak over the baseline."""
        self._running = False
        self._thread.join()
        marks = [self.highest] + ([_status("VmHWM")] if self._reset else [])
        return max(marks) - self.base


def _reset_high_water() -> bool:
    """Makes the kernel's high-water mark start again; False where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status lacks {key}: this script needs Linux")


def synthetic(layers: int) -> ModelConfig:
    """LLaDA with the published vocabulary and a quarter of the width: 259 MB of embedding."""
    return dataclasses.replace(LLADA_8B, layers=layers, embed=1024, heads=8, kv_heads=8, mlp=4096)


def write_checkpoint(folder: Path, config: ModelConfig, shard_bytes: int) -> None:
    """Writes random bfloat16 tensors, shard by shard; every bit pattern that is finite occurs."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(llada.hf_config(config)))
    weight_map: dict[str, str] = {}
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, name))
        pending.clear()

    rng = np.random.default_rng(0)
    for leaves in checkpoint.units(config).values():
        for name, leaf in leaves.items():
            bits = rng.integers(0, 1 << 16, leaf.shape, np.uint16) & np.uint16(0xBFFF)
            array = bits.view(ml_dtypes.bfloat16)
            for tensor, value in restore_sources(llada.FAMILY, config, {name: array}).items():
                held = sum(other.nbytes for other in pending.values())
                if pending and held + value.nbytes > shard_bytes:
                    flush()
                pending[tensor] = value
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure_convert(source: Path, output: Path, weights: Any = None) -> dict[str, float]:
    """Converts; the growth counts from the first read on."""
    peak = Peak()

    class Watched(Source):
        def units(self) -> Iterator[tuple[str, dict[str, checkpoint.LazyArray]]]:
            peak.start()
            yield from super().units()

    opened = open_source(source, "llada")
    start = time.perf_counter()
    convert(Watched(opened.family, opened.config, opened.shards), source, output, weights)
    return {"convert_growth": peak.growth(), "convert_seconds": time.perf_counter() - start}


def measure_restore(folder: Path) -> dict[str, float]:
    """Restores onto one device of this machine's default backend."""
    mesh = sharding.parse_mesh("1x1")
    jax.device_put(np.zeros(1), mesh.devices.flat[0]).block_until_ready()
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    model = checkpoint.restore_model(folder, mesh)
    jax.block_until_ready(model)
    return {"restore_growth": peak.growth(), "restore_seconds": time.perf_counter() - start}


def in_fresh_process(*words: object) -> dict[str, float]:
    """Runs this file's other half and reads the JSON on its last line."""
    command = [sys.executable, __file__, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(config: MemoryConfig) -> None:
    """Writes, converts, restores, prints a table and stores it; status 1 above the limit."""
    folder = Path(tempfile.mkdtemp(dir=config.folder))
    source, output = folder / "source", folder / "converted"
    try:
        model = synthetic(config.layers)
        write_checkpoint(source, model, config.shard_bytes)
        sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
        found: dict[str, float] = {"checkpoint_bytes": sum(sizes), "shards": len(sizes)}
        found["largest_shard"] = max(sizes)
        found |= in_fresh_process(
            "convert", source, output, *([config.weights] if config.weights else [])
        )
        found |= in_fresh_process("restore", output)
    finally:
        shutil.rmtree(folder)
    found["convert_ratio"] = found["convert_growth"] / found["largest_shard"]
    found["restore_ratio"] = found["restore_growth"] / found["checkpoint_bytes"]
    passed = found["convert_ratio"] <= LIMIT and found["restore_ratio"] <= RESTORE_LIMIT
    report(found, passed)
    config.result.parent.mkdir(parents=True, exist_ok=True)
    settings = {"layers": config.layers, "shard_bytes": config.shard_bytes}
    settings |= {"weights": config.weights} if config.weights else {}
    text = json.dumps(
        found
        | {"limit": LIMIT, "restore_limit": RESTORE_LIMIT, "passed": passed, "config": settings},
        indent=2,
    )
    config.result.write_text(text + "\n")
    if not passed:
        raise SystemExit(1)


def report(found: dict[str, float], passed: bool) -> None:
    """Prints the table, in megabytes."""
    megabytes = {
        "checkpoint": found["checkpoint_bytes"],
        "largest shard": found["largest_shard"],
        "limit (1.15 shards)": LIMIT * found["largest_shard"],
        "growth while converting": found["convert_growth"],
        "limit (1.2 models)": RESTORE_LIMIT * found["checkpoint_bytes"],
        "growth while restoring": found["restore_growth"],
    }
    for name, size in megabytes.items():
        print(f"{name:<26}{size / 1e6:>8.0f} MB")
    print(f"{'converting / shard':<26}{found['convert_ratio']:>8.2f}")
    print(f"{'restoring / model':<26}{found['restore_ratio']:>8.2f}")
    print("pass" if passed else "FAIL")


if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:
        print(json.dumps(measure_convert(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])))
    elif sys.argv[1:2] == ["restore"]:
        print(json.dumps(measure_restore(Path(sys.argv[2]))))
    else:
        main(cli.parse(MemoryConfig))
