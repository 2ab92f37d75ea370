"""What a driver works with: parts that stay the same, and what it carries from call to call."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from jdllm.decode.rows import Request, Rows
from jdllm.decode.setup import Setup
from jdllm.decode.trace import Trace
from jdllm.model.cache import Cache
from jdllm.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Work:
    """What stays the same while a request is decoded."""

    model: Transformer
    setup: Setup
    request: Request
    verifier: Transformer | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a driver carries from call to call."""

    rows: Rows
    cache: Cache | None
    forwards: jax.Array
    """int32: model calls of the batch."""
    trace: Trace | None = None
    clock: Any = None
    """What a driver of its own remembers."""


def make_work(
    graph: nnx.GraphDef,
    params: nnx.State,
    request: Request,
    setup: Setup,
    verifier_graph: nnx.GraphDef | None = None,
    verifier_params: nnx.State | None = None,
) -> Work:
    """A request with its models put together."""
    second = nnx.merge(verifier_graph, verifier_params) if verifier_graph is not None else None
    return Work(merged(graph, params, setup.longest_block), setup, request, second)


def merged(graph: nnx.GraphDef, params: nnx.State, block_length: int) -> Transformer:
    """The model; one that attends block by block has blocks as long as the setup says."""
    model = nnx.merge(graph, params)
    if model.config.block_causal:
        model.config = dataclasses.replace(model.config, block_causal=block_length)
    return model
