"""What is masked, and the loss of predicting it: pure functions of arrays.

Corruption and loss follow LLaDA's SFT recipe as EDIT and d1 run it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jdllm.model.columns import in_chunks
from jdllm.model.mask import Mask
from jdllm.model.model import Model

T_MIN = 1e-3  # the smallest masking probability, so that 1/t stays finite
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
    model: Model, batch: Batch, key: jax.Array, remat: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Loss of one micro-batch, and its plain mean nll over the masked columns (for the log)."""
    noisy_BT, masked_BT, t_B = corrupt(key, batch, model.config.mask_id)
    columns_BT = jnp.broadcast_to(jnp.arange(noisy_BT.shape[1]), noisy_BT.shape)
    visible_BT = columns_BT < batch.lengths[:, None]
    mask, x_BTD = Mask.of(model.config, visible_BT), model.embed(noisy_BT)
    hidden_BTD = model(x_BTD, columns_BT, mask, remat=remat).hidden
    nll_BT = cross_entropy(model, hidden_BTD, batch.tokens)
    plain = jnp.sum(jnp.where(masked_BT, nll_BT, 0.0)) / jnp.maximum(jnp.sum(masked_BT), 1)
    return weighted_loss(nll_BT, masked_BT, t_B, response_columns(batch)), plain
