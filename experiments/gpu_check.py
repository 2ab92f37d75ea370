"""What needs a GPU, in one call: golden runs in float32, the bundled model, memory
plans, a LLaDA-8B block step.

python experiments/gpu_check.py output=experiments/results/gpu_check.json
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdllm import DecodeConfig, cli, sharding
from jdllm.llm import LLM, bucket
from jdllm.memory_plan import Planner
from jdllm.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """GPU checks and timings."""

    output: Path
    model: str = "random:llada-8b"
    """The large model whose forwards are timed."""


def goldens() -> str:
    """The golden replay on this device; pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    environment = dict(os.environ, JAX_PLATFORMS="cuda", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    run = subprocess.run(
        [*command, "tests/test_goldens.py"],
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


def block_step(llm: LLM, rows: int, cache: Any) -> dict[str, Any]:
    """Milliseconds a forward at prompt 480, gen 64, block 32, one token a step."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 126_000, 480).tolist() for _ in range(rows)]
    config = DecodeConfig(
        gen_length=64,
        block_length=32,
        rule="quota",
        cache=cache,
        stop="none",
    )
    (first,) = llm.stream(prompts, config, batch_size=rows)
    runs = [next(iter(llm.stream(prompts, config, batch_size=rows))) for _ in range(3)]
    seconds = sorted(run.seconds for run in runs)[1]
    return {
        "rows": rows,
        "cache": cache,
        "forwards": first.forwards,
        "ms_per_forward": 1e3 * seconds / first.forwards,
        "forwards_per_second": first.forwards / seconds,
        "compile_seconds": first.compile_seconds,
    }


def plan_and_peak(model: str, batch: int, length: int) -> dict[str, Any]:
    """The planned bytes of one device, and the peak that it reports, loading included.

    Where loading alone reached the peak (`load_peak` equals `peak`), the run says nothing about
    decoding. The allocator's own waste is part of `peak`. Needs a process of its own.
    """
    device = jax.devices()[0]
    decoding = DecodeConfig(gen_length=64, block_length=32, stop="none")
    llm = LLM.load(model, sharding.parse_mesh("1x1"))
    jax.block_until_ready(llm._params)
    loaded = (device.memory_stats() or {})["peak_bytes_in_use"]
    prompt = [7] * (length - 64)
    next(iter(llm.stream([prompt] * batch, decoding, batch_size=batch)))
    peak = (device.memory_stats() or {})["peak_bytes_in_use"]
    columns = min(bucket(len(prompt)), llm.config.max_length - 64) + 64
    planner = Planner(llm.config, sharding.abstract_mesh("1x1"), columns, decoding)
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


def main(config: CheckConfig) -> None:
    """Runs everything and writes one JSON file."""
    import flax

    replay = goldens()  # first, while no other process holds the device's memory
    planned = plans(config.model)
    facts: dict[str, Any] = {
        "command": f"python experiments/gpu_check.py model={config.model}",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "goldens": replay,
        "plans": planned,
        "bundled": bundled(),
    }
    print(json.dumps(facts, indent=2), flush=True)
    start = time.time()
    llm = LLM.load(config.model, sharding.parse_mesh("1x1"))
    jax.block_until_ready(llm._params)
    facts["load_seconds"] = time.time() - start
    cases = [(1, "dual"), (1, "none"), (8, "dual")]
    facts["block_steps"] = [block_step(llm, rows, cache) for rows, cache in cases]
    config.output.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["plan"]:
        print(json.dumps(plan_and_peak(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
        raise SystemExit
    cli.run(main, CheckConfig, "python experiments/gpu_check.py")
