"""Converts Hugging Face checkpoints into Orbax checkpoints that restore onto any mesh, and back.

python -m jdllm.convert llada source=GSAI-ML/LLaDA-1.5 output=models/llada-1.5
python -m jdllm.convert export source=models/mine output=models/mine-hf
python -m jdllm.convert plan llada-8b mesh=1x2 batch=16 length=1024 memory=80
"""

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from jdllm.convert.export import export
from jdllm.convert.families import FAMILIES, Source, open_source, read_facts
from jdllm.convert.fetch import converted_folder, fetch
from jdllm.decode import DecodeConfig
from jdllm.decode.memory import Planner
from jdllm.load import compute_dtype, enable_compilation_cache
from jdllm.model.config import NAMED, ModelConfig, count_parameters, is_converted
from jdllm.runtime import cli, files, sharding
from jdllm.runtime.machine import read_memory
from jdllm.store import checkpoint
from jdllm.store.checkpoint import LazyArray
from jdllm.tokenizer import copy_tokenizer

PROG = "python -m jdllm.convert"
# Subcommands that convert: the family of each, and the Hugging Face id that it converts by default.
COMMANDS = {name: (name, family.source) for name, family in FAMILIES.items()} | {
    "diffucoder": ("dream", "apple/DiffuCoder-7B-Instruct")
}
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Converts one checkpoint."""

    source: str
    """A folder, or a Hugging Face id that is downloaded first."""
    output: Path | None = None
    """Folder to write (default: models/<name> in JDLLM_HOME, which is ~/.cache/jdllm)."""
    dtype: Dtype | None = None
    """Store weights in this dtype (default: as in the source)."""
    allow_unknown: tuple[str, ...] = ()
    """Keys of config.json to ignore although their meaning is not known here."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes a converted model back as a Hugging Face checkpoint."""

    source: Path
    """A folder that this command wrote, or the model/ in one of jdllm.sft."""
    output: Path
    """Folder to write."""
    dtype: Dtype | None = None
    """Store weights in this dtype (default: as in the source)."""
    shard_bytes: int = 5_000_000_000
    """Largest size of one safetensors file."""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Says what a model needs on a mesh, before anything is loaded."""

    model: str
    """A family, a named shape such as llada-8b, or a converted or Hugging Face folder or id."""
    allow_unknown: tuple[str, ...] = ()
    """Keys of a Hugging Face config.json to ignore although their meaning is not known here."""
    mesh: str = "auto"
    """data x model, for example 4x2; it may be larger than this machine."""
    batch: int = 8
    """Rows that decode together, over the whole mesh."""
    length: int | None = None
    """Columns of a canvas: prompt and completion (default: 1024, or the model's)."""
    memory: float | None = None
    """GB of one device of another kind than this machine's (default: this machine, as it is)."""
    dtype: str = "auto"
    """As in the other commands; with memory=, auto is the stored one."""
    decode: DecodeConfig = DecodeConfig()
    json: bool = False
    """Print one JSON object, in bytes, instead of the table."""

    def __post_init__(self):
        if self.batch < 1 or (self.length or 1) < 1 or not (self.memory or 1) > 0:
            raise ValueError("batch and length must be 1 or more, and memory more than 0")


def convert(source: Source, tokenizer_files: Path, output: Path) -> None:
    """Streams `source` into `output`; OSError where its disk has no room for it."""
    needed = int(source.shards.count * np.dtype(source.config.dtype).itemsize * 1.02)
    with files.atomic_folder(output) as folder:
        files.require_space(folder, needed)
        if "tokenizer.json" not in copy_tokenizer(tokenizer_files, folder):
            print(
                f"warning: {tokenizer_files} has no tokenizer.json, so the model will take token "
                "ids only",
                file=sys.stderr,
            )
        with contextlib.closing(progress(source)) as units:
            checkpoint.write_model(folder, source.config, units)


def progress(source: Source) -> Generator[tuple[str, dict[str, LazyArray]]]:
    """The source's units behind a progress bar that counts weights."""
    with tqdm(total=source.shards.count, unit=" weights", unit_scale=True) as bar:
        for unit, arrays in source.units():
            yield unit, arrays
            bar.update(sum(lazy.size for lazy in arrays.values()))


def run_convert(command: str, words: Sequence[str]) -> None:
    """One of COMMANDS."""
    family, source = COMMANDS[command]
    config = cli.parse(ConvertConfig, words, f"{PROG} {command}", ConvertConfig(source=source))
    output = config.output or converted_folder(config.source)
    files.refuse_existing(output)
    folder = fetch(config.source)
    source = open_source(folder, family, config.dtype, config.allow_unknown)
    convert(source, folder, output)
    print(f"wrote {output}", file=sys.stderr)


def run_export(words: Sequence[str]) -> None:
    """The subcommand export."""
    config = cli.parse(ExportConfig, words, f"{PROG} export")
    export(config.source, config.output, config.dtype, config.shard_bytes)
    print(f"wrote {config.output}", file=sys.stderr)


def describe_model(model: str, allow_unknown: Sequence[str] = ()) -> ModelConfig:
    """The facts of what `plan` was asked about; of a repository only small files are fetched."""
    of_family = {config.family: config for config in reversed(NAMED.values())}
    family = COMMANDS[model][0] if model in COMMANDS else None
    if config := NAMED.get(model.removeprefix("random:")) or of_family.get(family or ""):
        return config
    if "/" not in model and not Path(model).expanduser().is_dir():
        raise ValueError(
            f"{model} is neither a family ({', '.join(COMMANDS)}) nor a named shape "
            f"({', '.join(NAMED)}) nor a folder"
        )
    folder = fetch(model, ["*config.json", "tokenizer.json", "added_tokens.json", "special_*.json"])
    if is_converted(folder):
        return checkpoint.read_config(folder)
    return read_facts(folder, allow_unknown=allow_unknown)[1]


def memory_here() -> int:
    """Bytes that one device of this machine has for us; CPU devices share the host's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or read_memory() // jax.local_device_count()


def with_model(words: Sequence[str]) -> list[str]:
    """`plan`'s words, of which the first may be the model alone."""
    bare = bool(words) and "=" not in words[0] and not words[0].startswith("-")
    return [f"model={words[0]}", *words[1:]] if bare else list(words)


def shown_plan(facts: dict[str, Any]) -> str:
    """What `plan` found, as it is shown."""
    parts = [f"{name:<14}{size / 1e9:>8.3f}" for name, size in facts["bytes"].items()]
    verdict = "fits" if facts["fits"] else "does not fit"
    mesh = " x ".join(f"{axis}={size}" for axis, size in facts["mesh"].items())
    return "\n".join(
        [
            f"{facts['model']}: {facts['parameters'] / 1e9:.2f} B parameters in {facts['dtype']}",
            f"mesh {mesh}, batch {facts['batch']}, {facts['columns']} columns, "
            f"{facts['block_length']} a block, cache {facts['cache']}",
            "",
            "GB on each device",
            *parts,
            f"{'total':<14}{facts['total'] / 1e9:>8.3f}  {verdict} in {facts['memory'] / 1e9:.3f}",
            f"largest batch that fits: {facts['largest_batch']}",
        ]
    )


def run_plan(words: Sequence[str]) -> None:
    """The subcommand plan."""
    config = cli.parse(PlanConfig, with_model(words), f"{PROG} plan")
    enable_compilation_cache()
    model = describe_model(config.model, config.allow_unknown)
    elsewhere = config.memory is not None
    if not elsewhere or config.dtype != "auto":
        model = dataclasses.replace(model, dtype=compute_dtype(config.dtype, model.dtype))
    mesh = sharding.abstract_mesh(config.mesh)
    length = config.length or min(1024, model.max_length)
    decoding = config.decode.resolve(gen_length=min(128, length), model=model)
    planner = Planner(model, mesh, length, decoding, elsewhere)
    plan = planner.plan(config.batch)
    memory = int(config.memory * 1e9) if config.memory else memory_here()
    facts = {
        "model": config.model,
        "parameters": count_parameters(model),
        "dtype": model.dtype,
        "mesh": dict(mesh.shape),
        "batch": config.batch,
        "columns": length,
        "block_length": decoding.block_length,
        "cache": decoding.cache,
        "bytes": dataclasses.asdict(plan),
        "total": plan.total,
        "memory": memory,
        "fits": plan.total <= memory,
        "largest_batch": planner.largest_batch(memory),
    }
    print(json.dumps(facts, indent=2) if config.json else shown_plan(facts))


def main(words: Sequence[str] | None = None) -> None:
    """Runs a subcommand; a checkpoint that cannot be converted is one sentence and status 1."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a traceback before it raises
    commands = {command: partial(run_convert, command) for command in COMMANDS}
    with cli.one_sentence("nothing was written; the same command starts again"):
        cli.dispatch(commands | {"export": run_export, "plan": run_plan}, words, PROG)


if __name__ == "__main__":
    main()
