"""Converts Hugging Face checkpoints into Orbax checkpoints that restore onto any mesh, and back.

python -m jdllm.convert llada source=GSAI-ML/LLaDA-1.5 output=models/llada-1.5
python -m jdllm.convert export source=models/mine output=models/mine-hf
"""

import dataclasses
import errno
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jdllm import checkpoint, cli
from jdllm.convert.export import export
from jdllm.convert.families import FAMILIES, Source, open_source
from jdllm.convert.fetch import fetch, home
from jdllm.tokenizer import copy_tokenizer

PROG = "python -m jdllm.convert"


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Converts one checkpoint."""

    source: str
    """A folder, or a Hugging Face id that is downloaded first."""
    output: Path | None = None
    """Folder to write (default: models/<name> in JDLLM_HOME, which is ~/.cache/jdllm)."""
    dtype: str | None = None
    """Store weights as float32 or bfloat16 (default: as in the source)."""
    allow_unknown: tuple[str, ...] = ()
    """Keys of config.json to ignore although their meaning is not known here."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes a converted model back as a Hugging Face checkpoint."""

    source: Path
    """A folder that this command or jdllm.sft wrote."""
    output: Path
    """Folder to write."""
    dtype: str | None = None
    """Store weights as float32 or bfloat16 (default: as in the source)."""
    shard_bytes: int = 5_000_000_000
    """Largest size of one safetensors file."""


def convert(source: Source, tokenizer_files: Path, output: Path) -> None:
    """Streams `source` into `output`; OSError where the disk has no room for it."""
    config = source.config
    needed = int(source.shards.count * np.dtype(config.dtype).itemsize * 1.02)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{output} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free",
        )
    with checkpoint.atomic_folder(output) as folder:
        if "tokenizer.json" not in copy_tokenizer(tokenizer_files, folder):
            print("warning: no tokenizer.json here; the model will take token ids only")
        checkpoint.write_model(folder, config, progress(source))


def progress(source: Source) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The source's units behind a progress bar that counts weights."""
    with tqdm(total=source.shards.count, unit=" weights", unit_scale=True) as bar:
        for unit, arrays in source.units():
            yield unit, arrays
            bar.update(sum(array.size for array in arrays.values()))


def run_convert(family: str, words: Sequence[str]) -> None:
    """The subcommand of one family."""
    default = ConvertConfig(source=FAMILIES[family].source)
    config = cli.parse(ConvertConfig, words, f"{PROG} {family}", default)
    folder = fetch(config.source)
    output = config.output or home() / "models" / Path(config.source).name
    source = open_source(folder, family, config.dtype, config.allow_unknown)
    convert(source, folder, output)
    print(f"wrote {output}")


def run_export(words: Sequence[str]) -> None:
    """The subcommand export."""
    config = cli.parse(ExportConfig, words, f"{PROG} export")
    export(config.source, config.output, config.dtype, config.shard_bytes)
    print(f"wrote {config.output}")


def main(words: Sequence[str] | None = None) -> None:
    """Runs a subcommand; a checkpoint that cannot be converted is one sentence and status 1."""
    commands = {family: partial(run_convert, family) for family in FAMILIES}
    try:
        cli.dispatch(commands | {"export": run_export}, words, PROG)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
