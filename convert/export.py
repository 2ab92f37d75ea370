"""Exports a converted model as a Hugging Face folder of safetensors."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jdllm.convert.families import FAMILIES, read_facts
from jdllm.convert.shards import INDEX, SINGLE
from jdllm.convert.table import ConversionError, restore_sources
from jdllm.model.config import ModelConfig, count_parameters
from jdllm.runtime import files
from jdllm.store import checkpoint
from jdllm.tokenizer import copy_tokenizer


def tensors(folder: Path, config: ModelConfig) -> Iterator[dict[str, np.ndarray]]:
    """Returns Hugging Face tensors of one unit after the other, routers as in their source."""
    with ocp.StandardCheckpointer() as checkpointer:
        for unit, leaves in checkpoint.units(config).items():
            like = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
            arrays = checkpointer.restore(folder.absolute() / "weights" / unit, like)
            yield restore_sources(FAMILIES[config.family], config, arrays)


def export(source: Path, output: Path, dtype: str | None, shard_bytes: int) -> None:
    """Writes `output` with config.json, safetensors shards and the tokenizer's files.

    Tensors are bit-identical to those the model was converted from when no dtype was changed. A
    tensor larger than `shard_bytes` gets a shard of its own.
    """
    config = checkpoint.read_config(source)
    if config.family not in FAMILIES:
        raise ConversionError(
            f"{source} is of the family {config.family}, which cannot be exported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    if config.weights:
        raise ConversionError(
            f"{source} holds its weights in {config.weights}, which cannot go back to the tensors "
            "that they were rounded from; export a folder that was converted without weights="
        )
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    with files.atomic_folder(output) as folder:
        size = count_parameters(config) * np.dtype(config.dtype).itemsize
        files.require_space(folder, int(size * 1.02))
        written: list[list[str]] = []
        pending: dict[str, np.ndarray] = {}
        for unit in tensors(source, config):
            for name, tensor in unit.items():
                if pending and _bytes(pending) + tensor.nbytes > shard_bytes:
                    written.append(_save(folder, len(written), pending))
                    pending = {}
                pending[name] = tensor
        written.append(_save(folder, len(written), pending))
        _finish(folder, written)
        hf = FAMILIES[config.family].hf_config(config)
        copy_tokenizer(source, folder)
        files.write_json(folder / "config.json", hf)
        files.write_json(folder / "config.json", hf | _more_ends(folder, config))


def _more_ends(folder: Path, config: ModelConfig) -> dict[str, list[int]]:
    """Returns an `eos_token_id` with the ids that end a text and are untold in `folder`."""
    _, told = read_facts(folder)
    untold = [i for i in config.stop_ids if i not in told.stop_ids]
    return {"eos_token_id": [config.eos_id, *untold]} if untold else {}


def _bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


def _save(folder: Path, number: int, arrays: dict[str, np.ndarray]) -> list[str]:
    try:
        save_file(arrays, folder / f"shard-{number}", metadata={"format": "pt"})
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"cannot write to {folder}: {error}") from None
    return list(arrays)


def _finish(folder: Path, written: list[list[str]]) -> None:
    """Renames the shards: their names hold the number of shards."""
    if len(written) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    weight_map, total = {}, 0
    for number, names in enumerate(written):
        path = folder / f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        (folder / f"shard-{number}").rename(path)
        weight_map |= dict.fromkeys(names, path.name)
        total += path.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files.write_json(folder / INDEX, index)
