"""One training step: losses of micro-batches, their mean gradient, one update of what trains.

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
from jdllm.runtime import processes, sharding
from jdllm.train.dynamics import Dynamics
from jdllm.train.objective import Batch, batch_loss

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


@partial(jax.jit, static_argnames=("join", "optimizer", "remat"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    frozen: Model,
    optimizer: optax.GradientTransformation,
    join: Join = all_parameters,
    remat: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser update from A micro-batches: `batch` has shapes [A, B, ...].

    The gradient is the mean over the micro-batches. Corruption depends on `key` and the step
    alone, so a resumed run repeats itself bit for bit. Metrics are float32 scalars.
    """
    accumulation, rows = batch.tokens.shape[:2]
    keys = jax.random.split(jax.random.fold_in(key, state.step), accumulation)

    def loss_of(trained: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        dropout_B = jax.random.split(jax.random.fold_in(key, 1), rows)
        return batch_loss(join(trained, frozen, dropout_B), batch, key, remat)

    def add(total: Any, pair: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        (loss, plain), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.trained, *pair)
        return jax.tree.map(jnp.add, total, (gradient, loss, plain)), None

    zero = (jax.tree.map(jnp.zeros_like, state.trained), jnp.zeros(()), jnp.zeros(()))
    total, _ = jax.lax.scan(add, zero, (batch, keys))
    gradient, loss, plain = jax.tree.map(lambda x: x / accumulation, total)
    update, moments = optimizer.update(gradient, state.moments, state.trained)
    trained: Any = optax.apply_updates(state.trained, update)
    metrics = {"loss": loss, "nll": plain, "gradient_norm": optax.tree.norm(gradient)}
    dynamics = state.dynamics and state.dynamics.updated(moments)
    return TrainState(trained, moments, state.step + 1, dynamics), metrics
