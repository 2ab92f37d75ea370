"""The subcommands: what each is asked for, and what it does."""

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from jdllm.convert.adapters import run_factors, scaling_of, write_adapter
from jdllm.convert.export import export
from jdllm.convert.families import COMMANDS, Source, open_source
from jdllm.convert.fetch import converted_folder, fetch
from jdllm.convert.merge import merge
from jdllm.convert.plan import PlanConfig, find_plan, shown_plan, with_model
from jdllm.convert.quantise import quantised
from jdllm.load import BUNDLED, enable_compilation_cache, read_facts
from jdllm.runtime import cli, files
from jdllm.store import checkpoint
from jdllm.store.checkpoint import LazyArray
from jdllm.tokenizer import copy_tokenizer

PROG = "python -m jdllm.convert"
Dtype = Literal["float32", "bfloat16"]
Weights = Literal["int8", "fp8"]


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Converts one checkpoint."""

    source: str
    """A folder, or a Hugging Face id that is downloaded first."""
    output: Path | None = None
    """Folder to write (default: models/<name> in JDLLM_HOME, which is ~/.cache/jdllm; with weights=
    <name>-<weights>)."""
    dtype: Dtype | None = None
    """Store weights in this dtype (default: as in the source)."""
    weights: Weights | None = None
    """Hold the layers' linear maps in 8 bits: int8, or fp8 (e4m3), with a scale per channel."""
    allow_unknown: tuple[str, ...] = ()
    """Keys of config.json to ignore although their meaning is not known here."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes a converted model back as a Hugging Face checkpoint, or a LoRA run as PEFT's files."""

    source: Path
    """A folder that this command wrote, the model/ in one of jdllm.sft, or a LoRA run of it."""
    output: Path
    """Folder to write."""
    dtype: Dtype | None = None
    """Store weights in this dtype (default: as in the source)."""
    shard_bytes: int = 5_000_000_000
    """Largest size of one safetensors file."""
    step: int | None = None
    """Of a LoRA run: the checkpoint (default: the newest)."""


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Adds a LoRA adapter to the weights of its base and writes the whole model."""

    source: str
    """The base: bundled, a converted folder, or a Hugging Face folder or id."""
    adapter: Path
    """A folder with an adapter in PEFT's files."""
    output: Path
    """Folder to write, as the other conversions do."""
    dtype: Dtype | None = None
    """Store weights in this dtype (default: as in the source)."""
    weights: Weights | None = None
    """Hold the merged linear maps in 8 bits: int8 or fp8. A base in 8 bits is widened first."""
    allow_unknown: tuple[str, ...] = ()
    """Keys of config.json to ignore although their meaning is not known here."""


def convert(
    source: Source, tokenizer_files: Path, output: Path, weights: Weights | None = None
) -> None:
    """Streams `source` into `output`; OSError where its disk has no room for it."""
    config = dataclasses.replace(source.config, weights=weights)
    with files.atomic_folder(output) as folder:
        files.require_space(folder, int(checkpoint.stored_bytes(config) * 1.02))
        if "tokenizer.json" not in copy_tokenizer(tokenizer_files, folder):
            print(
                f"warning: {tokenizer_files} has no tokenizer.json, so the model will take token "
                "ids only",
                file=sys.stderr,
            )
        with contextlib.closing(progress(source)) as units:
            stream = quantised(units, weights) if weights else units
            checkpoint.write_model(folder, config, stream)


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
    folder = converted_folder(config.source)
    beside = f"{folder.name}-{config.weights}" if config.weights else folder.name
    output = config.output or folder.with_name(beside)
    files.refuse_existing(output)
    folder = fetch(config.source)
    source = open_source(folder, family, config.dtype, config.allow_unknown)
    convert(source, folder, output, config.weights)
    print(f"wrote {output}", file=sys.stderr)


def export_run(config: ExportConfig) -> None:
    """Writes the factors of a LoRA run's checkpoint as PEFT's files."""
    lora, factors = run_factors(config.source, config.step)
    facts = json.loads((config.source / "config.json").read_text())
    model = read_facts(facts["model"], allow_unknown=facts["allow_unknown"])
    with files.atomic_folder(config.output) as folder:
        write_adapter(folder, model, factors, facts["model"], scaling_of(lora))


def run_export(words: Sequence[str]) -> None:
    """The subcommand export."""
    config = cli.parse(ExportConfig, words, f"{PROG} export")
    if (config.source / "checkpoints").is_dir():
        export_run(config)
    else:
        export(config.source, config.output, config.dtype, config.shard_bytes)
    print(f"wrote {config.output}", file=sys.stderr)


def run_merge(words: Sequence[str]) -> None:
    """The subcommand merge."""
    config = cli.parse(MergeConfig, words, f"{PROG} merge")
    files.refuse_existing(config.output)
    folder = BUNDLED if config.source == "bundled" else fetch(config.source)
    merge(folder, config.adapter, config.output, config.dtype, config.weights, config.allow_unknown)
    print(f"wrote {config.output}", file=sys.stderr)


def run_plan(words: Sequence[str]) -> None:
    """The subcommand plan."""
    config = cli.parse(PlanConfig, with_model(words), f"{PROG} plan")
    enable_compilation_cache()
    facts = find_plan(config)
    print(json.dumps(facts, indent=2) if config.json else shown_plan(facts))


# What the words of each subcommand set.
CONFIGS: dict[str, type] = {command: ConvertConfig for command in COMMANDS} | {
    "export": ExportConfig,
    "merge": MergeConfig,
    "plan": PlanConfig,
}


def main(words: Sequence[str] | None = None) -> None:
    """Runs a subcommand; a checkpoint that cannot be converted is one sentence and status 1."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a traceback before it raises
    commands = {command: partial(run_convert, command) for command in COMMANDS}
    with cli.one_sentence("nothing was written; the same command starts again"):
        cli.dispatch(
            commands | {"export": run_export, "merge": run_merge, "plan": run_plan}, words, PROG
        )
