"""Memory of a training step by part: what one device holds, and what XLA sets aside besides."""

import dataclasses
import math
from typing import Any

import jax

from jdllm.train.objective import LOGIT_BYTES, Batch
from jdllm.train.step import TrainState, train_step


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
