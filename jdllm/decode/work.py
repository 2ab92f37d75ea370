"""What a driver works with: parts that stay the same, and what it carries from call to call."""

import dataclasses
from typing import Any

import jax

from jdllm.decode.rows import Request, Rows
from jdllm.decode.setup import Setup
from jdllm.decode.trace import Trace
from jdllm.model.cache import Cache
from jdllm.model.model import Model


@dataclasses.dataclass(frozen=True)
class Work:
    """What stays the same while a request is decoded."""

    model: Model
    setup: Setup
    request: Request
    verifier: Model | None = None


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
