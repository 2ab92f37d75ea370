"""What is fed to the model and what comes back, where guidance or smoothed inputs change either."""

import jax
import jax.numpy as jnp

from jdllm.decode.layout import put, take, take_rows
from jdllm.decode.rows import Rows
from jdllm.decode.setup import Setup
from jdllm.model.cache import Cache
from jdllm.model.columns import guide, in_chunks
from jdllm.model.mask import Mask
from jdllm.model.model import Model
from jdllm.model.transformer import Output


def feed(
    model: Model,
    setup: Setup,
    rows: Rows,
    cache: Cache | None,
    window_BW: jax.Array,
    ends_B: jax.Array,
    probes: tuple[str, ...] = (),
) -> Output:
    """Hidden states [R, W, D] of the columns fed, the cache after them, and the probes asked for.

    Keys from `ends_B` on are hidden. With guidance there are two rows R for each of the batch: the
    row itself, and the same one with everything given masked out.
    """
    tokens_BT = rows.tokens
    if setup.cfg_scale:
        free_BT = jnp.where(rows.free, tokens_BT, model.config.mask_id)
        tokens_BT = _interleave(tokens_BT, free_BT)
    window_BW, ends_B = paired(setup, window_BW), paired(setup, ends_B)
    if rows.inputs is None:
        x_BWD = model.embed(take(tokens_BT, window_BW))
    else:
        x_BWD = take_rows(rows.inputs, jnp.minimum(window_BW, tokens_BT.shape[1] - 1))
    mask = Mask.of(model.config, ends_B, setup.longest_block)
    return model(x_BWD, window_BW, mask, cache, probes or None)


def guided(model: Model, setup: Setup, hidden_BND: jax.Array) -> jax.Array:
    """Logits [B, N, V] of the columns in view, with guidance where there is some."""
    logits_BNV, scale = model.logits(hidden_BND), setup.cfg_scale
    if not scale:
        return logits_BNV
    pair = logits_BNV.reshape(-1, 2, *logits_BNV.shape[1:])
    return guide(pair[:, 0], pair[:, 1], scale)


def smoothed(
    model: Model,
    setup: Setup,
    before: Rows,
    after: Rows,
    window_BW: jax.Array,
    hidden_BWD: jax.Array,
) -> jax.Array:
    """dInfer's IterSmooth: inputs [B, T, D] in which masks carry what was predicted for them.

    A column that was fed and is still open gets its embedding plus weight * softmax(logits) @
    embeddings; one that was not fed keeps its input. Computed one block length of columns at a
    time, so that no logits of the whole canvas exist.
    """
    smooth, N = setup.smooth, setup.longest_block
    assert smooth is not None and before.inputs is not None
    weight_B = jnp.minimum(smooth.init + smooth.growth * before.nfe, smooth.weight)
    kind = before.inputs.dtype

    def expected(part: tuple[jax.Array]) -> jax.Array:
        return model.expected(jax.nn.softmax(model.logits(part[0]), axis=-1))

    mixed = in_chunks(expected, (hidden_BWD,), N)
    open_BW1 = take(after.open, window_BW)[..., None]
    plus = jnp.where(open_BW1, weight_B[:, None, None].astype(kind) * mixed, 0)
    embedded = model.embed(take(after.tokens, window_BW))
    return put(before.inputs, embedded + plus, window_BW)


def paired(setup: Setup, x_BX: jax.Array) -> jax.Array:
    """Every row twice under guidance, else once."""
    return _interleave(x_BX, x_BX) if setup.cfg_scale else x_BX


def _interleave(a_BX: jax.Array, b_BX: jax.Array) -> jax.Array:
    """Rows a0, b0, a1, b1, ...: pairs stay on one shard of the batch."""
    return jnp.stack([a_BX, b_BX], axis=1).reshape(2 * len(a_BX), *a_BX.shape[1:])
