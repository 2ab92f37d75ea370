"""What a model needs on a mesh, found out before anything is loaded."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jdllm.convert.families import COMMANDS, read_facts
from jdllm.convert.fetch import fetch
from jdllm.decode import DecodeConfig
from jdllm.decode.memory import Planner
from jdllm.load import compute_dtype
from jdllm.model.config import NAMED, ModelConfig, count_parameters, is_converted
from jdllm.model.lora import LoraConfig
from jdllm.model.transformer import Remat
from jdllm.runtime import sharding
from jdllm.runtime.machine import read_memory
from jdllm.store import checkpoint
from jdllm.train.memory import Work, factor_bytes, plan_training
from jdllm.train.objective import choose


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
    weights: Literal["int8", "fp8"] | None = None
    """Linear maps in 8 bits, as convert's weights= makes them (default: as the model has them)."""
    decode: DecodeConfig = DecodeConfig()
    train: bool = False
    """Plan a training step of `batch` rows instead of decoding."""
    lora: LoraConfig = LoraConfig()
    accumulation: int = 1
    """Micro-batches of a training step."""
    remat: Remat = "none"
    """What training computes again in the backward pass: products (all but them) or layers."""
    json: bool = False
    """Print one JSON object, in bytes, instead of the table."""

    def __post_init__(self):
        if self.batch < 1 or (self.length or 1) < 1 or not (self.memory or 1) > 0:
            raise ValueError("batch and length must be 1 or more, and memory more than 0")
        if self.accumulation < 1 or self.batch % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} must divide batch={self.batch}")
        changed = self.remat != "none" or self.lora.base != "stored"
        if not self.train and (changed or self.accumulation > 1):
            raise ValueError("remat, accumulation and lora.base are of training; add train=true")


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
            f"{facts['model']}: {facts['parameters'] / 1e9:.2f} B parameters in {facts['held']}",
            f"mesh {mesh}, batch {facts['batch']}, {facts['columns']} columns, {facts['work']}",
            "",
            "GB on each device",
            *parts,
            f"{'total':<14}{facts['total'] / 1e9:>8.3f}  {verdict} in {facts['memory'] / 1e9:.3f}",
            *(f"{name}: {value}" for name, value in facts["besides"].items()),
        ]
    )


def find_plan(config: PlanConfig) -> dict[str, Any]:
    """Returns what the model needs on one device, in bytes, by part."""
    model = describe_model(config.model, config.allow_unknown)
    elsewhere = config.memory is not None
    if not elsewhere or config.dtype != "auto":
        model = dataclasses.replace(model, dtype=compute_dtype(config.dtype, model.dtype))
    model = dataclasses.replace(model, weights=config.weights or model.weights)
    length = config.length or min(1024, model.max_length)
    memory = int(config.memory * 1e9) if config.memory else memory_here()
    plan = training_plan if config.train else decoding_plan
    facts = {
        "model": config.model,
        "parameters": count_parameters(model),
        "dtype": model.dtype,
        "weights": model.weights,
        "held": model.held,
        "mesh": dict(sharding.abstract_mesh(config.mesh).shape),
        "batch": config.batch,
        "columns": length,
        "memory": memory,
    } | plan(config, model, length, memory)
    total = sum(facts["bytes"].values())
    return facts | {"total": total, "fits": total <= memory}


def decoding_plan(
    config: PlanConfig, model: ModelConfig, length: int, memory: int
) -> dict[str, Any]:
    """Bytes by part, and the largest batch that fits; with `lora.rank` an adapter's, too."""
    mesh = sharding.abstract_mesh(config.mesh)
    decoding = config.decode.resolve(gen_length=min(128, length), model=model)
    planner = Planner(model, mesh, length, decoding, config.memory is not None)
    factors = factor_bytes(model, config.lora, mesh)
    return {
        "work": f"{decoding.block_length} a block, cache {decoding.cache}",
        "block_length": decoding.block_length,
        "cache": decoding.cache,
        "bytes": dataclasses.asdict(planner.plan(config.batch))
        | ({"factors": factors} if factors else {}),
        "besides": {"largest batch that fits": planner.largest_batch(memory - factors)},
    }


def training_plan(
    config: PlanConfig, model: ModelConfig, length: int, memory: int
) -> dict[str, Any]:
    """Bytes by part of a training step; a CPU that plans for a GPU compiles for float32."""
    widened = config.memory is not None and jax.default_backend() == "cpu"
    work = Work(
        model,
        sharding.abstract_mesh(config.mesh),
        choose("auto", model),
        config.lora,
        config.batch // config.accumulation,
        length,
        config.accumulation,
        "float32" if widened else model.dtype,
        config.remat,
    )
    trained = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "all parameters"
    return {
        "work": f"{config.accumulation} micro-batch(es), training {trained}",
        "bytes": dataclasses.asdict(plan_training(work)),
        "besides": {"activations": "an upper bound, in float32"} if widened else {},
    }
