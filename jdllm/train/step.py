"""Masked-diffusion training: corrupt a response, predict what was masked, weight by 1/t.

Corruption and loss follow LLaDA's SFT recipe as EDIT and d1 run it. Everything here is a pure
function of arrays; files, tokens and progress bars belong to sft.py.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jdllm.model.columns import in_chunks
from jdllm.model.mask import Mask
from jdllm.model.model import Model
from jdllm.runtime import processes, sharding

T_MIN = 1e-3  # the smallest masking probability, so that 1/t stays finite
SCHEDULES = ("linear", "cosine")
LOGIT_BYTES = 256 << 20  # cross entropy is chunked so that no logits array grows beyond this


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Canvases with a prompt, a response and (maybe) hidden columns at the end."""

    tokens: jax.Array
    """int32 [..., B, T]."""
    prompt_lengths: jax.Array
    """int32 [..., B]: columns that are never masked and carry no loss."""
    lengths: jax.Array
    """int32 [..., B]: columns beyond are hidden from attention and carry no loss."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes and a checkpoint keeps. Weights and moments are float32."""

    params: nnx.State
    moments: Any
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of the optimiser."""

    steps: int = 1000
    learning_rate: float = 1e-5
    schedule: str = "linear"
    """linear or cosine, both down to zero after the warm-up."""
    warmup: int = 0
    weight_decay: float = 0.1
    """Decoupled; applied to matrices only."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule} must be one of {', '.join(SCHEDULES)}")
        if self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise ValueError(
                f"steps={self.steps} must be at least 1 and warmup={self.warmup} between 0 and it"
            )
        for name in ("learning_rate", "clip", "epsilon"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a number above 0")


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """Learning rate by update count (from 0): linear warm-up, then linear or cosine decay to 0."""
    decay = max(recipe.steps - recipe.warmup, 1)
    tails = {
        "linear": optax.linear_schedule(recipe.learning_rate, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(recipe.learning_rate, decay),
    }
    rise = optax.linear_schedule(0.0, recipe.learning_rate, max(recipe.warmup, 1))
    return optax.join_schedules([rise, tails[recipe.schedule]], [recipe.warmup])


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """optax.adamw behind a clip of the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(
            learning_rate(recipe),
            b1=recipe.beta1,
            b2=recipe.beta2,
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def response_columns(batch: Batch) -> jax.Array:
    """bool [B, T]: the columns that belong to the response, its padding included."""
    columns = jnp.arange(batch.tokens.shape[-1])
    after_prompt = columns >= batch.prompt_lengths[..., None]
    return after_prompt & (columns < batch.lengths[..., None])


def corrupt(
    key: jax.Array, batch: Batch, mask_id: int, uniform_B: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Masks each response token with probability t, one t per row.

    t = (1 - T_MIN) u + T_MIN with u uniform in [0, 1), or `uniform_B` where the caller fixes it.
    Returns the noisy tokens [B, T], the mask of corrupted columns [B, T] and t [B].
    """
    rate_key, mask_key = jax.random.split(key)
    rows = batch.tokens.shape[:1]
    u_B = jax.random.uniform(rate_key, rows) if uniform_B is None else uniform_B
    t_B = (1 - T_MIN) * u_B + T_MIN
    hit_BT = jax.random.uniform(mask_key, batch.tokens.shape) < t_B[:, None]
    masked_BT = hit_BT & response_columns(batch)
    return jnp.where(masked_BT, mask_id, batch.tokens), masked_BT, t_B


def weighted_loss(
    nll_BT: jax.Array, masked_BT: jax.Array, t_B: jax.Array, response_BT: jax.Array
) -> jax.Array:
    """Sum of nll/t over masked columns, over the number of ALL response columns.

    The divisor counts every response column, masked or not, padding included (EDIT section 1.2).
    A batch with nothing masked has loss 0.
    """
    total = jnp.sum(jnp.where(masked_BT, nll_BT / t_B[:, None], 0.0))
    return total / jnp.maximum(jnp.sum(response_BT), 1)


def cross_entropy(model: Model, hidden_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Negative log likelihood [B, T] in float32, without ever holding all logits.

    Columns are taken in chunks whose logits are computed again in the backward pass.
    """
    B, T = tokens_BT.shape
    count = min(-(-B * T * model.config.vocab * 4 // LOGIT_BYTES), T)

    @jax.checkpoint
    def chunk(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = model.logits(pair[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, pair[1])

    return in_chunks(chunk, (hidden_BTD, tokens_BT), -(-T // count))


def batch_loss(
    params: nnx.State, model: Model, batch: Batch, key: jax.Array, remat: bool
) -> tuple[jax.Array, jax.Array]:
    """Loss of one micro-batch, and its plain mean nll over the masked columns (for the log).

    The model has `params` in place of its own.
    """
    model = dataclasses.replace(model, params=params)
    noisy_BT, masked_BT, t_B = corrupt(key, batch, model.config.mask_id)
    columns_BT = jnp.broadcast_to(jnp.arange(noisy_BT.shape[1]), noisy_BT.shape)
    visible_BT = columns_BT < batch.lengths[:, None]
    mask, x_BTD = Mask.of(model.config, visible_BT), model.embed(noisy_BT)
    hidden_BTD = model(x_BTD, columns_BT, mask, remat=remat).hidden
    nll_BT = cross_entropy(model, hidden_BTD, batch.tokens)
    plain = jnp.sum(jnp.where(masked_BT, nll_BT, 0.0)) / jnp.maximum(jnp.sum(masked_BT), 1)
    return weighted_loss(nll_BT, masked_BT, t_B, response_columns(batch)), plain


def create_state(
    params: nnx.State, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A fresh TrainState: float32 master weights, zero moments (placed alike), step 0.

    Scalars are put on the mesh here, so that the second step finds the first one's program.
    """
    master = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    state = TrainState(master, optimizer.init(master), jnp.zeros((), jnp.int32))
    return jax.tree.map(
        lambda x: x if x.ndim else processes.device_put(x, sharding.replicated(mesh)), state
    )


@partial(
    jax.jit,
    static_argnames=("optimizer", "remat"),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: Model,
    optimizer: optax.GradientTransformation,
    remat: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser update from A micro-batches: `batch` has shapes [A, B, ...].

    Of `model` only what is static counts, its compute dtype for one: the weights are the state's.
    The gradient is the mean over the micro-batches. Corruption depends on `key` and the step
    alone, so a resumed run repeats itself bit for bit. Metrics are float32 scalars.
    """
    accumulation = batch.tokens.shape[0]
    keys = jax.random.split(jax.random.fold_in(key, state.step), accumulation)

    def add(total: Any, pair: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        (loss, plain), gradient = jax.value_and_grad(batch_loss, has_aux=True)(
            state.params, model, *pair, remat
        )
        return jax.tree.map(jnp.add, total, (gradient, loss, plain)), None

    zero = (jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()), jnp.zeros(()))
    total, _ = jax.lax.scan(add, zero, (batch, keys))
    gradient, loss, plain = jax.tree.map(lambda x: x / accumulation, total)
    update, moments = optimizer.update(gradient, state.moments, state.params)
    params: Any = optax.apply_updates(state.params, update)
    metrics = {"loss": loss, "nll": plain, "gradient_norm": optax.tree.norm(gradient)}
    return TrainState(params, moments, state.step + 1), metrics
