"""The causal model that judges drafts (APD), with a cache of its own."""

from typing import Any

import jax
import jax.numpy as jnp

from jdllm.decode.rows import Request
from jdllm.model.cache import Cache
from jdllm.model.mask import Mask
from jdllm.model.model import Model
from jdllm.unmask.view import Verify


def read_prompt(model: Model, request: Request) -> Cache:
    """The verifier's cache after every column was fed once; those of the prompt are final."""
    B, T = request.tokens.shape
    columns_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    return _run(model, request.tokens, columns_BT, model.empty_cache(B, T))[1]


def judge(model: Model, tokens_BT: jax.Array, view_BN: jax.Array) -> Verify:
    """The verifier's logits of drafts in the columns in view.

    Its logits of a column stand in the column before, so the last final token is fed again.
    """
    T = tokens_BT.shape[1]
    before_BN = view_BN - 1
    last_B1 = jnp.take_along_axis(tokens_BT, before_BN[:, :1], axis=1, mode="clip")

    def logits(drafts_BN: jax.Array, cache: Any) -> tuple[jax.Array, Cache]:
        fed_BN = jnp.concatenate([last_B1, drafts_BN[:, :-1]], axis=1)
        hidden_BND, cache = _run(model, fed_BN, jnp.where(before_BN < T, before_BN, view_BN), cache)
        return model.logits(hidden_BND), cache

    return Verify(model.config.vocab, logits)


def _run(
    model: Model, ids_BT: jax.Array, columns_BT: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    mask = Mask.of(model.config, jnp.full(ids_BT.shape[0], cache.length))
    x_BTD = model.embed(jnp.minimum(ids_BT, model.config.vocab - 1))
    found = model(x_BTD, columns_BT, mask, cache)
    assert found.cache is not None
    return found.hidden, found.cache
