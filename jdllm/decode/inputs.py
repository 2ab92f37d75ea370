"""What is fed to the models, and the logits that come back."""

from typing import Protocol

import jax
import jax.numpy as jnp

from jdllm.decode.layout import Geometry, put, rows
from jdllm.decode.rows import DecodeState, Request
from jdllm.decode.setup import Setup
from jdllm.model.cache import Cache
from jdllm.model.transformer import Transformer


class Models(Protocol):
    """What is needed of the loop."""

    @property
    def model(self) -> Transformer: ...

    @property
    def setup(self) -> Setup: ...

    @property
    def request(self) -> Request: ...

    @property
    def at(self) -> Geometry: ...


def forward(
    loop: Models,
    state: DecodeState,
    view_BN: jax.Array,
    window_BT: jax.Array,
    ends_B1: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Cache | None]:
    """Hidden states of the columns in view [R, N, D] and of the window, the cache afterwards.

    With guidance there are two rows R for each of the batch. Keys from `ends_B1` on are hidden
    (default: what the plan lets the block see). A shifted model's logits of a column stand in the
    column before; where that is not fed, in the first one fed.
    """
    model, at, scale = loop.model, loop.at, loop.setup.cfg_scale
    ends_B1 = at.visible_end(state) if ends_B1 is None else ends_B1
    visible_B = ends_B1[:, 0]
    tokens_BT = state.tokens
    source_BN = jnp.maximum(view_BN - at.shift, 0)
    if scale:
        given_BT = loop.request.tokens != model.config.mask_id
        unconditional_BT = jnp.where(given_BT, model.config.mask_id, tokens_BT)
        tokens_BT = _interleave(tokens_BT, unconditional_BT)
        visible_B, window_BT, source_BN = (
            _interleave(x, x) for x in (visible_B, window_BT, source_BN)
        )
    if state.inputs is None:
        fed_BT = at.ids(tokens_BT, window_BT)
        x_BTD = model.embed(fed_BT, model.embedding[...].dtype)
    else:
        x_BTD = rows(state.inputs, jnp.minimum(window_BT, tokens_BT.shape[1] - 1))
    hidden_BTD, cache = model(x_BTD, window_BT, visible_B, state.cache)
    inside_BN = jnp.clip(source_BN - window_BT[:, :1], 0, window_BT.shape[1] - 1)
    hidden_BND = rows(hidden_BTD, inside_BN)
    return hidden_BND, hidden_BTD, None if state.cache is None else cache


def guided(loop: Models, hidden_BND: jax.Array) -> jax.Array:
    """Logits [B, N, V] of the columns in view, with guidance where there is some."""
    logits_BNV, scale = loop.model.logits(hidden_BND), loop.setup.cfg_scale
    if scale:
        pair = logits_BNV.reshape(-1, 2, *logits_BNV.shape[1:])
        logits_BNV = pair[:, 1] + (scale + 1) * (pair[:, 0] - pair[:, 1])
    return logits_BNV


def smoothed(
    loop: Models,
    state: DecodeState,
    tokens_BT: jax.Array,
    window_BT: jax.Array,
    hidden_BTD: jax.Array,
) -> jax.Array:
    """dInfer's IterSmooth: inputs [B, T, D] in which masks carry what was predicted for them.

    A column that was fed and is still masked gets its embedding plus weight * softmax(logits) @
    embeddings; one that was not fed keeps its input. Computed a block's length of columns at a
    time, so that no logits of the whole canvas exist.
    """
    model, smooth, N = loop.model, loop.setup.smooth, loop.setup.block_length
    assert smooth is not None and state.inputs is not None
    weight_B = jnp.minimum(smooth.init + smooth.growth * state.nfe, smooth.weight)
    kind = state.inputs.dtype
    table_VD = model.embedding[...].astype(kind)
    B, W = window_BT.shape
    short = -W % N
    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, short), (0, 0)))
    hidden = hidden.reshape(B, -1, N, hidden.shape[-1]).swapaxes(0, 1)

    def expected(hidden_BND: jax.Array) -> jax.Array:
        p_BNV = jax.nn.softmax(model.logits(hidden_BND), axis=-1)
        return jnp.einsum("BNV,VD->BND", p_BNV.astype(kind), table_VD[: p_BNV.shape[-1]])

    mixed = jax.lax.map(expected, hidden).swapaxes(0, 1).reshape(B, W + short, -1)[:, :W]
    ids_BT = loop.at.ids(tokens_BT, window_BT)
    open_BT1 = (ids_BT == model.config.mask_id)[..., None]
    plus = jnp.where(open_BT1, weight_B[:, None, None].astype(kind) * mixed, 0)
    return put(state.inputs, model.embed(ids_BT, kind) + plus, window_BT)


def _interleave(a_BX: jax.Array, b_BX: jax.Array) -> jax.Array:
    """Rows a0, b0, a1, b1, ...: pairs stay on one shard of the batch."""
    return jnp.stack([a_BX, b_BX], axis=1).reshape(2 * len(a_BX), *a_BX.shape[1:])
