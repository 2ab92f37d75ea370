"""One training step: one loss of the whole batch, its gradient, one update of what trains.

What trains is a pytree of its own: all parameters, or some factors beside frozen ones. The rest is
a Model, an argument of the step. A `Join` makes the Model of both that computes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jdllm.model.lora import Adapter
from jdllm.model.model import Model
from jdllm.model.transformer import Remat
from jdllm.runtime import processes, sharding
from jdllm.train.dynamics import Dynamics
from jdllm.train.objective import HIDDEN, Batch, Noisy, Objective, corrupt, losses

type Join = Callable[[Any, Model, jax.Array | None], Model]
"""From what trains, what is frozen and a dropout key per row [B] (None: no dropout) to a Model."""


def all_parameters(params: Any, frozen: Model, _: jax.Array | None = None) -> Model:
    """The Join of full fine-tuning: of `frozen` only what is static counts."""
    return dataclasses.replace(frozen, params=params)


def beside(factors: Any, frozen: Model, dropout: jax.Array | None = None) -> Model:
    """The Join of LoRA: `factors` {module name: Factors} beside the frozen weights.

    `frozen` has an Adapter without factors, which says how much is dropped out.
    """
    adapter = frozen.adapter or Adapter({})
    keys = dropout if adapter.dropout else None
    adapter = dataclasses.replace(adapter, factors=factors, keys=keys)
    return dataclasses.replace(frozen, adapter=adapter)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes and a checkpoint keeps. Weights and moments are float32."""

    trained: Any
    """Parameters, or factors: a pytree of float32 arrays."""
    moments: Any
    step: jax.Array
    dynamics: Dynamics | None = None
    """Means of the optimiser's updates, where they are asked for."""


def create_state(
    trained: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    dynamics: Callable[[Any], Dynamics] | None = None,
) -> TrainState:
    """A fresh TrainState: float32 master weights, zero moments (placed alike), step 0.

    Scalars are put on the mesh here, so that the second step finds the first one's program.
    """
    master = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    watched = dynamics(master) if dynamics else None
    state = TrainState(master, optimizer.init(master), jnp.zeros((), jnp.int32), watched)
    return jax.tree.map(
        lambda x: x if x.ndim else processes.device_put(x, sharding.replicated(mesh)), state
    )


@partial(
    jax.jit,
    static_argnames=("objective", "optimizer", "join", "remat", "micro"),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    frozen: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    join: Join = all_parameters,
    remat: Remat = "none",
    micro: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser update from A micro-batches: `batch` has shapes [A, B, ...].

    The loss is one sum over the whole batch with one divisor, however the batch is split; with
    `micro` it is the mean of the micro-batches' own losses, as EDIT and d1 have it. Noise depends
    on `key`, the examples and their visits alone. Metrics are float32 scalars: loss, nll (plain
    mean over the masked columns), the gradient's norm before clipping, and how many columns of
    examples there were.
    """
    mask_id = frozen.config.mask_id
    noisy = jax.vmap(lambda one: corrupt(objective, key, one, mask_id))(batch)
    counts_A = jnp.sum(noisy.counts, axis=(1, 2))
    divisor = (
        counts_A * len(counts_A) if micro else jnp.broadcast_to(counts_A.sum(), counts_A.shape)
    )
    divisor_A = jnp.maximum(divisor, 1e-6)  # an empty micro-batch has loss 0

    def loss_of(trained: Any, noisy: Noisy, divisor: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = join(trained, frozen, noisy.dropout)
        total, plain = losses(objective, model, noisy, remat, state.step)
        return total / divisor, plain

    def add(total: Any, part: tuple[Noisy, jax.Array]) -> tuple[Any, None]:
        (loss, plain), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.trained, *part)
        return jax.tree.map(jnp.add, total, (gradient, loss, plain)), None

    zero = (jax.tree.map(jnp.zeros_like, state.trained), jnp.zeros(()), jnp.zeros(()))
    (gradient, loss, plain), _ = jax.lax.scan(add, zero, (noisy, divisor_A))
    update, moments = optimizer.update(gradient, state.moments, state.trained)
    trained: Any = optax.apply_updates(state.trained, update)
    nll = plain / jnp.maximum(jnp.sum(noisy.masked), 1)
    tokens = jnp.sum(batch.example != HIDDEN, dtype=jnp.float32)
    metrics = {"loss": loss, "nll": nll, "gradient_norm": optax.tree.norm(gradient)}
    metrics["tokens"] = tokens
    dynamics = state.dynamics and state.dynamics.updated(moments)
    return TrainState(trained, moments, state.step + 1, dynamics), metrics


@partial(jax.jit, static_argnames=("objective", "join", "levels"))
def held_out(
    trained: Any,
    batch: Batch,
    key: jax.Array,
    *,
    frozen: Model,
    objective: Objective,
    levels: tuple[float, ...],
    join: Join = all_parameters,
) -> tuple[jax.Array, jax.Array]:
    """Sums of nll over masked columns of `batch` [A, B, ...], and their number, per level [N].

    The masked columns are the same each time: a function of the key, the example and the level.
    """
    plain = dataclasses.replace(objective, complementary=False, confidence=0.0)
    model = join(trained, frozen, None)

    def at(pair: tuple[jax.Array, Batch]) -> tuple[jax.Array, jax.Array]:
        level, part = pair
        noisy = corrupt(plain, key, part, frozen.config.mask_id, level)
        return losses(plain, model, noisy)[1], jnp.sum(noisy.masked)

    def over(level: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts = jnp.full(len(batch.tokens), level)
        return jax.tree.map(jnp.sum, jax.lax.map(at, (parts, batch)))

    return jax.lax.map(over, jnp.array(levels))
