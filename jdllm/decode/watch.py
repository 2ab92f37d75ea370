"""A request block by block, for those who watch it: the same loop, left after every block.

What nobody watches is one program (`loop.decode`) and pays nothing for this.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jdllm.decode.loop import close_trace, run_block
from jdllm.decode.rows import Request
from jdllm.decode.setup import Setup
from jdllm.decode.start import start
from jdllm.decode.trace import Trace
from jdllm.decode.work import State, Work
from jdllm.model.cache import Cache
from jdllm.model.model import Model
from jdllm.runtime import processes, sharding
from jdllm.runtime.programs import LOOPS

Blocks = Callable[[Model, Request, Model | None], Iterator[State]]


def compile_blocks(
    model: Model,
    request: Request,
    setup: Setup,
    verifier: Model | None = None,
) -> Blocks:
    """A function of model, request and verifier, as `decode`, that yields states.

    The first is the one before any block, then comes one for each block; all calls of `decode` are
    made, in its order. A state's trace holds the calls since the state before, so that recording
    takes the room of one block. Read a state before asking for the next, which takes its buffers.
    """

    def work(model: Model, request: Request, verifier: Model | None) -> Work:
        return Work(model, setup, request, verifier)

    def begin(*inputs) -> State:
        return close_trace(start(work(*inputs), setup.block_calls))

    def advance(state: State, *inputs) -> State:
        fresh = Trace.empty(setup, state.rows.tokens, setup.block_calls, state.forwards)
        return close_trace(run_block(work(*inputs), dataclasses.replace(state, trace=fresh)))

    given = model, request, verifier
    shapes = jax.eval_shape(begin, *given)
    places = lay_out(shapes, model.mesh)
    first = jax.jit(begin, out_shardings=places).lower(*given).compile()
    again = jax.jit(advance, out_shardings=places, donate_argnums=0)
    placed = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
    following = again.lower(placed, *given).compile(LOOPS)

    def run(*inputs) -> Iterator[State]:
        yield (state := first(*inputs))
        done = processes.gather(state.rows.done)
        for _ in range(setup.blocks):
            if np.all(done):
                return
            state = following(state, *inputs)
            done = processes.gather(state.rows.done)
            yield state

    return run


def lay_out(state: State, mesh: Mesh) -> State:
    """Where the arrays of a state lie: rows along the mesh's data axis, cached heads as weights."""

    def by_row(x: jax.ShapeDtypeStruct) -> NamedSharding:
        return sharding.by_row(mesh) if x.ndim else sharding.replicated(mesh)

    def place(x: Cache | jax.ShapeDtypeStruct):
        if not isinstance(x, Cache):
            return by_row(x)
        axes = ("batch", None, "kv_heads", None)
        return jax.tree.map(
            lambda k: NamedSharding(mesh, sharding.spec("cache", k.shape, axes, mesh)), x
        )

    trace = jax.tree.map(lambda _: sharding.replicated(mesh), state.trace)
    placed = jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, Cache))
    return dataclasses.replace(placed, trace=trace)
