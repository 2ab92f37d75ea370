"""How long the decode loop takes to trace, lower and compile, by model and by XLA's settings.

python experiments/compile_time.py                     (a GPU; about two minutes)
python experiments/compile_time.py models=tiny length=256      (anywhere)
python experiments/compile_time.py settings= output=FILE       (anywhere, tracing and lowering)

Programs are made from shapes alone: no weights are needed. The persistent cache is off. XLA keeps
what it has tuned within a process, so settings that tune less come first. Tracing counts what a
process does once besides: importing Triton, and the canaries of its kernels.
"""

import dataclasses
import datetime
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jdllm import DecodeConfig
from jdllm.decode import make_setup
from jdllm.decode.memory import trace_program
from jdllm.load import read_facts
from jdllm.runtime import cli

RESULTS = Path(__file__).resolve().parent / "results" / "compile_time.jsonl"
SETTINGS: dict[str, dict[str, Any]] = {
    "untuned": {"xla_gpu_autotune_level": 0},
    "no-triton": {"xla_gpu_enable_triton_gemm": False},
    "default": {},
}


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What is compiled."""

    output: Path = RESULTS
    models: str = "llada2-mini,llada-8b"
    settings: str = ",".join(SETTINGS)
    """Several with commas between them; none compiles nothing."""
    rows: int = 1
    length: int = 1024
    gen_length: int = 128
    layers: int | None = None

    def __post_init__(self):
        if unknown := set(self.settings.split(",")) - {"", *SETTINGS}:
            raise ValueError(f"settings={unknown.pop()} is none of {', '.join(SETTINGS)}")


def measured(model: str, config: CompileConfig):
    """A row per setting; the first tells of tracing and lowering, too."""
    facts = read_facts(f"random:{model}")
    if config.layers:
        facts = dataclasses.replace(facts, layers=config.layers)
    decoding = DecodeConfig(
        rule="quota", tokens_per_step=1, cache="block" if facts.block_causal else "dual"
    ).resolve(gen_length=config.gen_length, model=facts)
    setup = make_setup(decoding, facts)
    start = time.perf_counter()
    traced = trace_program(facts, setup, config.rows, config.length)
    tracing, start = time.perf_counter() - start, time.perf_counter()
    lowered = traced.lower()
    lowering, text = time.perf_counter() - start, lowered.as_text() or ""
    seconds = {"tracing_seconds": tracing, "lowering_seconds": lowering}
    row = {"model": model, "rows": config.rows, "cache": decoding.cache, "layers": facts.layers}
    row |= seconds | {"lowered_instructions": text.count(" = "), "lowered_bytes": len(text)}
    if not config.settings:
        yield row
        return
    for name in config.settings.split(","):
        start = time.perf_counter()
        compiled = lowered.compile(SETTINGS[name])
        yield row | {
            "setting": name,
            "compile_seconds": time.perf_counter() - start,
            "instructions": (compiled.as_text() or "").count(" = "),
        }


def main(config: CompileConfig) -> None:
    """Appends every row to the file as soon as it is measured."""
    jax.config.update("jax_enable_compilation_cache", False)
    facts = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "command": " ".join(["python experiments/compile_time.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    for model in config.models.split(","):
        for row in measured(model, config):
            with config.output.open("a") as file:
                file.write(json.dumps(row | facts) + "\n")
            print(
                {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True
            )


if __name__ == "__main__":
    cli.run(main, CompileConfig, "python experiments/compile_time.py")
