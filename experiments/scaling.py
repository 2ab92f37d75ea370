"""One host's devices against one of them: decoding, requests, LoRA, experts, restores, the engine.

python experiments/scaling.py                     (appends rows to results/scaling.jsonl)
python experiments/scaling.py seconds=250 rows=1,8 parts=step,requests,lora
JAX_NUM_CPU_DEVICES=4 python experiments/scaling.py output=FILE model=tiny experts=tiny-experts \
  lora=tiny prompt=32 gen_length=32 block=8 repeats=1

step: a block step, from requests that differ in the number of masks alone. requests: completions
end to end, from ids to ids. lora: steps of training. moe: block steps of a model with experts.
restore: a random checkpoint from the local disk. engine: requests that come and go. Weights are
random, every step takes one token. Programs of a mesh compile side by side, before anything is
timed; what has not begun when `seconds` are over is named as not run.
"""

import concurrent.futures
import datetime
import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mesh_check  # noqa: F401  first: it keeps NVLink multicast off

# isort: split
import jax
import scaling_tables
from lora_speed import attempt
from scaling_parts import GROUPS, TASKS, ScalingConfig, restore_row, shape
from scaling_tables import applies

from jdllm.llm import LLM
from jdllm.load import enable_compilation_cache
from jdllm.model.config import ModelConfig
from jdllm.runtime import cli, sharding
from jdllm.store.checkpoint import random_model, save_model


class Compiling:
    """Seconds that JAX spends on making programs, by what it does, summed over threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        kind = event.rpartition("/")[2].removesuffix("_duration")
        if event.startswith("/jax/core/compile/"):
            self.seconds[kind] += duration_secs
            self.seconds[f"{kind}_calls"] += 1


class Run:
    """Where rows go, and what they have in common."""

    def __init__(self, config: ScalingConfig):
        self.config, self.start = config, time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.compiling, self.ready = Compiling(), {}
        words = [word for word in sys.argv[1:] if not word.startswith("output=")]
        self.facts = {
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "platform": jax.default_backend(),
            "nvlink_multicast": os.environ["NCCL_NVLS_ENABLE"] != "0",
            "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
            "command": " ".join(["python experiments/scaling.py", *words]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def late(self) -> bool:
        return self.elapsed() >= self.config.seconds

    def add(self, part: str, mesh: str, rows: int, work: Callable[[], dict[str, Any]]) -> None:
        """Measures a row, unless it is late, and appends it; one that fails says why."""
        name, facts = shape(self.config, GROUPS[part])
        row: dict[str, Any] = {"part": part, "mesh": mesh, "rows": rows, "model": name}
        row |= {"layers": facts.layers, "dtype": facts.dtype}
        if self.late():
            row["not_run"] = f"seconds={self.config.seconds:g} were over"
        else:
            try:
                row |= work()
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        row |= {"host_peak_gb": peak, "at_seconds": self.elapsed(), "ready": self.ready}
        self.rows.append(row | self.facts)
        self.config.output.parent.mkdir(parents=True, exist_ok=True)
        with self.config.output.open("a") as file:
            file.write(json.dumps(row | self.facts) + "\n")
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        shown.pop("ready")
        print(shown, flush=True)


def given(found: Any) -> Any:
    """What `attempt` found, unless that is an error, which is raised."""
    if isinstance(found, Exception):
        raise found
    return found


def measure(run: Run, mesh: str, parts: list[str]) -> None:
    """Every row of some parts, which share a model, on one mesh."""
    config = run.config
    before, begun = dict(run.compiling.seconds), run.elapsed()
    llm: Any = None if run.late() else attempt(load)((config, mesh, parts[0]))
    loaded = run.elapsed()
    tasks: dict[str, Any] = {
        part: attempt(lambda part: list(TASKS[part](given(llm), part, config)))(part)
        for part in parts * (llm is not None)
    }
    programs: dict[Any, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for task in (task for found in tasks.values() if isinstance(found, list) for task in found):
            if task.key not in programs:
                programs[task.key] = pool.submit(attempt(lambda make: make()), task.compile)
    run.ready = {"weights": loaded - begun, "programs": run.elapsed() - loaded}
    run.ready |= {
        kind: spent - before.get(kind, 0) for kind, spent in run.compiling.seconds.items()
    }
    for part in parts:
        for number, rows in enumerate(config.rows_of(part)):

            def work(part: str = part, number: int = number) -> dict[str, Any]:
                task = given(tasks[part])[number]
                return task.run(given(programs[task.key].result()))

            run.add(part, mesh, rows, work)


def load(wanted: tuple[ScalingConfig, str, str]) -> LLM:
    """The model of a part, random, on a mesh."""
    config, mesh, part = wanted
    facts = shape(config, GROUPS[part])[1]
    model = jax.block_until_ready(random_model(facts, sharding.parse_mesh(mesh)))
    return LLM(model, None, engine="off")


def restores(run: Run) -> None:
    """A checkpoint is saved once, and restored on every mesh."""
    facts = shape(run.config, "restore")[1]
    with tempfile.TemporaryDirectory() as folder:
        saved: Any = None

        def work(mesh: str) -> dict[str, Any]:
            nonlocal saved
            saved = saved or attempt(save)((facts, Path(folder)))
            return restore_row(Path(folder), sharding.parse_mesh(mesh), given(saved))

        for mesh in run.config.mesh_texts:
            run.add("restore", mesh, 0, partial(work, mesh))
            gc.collect()


def save(wanted: tuple[ModelConfig, Path]) -> float:
    """Seconds that the saving of a random model takes."""
    facts, folder = wanted
    model = jax.block_until_ready(random_model(facts, sharding.parse_mesh("1x1")))
    start = time.perf_counter()
    save_model(folder, model)
    return time.perf_counter() - start


def main(config: ScalingConfig) -> None:
    """Measures everything that is asked for, and prints what was found."""
    enable_compilation_cache()
    run, asked = Run(config), config.parts.split(",")
    for group in dict.fromkeys(GROUPS[part] for part in asked):
        if group == "restore":
            restores(run)
            continue
        for mesh in config.mesh_texts:
            parts = [part for part in asked if GROUPS[part] == group and applies(part, mesh)]
            if parts:
                measure(run, mesh, parts)
            gc.collect()  # before the next mesh's weights are made
    print("\n\n".join(scaling_tables.tables(run.rows).values()))


if __name__ == "__main__":
    cli.run(main, ScalingConfig, "python experiments/scaling.py")
