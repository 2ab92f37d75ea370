"""What many rows begin with, computed once for all of them."""

from functools import partial

import jax
import jax.numpy as jnp

from jdllm.model.cache import Cache
from jdllm.model.mask import Mask
from jdllm.model.model import Model


@partial(jax.jit, static_argnames=("block_length",))
def read_prefix(model: Model, tokens_FP: jax.Array, block_length: int) -> Cache:
    """Keys and values of what rows begin with, whole blocks, for `Request.prefixes`."""
    F, P = tokens_FP.shape
    columns_FP = jnp.broadcast_to(jnp.arange(P), (F, P))
    mask = Mask.of(model.config, jnp.ones((F, P), bool), block_length)
    found = model(model.embed(tokens_FP), columns_FP, mask, model.empty_cache(F, P))
    assert found.cache is not None
    return found.cache
