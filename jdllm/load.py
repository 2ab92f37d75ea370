"""Everything that `model=` may be: bundled, a folder, random:<name>, or a Hugging Face id."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from jdllm.convert.adapters import place, read_factors
from jdllm.convert.families import open_source
from jdllm.convert.fetch import converted_folder, fetch
from jdllm.decode.memory import weight_bytes
from jdllm.model.config import NAMED, ModelConfig, is_converted
from jdllm.model.lora import Adapter
from jdllm.model.model import Model
from jdllm.runtime import processes, sharding
from jdllm.runtime.files import home, prune
from jdllm.store import checkpoint
from jdllm.tokenizer import copy_tokenizer

BUNDLED = Path(__file__).parent / "bundled"
CONVERT_ABOVE = 2_000_000_000  # bytes: a larger download is converted once and kept
KEPT_PROGRAMS = 8 * 2**30  # bytes of compiled programs that stay on disk
ROOM = 0.7  # share of a device's memory that weights may take; caches and activations need the rest
DTYPES = ("auto", "float32", "bfloat16", "float16")


def compute_dtype(dtype: str, stored: str) -> str:
    """Resolves dtype=auto: the stored dtype, except that a CPU computes in float32.

    XLA has no native bfloat16 matrix products on most CPUs and would convert at every use.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    return "float32" if jax.default_backend() == "cpu" else stored


def enable_compilation_cache() -> None:
    """Keeps compiled programs in JDLLM_HOME, so that the second start of a command is quick.

    What was set before, by the environment or in code, counts more: another folder
    (JAX_COMPILATION_CACHE_DIR), which is left to grow, or none, where
    JAX_ENABLE_COMPILATION_CACHE is false.
    """
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    folder = home() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX would look at every file of the folder each time that it writes one.
    if jax.config.jax_compilation_cache_max_size == -1:
        prune(folder, KEPT_PROGRAMS)


def locate(model: str, allow_unknown: Sequence[str] = ()) -> Path | None:
    """The local folder with the files of `model`; None for random:<name>.

    `allow_unknown` are keys of a Hugging Face config.json to ignore, here and below.

    A Hugging Face id is downloaded; one larger than CONVERT_ABOVE is converted once, into
    JDLLM_HOME/models, and found there from then on.
    """
    if model.startswith("random:"):
        return None
    if model == "bundled":
        return BUNDLED
    model = os.path.expanduser(model)
    if Path(model).is_dir():
        checkpoint.refuse_run(Path(model))
        return Path(model)
    converted = converted_folder(model)
    if is_converted(converted):
        return converted
    folder = fetch(model)
    source = open_source(folder, allow_unknown=allow_unknown)
    if source.shards.bytes <= CONVERT_ABOVE:
        return folder
    with processes.shared_folder(converted) as partial:
        checkpoint.write_model(partial, source.config, source.units())
        if processes.is_main():
            copy_tokenizer(folder, partial)
    return converted


def read_facts(model: str, dtype: str = "auto", allow_unknown: Sequence[str] = ()) -> ModelConfig:
    """The config of `model`, with the dtype its weights will have; none of them is read.

    A Hugging Face id is downloaded. ValueError or OSError, in one sentence, as in `load_model`.
    """
    folder = locate(model, allow_unknown)
    if folder is not None and not is_converted(folder):
        wanted = compute_dtype(dtype, "") or None
        return open_source(folder, dtype=wanted, allow_unknown=allow_unknown).config
    if folder is None:
        name = model.removeprefix("random:")
        if name not in NAMED:
            raise ValueError(f"model={model}: there is no such shape; try {', '.join(NAMED)}")
        config = NAMED[name]
    else:
        config = checkpoint.read_config(folder)
    return dataclasses.replace(config, dtype=compute_dtype(dtype, config.dtype))


def choose_mesh(
    text: str,
    model: str,
    dtype: str = "auto",
    allow_unknown: Sequence[str] = (),
    copies: int = 1,
    memory: int | None = None,
) -> Mesh:
    """The mesh that `mesh=text` means for `model`: auto is data parallel where the model fits.

    It fits where `copies` of its weights (training: 4, with gradients and two moments) take at most
    ROOM of a device's `memory` in bytes (default: what the device says; a CPU says nothing, and
    everything fits). Else it is split over as few devices as will do; ValueError where none will.
    """
    facts = jax.local_devices()[0].memory_stats() or {}
    limit = facts.get("bytes_limit") if memory is None else memory
    if text != "auto" or limit is None or jax.device_count() == 1:
        return sharding.parse_mesh(text)
    config = read_facts(model, dtype, allow_unknown)

    def serves(mesh: Mesh) -> bool:
        try:
            return copies * weight_bytes(config, mesh) <= ROOM * limit
        except ValueError:  # some axis does not divide
            return False

    return sharding.parse_mesh(text, serves=serves)


def load_model(
    model: str,
    mesh: Mesh,
    dtype: str = "auto",
    seed: int = 0,
    allow_unknown: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> Model:
    """The model that `model` names, placed on `mesh`.

    `dtype` is what the weights become (auto: see `compute_dtype`), `adapter` the folder of a LoRA
    adapter in PEFT's files, whose factors stay float32. ValueError or OSError, in one sentence,
    where there is no such model or it cannot be loaded.
    """
    if adapter is not None:  # small files before large ones
        factors = read_factors(Path(adapter), read_facts(model, dtype, allow_unknown))
        found = load_model(model, mesh, dtype, seed, allow_unknown)
        return dataclasses.replace(found, adapter=Adapter(place(factors, found.config, mesh)))
    folder = locate(model, allow_unknown)
    if folder is None:
        return checkpoint.random_model(read_facts(model, dtype), mesh, seed)
    if is_converted(folder):
        stored = checkpoint.read_config(folder).dtype
        return checkpoint.restore_model(folder, mesh, compute_dtype(dtype, stored))
    wanted = compute_dtype(dtype, "")  # empty: as stored
    source = open_source(folder, dtype=wanted or None, allow_unknown=allow_unknown)
    return checkpoint.place_stream(source.config, mesh, source.units())
