"""What many rows begin with, computed once for all of them."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jdllm.decode.work import merged
from jdllm.model.cache import Cache


@partial(jax.jit, static_argnames=("graph", "block_length"))
def read_prefix(
    graph: nnx.GraphDef, params: nnx.State, tokens_FP: jax.Array, block_length: int
) -> Cache:
    """Keys and values of what rows begin with, whole blocks, for `Request.prefixes`."""
    model = merged(graph, params, block_length)
    x_FPD = model.embed(tokens_FP, model.embedding[...].dtype)
    columns_FP = jnp.broadcast_to(jnp.arange(tokens_FP.shape[1]), tokens_FP.shape)
    _, cache = model(x_FPD, columns_FP, jnp.ones(tokens_FP.shape, bool))
    return cache
