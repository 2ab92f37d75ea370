"""Memory of a training step by part: what one device holds, and what XLA sets aside besides.

`plan_step` reads the program of a run that is about to start. `plan_training` needs neither weights
nor the mesh: parts are arithmetic on shapes, the rest is what XLA sets aside for a device's share
of a few layers, and a straight line from there.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from jdllm.decode.memory import share
from jdllm.model.config import ModelConfig
from jdllm.model.linear import Module, modules
from jdllm.model.lora import Adapter, Factors, LoraConfig, find, shapes
from jdllm.model.model import abstract, named
from jdllm.model.quantise import quantise_params
from jdllm.model.transformer import Remat
from jdllm.model.weights import placed
from jdllm.runtime import sharding
from jdllm.train.entropy import LOGIT_BYTES
from jdllm.train.objective import Batch, Objective
from jdllm.train.optimiser import Recipe, make_optimizer
from jdllm.train.step import TrainState, all_parameters, beside, train_step

# From the fourth layer on, each one more adds the same to what a program needs.
FEW, MORE = 4, 5


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """Bytes of one device while it trains."""

    frozen: int
    """Weights that do not change; 0 where all parameters are trained."""
    trained: int
    """Parameters or factors, in float32."""
    moments: int
    gradients: int
    """Their sum over micro-batches, in float32."""
    logits: int
    """The chunk of logits that the loss reads at a time."""
    activations: int
    """All else that the program sets aside at its fullest, a micro-batch's own gradient too."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def held(tree: Any) -> int:
    """Bytes that one device holds of placed arrays."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.prng_key]
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    return sum(
        math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True)
    )


def plan_step(state: TrainState, batch: Batch, key: jax.Array, **fixed: Any) -> TrainPlan:
    """The plan of `train_step` for these arguments: it is compiled here, and runs from then on."""
    program = train_step.lower(state, batch, key, **fixed).compile()
    found, frozen = program.memory_analysis(), fixed["frozen"]
    scratch = int(found.temp_size_in_bytes) if found else 0
    shape = batch.tokens.sharding.shard_shape(batch.tokens.shape)
    trained = held(state.trained)
    logits = min(LOGIT_BYTES, math.prod(shape[1:]) * frozen.config.vocab * 4)
    return TrainPlan(
        frozen=held(frozen.params),
        trained=trained,
        moments=held(state.moments),
        gradients=trained,
        logits=logits,
        activations=max(scratch - trained - logits, 0),
    )


# Before anything is loaded


@dataclasses.dataclass(frozen=True)
class Work:
    """What is trained, and on what."""

    config: ModelConfig
    """With the dtype that frozen weights are stored in."""
    mesh: AbstractMesh
    objective: Objective
    lora: LoraConfig
    rows: int
    """Of a micro-batch, over the whole mesh."""
    columns: int
    accumulation: int = 1
    dtype: str = "bfloat16"
    """What is computed in."""
    remat: Remat = "none"


def plan_training(work: Work) -> TrainPlan:
    """What a device holds while it trains; ValueError where the mesh or the targets do not fit."""
    config, mesh, lora = work.config, work.mesh, work.lora
    wide = dataclasses.replace(config, dtype="float32")
    if lora.rank:
        frozen = placed_bytes(_frozen(config, lora), mesh)
        trained = factor_bytes(config, lora, mesh)
    else:
        frozen, trained = 0, placed_bytes(abstract(wide).params, mesh)
    if config.layers <= MORE:
        rest = _rest(work, config.layers)
    else:
        few, more = (_rest(work, layers) for layers in (FEW, MORE))
        rest = few + (config.layers - FEW) * max(more - few, 0)
    rows = -(-work.rows // mesh.shape["data"])
    logits = min(LOGIT_BYTES, rows * work.columns * share(config, mesh).vocab * 4)
    return TrainPlan(frozen, trained, 2 * trained, trained, logits, max(rest, 0))


def factor_bytes(config: ModelConfig, lora: LoraConfig, mesh: AbstractMesh) -> int:
    """Bytes that one device holds of float32 factors; 0 without a rank."""
    return sum(
        _bytes(shape, axes, mesh, 4)
        for module in (_adapted(config, lora) if lora.rank else {}).values()
        for shape, axes in shapes(module, lora.rank).values()
    )


def placed_bytes(params: Any, mesh: AbstractMesh) -> int:
    """Bytes that one device holds of abstract parameters, quantised or not."""
    total = 0
    for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        value, axes = leaf.get_value(), leaf.get_metadata("axes")
        for array, own in zip(jax.tree.leaves(value), placed(value, axes), strict=True):
            total += _bytes(array.shape, own, mesh, array.dtype.itemsize)
    return total


def _bytes(shape: Sequence[int], axes: sharding.Axes, mesh: AbstractMesh, size: int) -> int:
    spec = sharding.spec("a weight", shape, axes, mesh)
    return math.prod(shape) * size // math.prod(mesh.shape[axis] for axis in spec if axis)


def _frozen(config: ModelConfig, lora: LoraConfig) -> Any:
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract(config).params)
    return jax.eval_shape(quantise_params, params) if lora.base == "int8" else params


def _adapted(config: ModelConfig, lora: LoraConfig) -> dict[str, Module]:
    own = modules(named(abstract(config)))
    return {name: own[name] for name in find(own, lora.targets)}


def _rest(work: Work, layers: int) -> int:
    """What XLA sets aside for a device's share of some layers, without gradients and logits."""
    shape: Any = jax.ShapeDtypeStruct
    moe = work.config.moe
    if moe and len(moe.dense_layers) < work.config.layers:
        moe = dataclasses.replace(moe, dense_layers=())
    # Frozen weights in the compute dtype: a CPU would widen them all, and keep both.
    some = dataclasses.replace(work.config, layers=layers, moe=moe, dtype=work.dtype)
    some = share(some, work.mesh)
    static = dataclasses.replace(abstract(some), params=None, dtype=work.dtype)
    if work.lora.rank:
        trained: Any = {}
        for name, module in _adapted(some, work.lora).items():
            a, b = (shape(x, jnp.float32) for x, _ in shapes(module, work.lora.rank).values())
            trained[name] = Factors(a, b, work.lora.scale)
        adapter = Adapter({}, work.lora.dropout)
        frozen = dataclasses.replace(static, params=_frozen(some, work.lora), adapter=adapter)
        join = beside
    else:
        wide = abstract(dataclasses.replace(some, dtype="float32"))
        trained = jax.tree.map(lambda x: shape(x.shape, x.dtype), wide.params)
        frozen, join = static, all_parameters
    optimizer = make_optimizer(Recipe())
    state = TrainState(trained, jax.eval_shape(optimizer.init, trained), shape((), jnp.int32))
    rows = -(-work.rows // work.mesh.shape["data"])
    many, canvas = (work.accumulation, rows), (work.accumulation, rows, work.columns)
    batch = Batch(
        shape(canvas, jnp.int32), shape(canvas, jnp.bool),
        shape(canvas, jnp.int32), shape(many, jnp.int32),
    )  # fmt: skip
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = train_step.lower(
        state, batch, key, frozen=frozen, objective=work.objective, optimizer=optimizer,
        join=join, remat=work.remat,
    )  # fmt: skip
    found = lowered.compile({"xla_gpu_autotune_level": 0}).memory_analysis()
    if found is None:
        raise ValueError(f"XLA for {jax.default_backend()} does not tell what a program needs")
    gradients = sum(leaf.size * 4 for leaf in jax.tree.leaves(trained))
    logits = min(LOGIT_BYTES, rows * work.columns * some.vocab * 4)
    return int(found.temp_size_in_bytes) - gradients - logits


def shown(plan: TrainPlan, memory: int | None) -> str:
    """The plan as a table in GB; `memory` is what a device has, None where it does not tell."""
    parts = [
        f"  {field.name:<12}{getattr(plan, field.name) / 1e9:>9.3f}"
        for field in dataclasses.fields(plan)
    ]
    verdict = ""
    if memory is not None:
        word = "fits" if plan.total <= memory else "does not fit"
        verdict = f"  {word} in {memory / 1e9:.3f}"
    total = f"  {'total':<12}{plan.total / 1e9:>9.3f}{verdict}"
    return "\n".join(["GB on each device", *parts, total])
