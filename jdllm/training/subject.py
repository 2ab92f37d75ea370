"""What a run trains: all parameters, or LoRA's factors beside frozen ones; and what it leaves."""

import contextlib
import dataclasses
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jdllm.convert.adapters import place, read_factors, scaling_of, write_adapter
from jdllm.kernels.choose import in_training
from jdllm.load import compute_dtype, load_model
from jdllm.model.linear import modules
from jdllm.model.lora import Adapter, Factors, find, initial, refuse_dropout
from jdllm.model.model import Model, abstract, named
from jdllm.model.quantise import quantise_params
from jdllm.runtime import processes
from jdllm.store import checkpoint
from jdllm.store.fingerprint import fingerprint
from jdllm.tokenizer import copy_tokenizer
from jdllm.train.dynamics import Dynamics
from jdllm.train.step import Join, all_parameters, beside
from jdllm.training.config import SFTConfig
from jdllm.training.dynamics import write_maps


@dataclasses.dataclass(frozen=True)
class Subject:
    """What changes, what does not, and how the two make a model."""

    trained: Any
    """A pytree of float32 arrays, as it is before the first step."""
    frozen: Model
    """Of full fine-tuning without parameters: the trained ones are all there are."""
    join: Join
    facts: dict[str, Any]
    """What every checkpoint says of it; a run is not continued where they differ."""


def load_subject(config: SFTConfig, mesh: Mesh) -> Subject:
    """What `config` trains, on `mesh`. ValueError or OSError as from `load_model` and `lora`."""
    dtype = compute_dtype(config.dtype, "bfloat16")
    if not config.lora.rank:
        model = load_model(config.model, mesh, "float32", config.seed, config.allow_unknown)
        if held := model.config.weights:
            raise ValueError(
                f"model={config.model} holds its weights in {held}, which cannot be trained; add "
                "lora.rank=16 to train factors beside them, or start from a folder converted "
                "without weights="
            )
        own = config.adapt.applied(model.config)
        bare = dataclasses.replace(model, params=None, dtype=dtype, config=own)
        bare = dataclasses.replace(bare, kernel=kernel_of(config, bare))
        return Subject(model.params, bare, all_parameters, {})
    model = load_model(config.model, mesh, "auto", config.seed, config.allow_unknown)
    factors = first_factors(config, model, mesh)
    facts = {
        "base": fingerprint(model),
        "rank": config.lora.rank,
        "alpha": config.lora.scale_alpha,
        "modules": sorted(factors),
    }
    if config.lora.base == "int8":
        model = dataclasses.replace(model, params=quantise_params(model.params))
    frozen = dataclasses.replace(model, adapter=Adapter({}, config.lora.dropout), dtype=dtype)
    frozen = dataclasses.replace(frozen, kernel=kernel_of(config, frozen))
    return Subject(factors, frozen, beside, facts)


def kernel_of(config: SFTConfig, model: Model) -> str:
    """The kernels that a model is trained with."""
    moe = model.config.moe
    if moe is None:
        return config.kernel
    return in_training(config.kernel, model.dtype, (moe.expert_mlp, model.config.embed))


def first_factors(config: SFTConfig, model: Model, mesh: Mesh) -> dict[str, Factors]:
    """Fresh factors, or those of `config.adapter`, which must be of the same modules and rank."""
    lora, own = config.lora, modules(named(abstract(model.config)))
    names = find(own, lora.targets)
    refuse_dropout(names, lora.dropout)
    if config.adapter is None:
        return initial(own, names, lora.rank, lora.scale, jax.random.key(config.seed), mesh)
    found = read_factors(config.adapter, model.config)
    if set(found) != set(names) or {part.rank for part in found.values()} != {lora.rank}:
        ranks = sorted({part.rank for part in found.values()})
        raise ValueError(
            f"adapter={config.adapter} has {len(found)} modules of rank {ranks}, but lora.targets "
            f"and lora.rank ask for {len(names)} of rank {lora.rank}; name its own"
        )
    if other := [f.scale for f in found.values() if not math.isclose(f.scale, lora.scale)]:
        raise ValueError(
            f"adapter={config.adapter} scales its factors by {other[0]}, but lora.alpha gives "
            f"{lora.scale}; name its own"
        )
    return place(found, model.config, mesh)


def result(config: SFTConfig) -> Path:
    """Where a finished run leaves what it trained."""
    return config.output / ("adapter" if config.lora.rank else "model")


@contextlib.contextmanager
def written(folder: Path) -> Iterator[Path]:
    """Yields a shared folder to write in, and says when it is complete."""
    with processes.shared_folder(folder) as partial:
        yield partial
    processes.say(f"wrote {folder}")


def write_result(
    config: SFTConfig,
    subject: Subject,
    trained: Any,
    tokenizer: Path,
    dynamics: Dynamics | None = None,
) -> None:
    """Writes output/model, with the tokenizer from `tokenizer`, or output/adapter.

    Beside an adapter stand its gradient dynamics, where there are some.
    """
    with written(result(config)) as partial:
        if config.lora.rank:
            factors = processes.gather(trained)
            if processes.is_main():
                scaling = scaling_of(config.lora)
                write_adapter(partial, subject.frozen.config, factors, config.model, scaling)
            if dynamics:
                write_maps(partial, dynamics, subject.facts)
            return
        dtype = config.save_dtype
        params = jax.tree.map(lambda x: x.astype(dtype), trained)
        own = dataclasses.replace(subject.frozen.config, dtype=dtype)
        model = dataclasses.replace(subject.frozen, config=own, params=params)
        checkpoint.save_model(partial, model)
        if processes.is_main():
            copy_tokenizer(tokenizer, partial)


# What a checkpoint says besides the state


def new_run() -> str:
    """A name for a run that no other has."""
    return uuid.uuid4().hex[:12]


def refuse_other(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """ValueError, naming what changed, where a checkpoint is of another base, data or target."""
    for name in sorted(there.keys() & here.keys()):
        if there[name] != here[name]:
            raise ValueError(
                f"the checkpoint {path} was trained with {name}={_short(there[name])}, and now it "
                f"is {_short(here[name])}; resume it with its own or name another output"
            )


def _short(value: Any) -> Any:
    return f"{len(value)} modules from {value[0]} on" if isinstance(value, list) else value
