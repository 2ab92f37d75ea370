"""Merges a LoRA adapter into its base: one whole model, which needs no adapter any more."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jdllm.convert.adapters import read_factors
from jdllm.convert.families import open_source
from jdllm.convert.quantise import Units, quantised, widened
from jdllm.model.config import ModelConfig, is_converted
from jdllm.model.linear import linear_of, module_names
from jdllm.model.lora import Adapted, Factors
from jdllm.runtime import files
from jdllm.store import checkpoint
from jdllm.store.checkpoint import Index, LazyArray
from jdllm.tokenizer import copy_tokenizer


def merged(units: Units, factors: Mapping[str, Factors]) -> Iterator[tuple[str, dict]]:
    """The units with W + scale B A in place of adapted weights, computed in float32."""
    for unit, arrays in units:
        yield unit, {name: _sum(name, lazy, factors) for name, lazy in arrays.items()}


def _sum(name: str, lazy: LazyArray, factors: Mapping[str, Factors]) -> LazyArray:
    linear, names = linear_of(name), module_names(name)
    parts = {n: factors[n] for n in names if n in factors}
    if linear is None or not parts:
        return lazy

    @functools.cache  # a weight is written in pieces, one after the other
    def whole() -> np.ndarray:
        base = jax.numpy.asarray(np.asarray(lazy))
        return np.asarray(Adapted(base, parts, names, linear).dense(base))

    def read(index: Index) -> np.ndarray:
        return np.ascontiguousarray(whole()[index])

    return dataclasses.replace(lazy, read=read)


def merge(
    source: Path,
    adapter: Path,
    output: Path,
    dtype: str | None = None,
    weights: Literal["int8", "fp8"] | None = None,
    allow_unknown: Sequence[str] = (),
) -> None:
    """Writes `output`, a converted model: that of `source`, in either form, with the adapter in it.

    A base in 8 bits is widened first; `weights` says whether the sum is held so again. ValueError
    or OSError, in one sentence, where they do not fit or the disk has no room.
    """
    config, units = _open(source, dtype, allow_unknown)
    factors = read_factors(adapter, config)
    units, config = merged(units, factors), dataclasses.replace(config, weights=weights)
    with files.atomic_folder(output) as folder:
        files.require_space(folder, int(checkpoint.stored_bytes(config) * 1.02))
        checkpoint.write_model(folder, config, quantised(units, weights) if weights else units)
        copy_tokenizer(source, folder)


def _open(
    source: Path, dtype: str | None, allow_unknown: Sequence[str]
) -> tuple[ModelConfig, Units]:
    if is_converted(source):
        config = checkpoint.read_config(source)
        config = dataclasses.replace(config, dtype=dtype or config.dtype)
        units = checkpoint.stored_units(source, config)
        return config, widened(units, config) if config.weights else units
    checkpoint.refuse_run(source)
    found = open_source(source, dtype=dtype, allow_unknown=allow_unknown)
    return found.config, found.units()
