"""How a request begins: canvases become rows, and what stands before them is read."""

import jax.numpy as jnp

from jdllm.decode import verify
from jdllm.decode.keys import prefill
from jdllm.decode.rows import Rows
from jdllm.decode.trace import Trace
from jdllm.decode.work import State, Work


def start(work: Work, calls: int = 0) -> State:
    """The state before the first block; with a block cache the prompts' keys are in it.

    With `calls` it has room to record so many of them.
    """
    model, setup, request = work.model, work.setup, work.request
    B, T = request.tokens.shape
    cache = None
    if setup.plan.cached:
        cache = model.empty_cache(2 * B if setup.cfg_scale else B, T)
        shared = request.prefixes
        cache = cache if shared is None else cache.begun(shared.cache, shared.which)
    state = State(
        rows=start_rows(work),
        cache=cache,
        forwards=jnp.zeros((), jnp.int32),
        trace=Trace.empty(setup, request.tokens, calls, jnp.zeros((), jnp.int32))
        if calls
        else None,
    )
    if setup.driver:
        return setup.driver.start(work, state)
    return prefill(work, state, ~state.rows.done & (state.rows.first > 0))


def start_rows(work: Work) -> Rows:
    """The rows of a request: every generated column open, no block begun, the prompts read."""
    model, setup, request = work.model, work.setup, work.request
    (B, T), prompt_B = request.tokens.shape, request.prompt_lengths
    zero_B, no_B, columns_T = jnp.zeros(B, jnp.int32), jnp.zeros(B, bool), jnp.arange(T)
    end_B = setup.canvas_length(prompt_B)
    if request.ends is not None:
        end_B = jnp.minimum(end_B, request.ends)
    open_BT = (columns_T >= prompt_B[:, None]) & (columns_T < end_B[:, None])
    open_BT &= request.tokens == model.config.mask_id
    memory = setup.unmask.start(B, setup.view.length(T), setup.block_calls)
    if work.verifier:
        memory |= {"verifier": verify.read_prompt(work.verifier, request)}
    return Rows(
        tokens=request.tokens, open=open_BT, free=open_BT,
        prompt=prompt_B, end=end_B, keys=request.keys, done=request.idle, nfe=zero_B,
        block=zero_B, first=setup.first_block(prompt_B), last=setup.first_block(prompt_B),
        step=zero_B, opened=zero_B, left=no_B, due=zero_B - 1,
        calls=jnp.zeros((B, setup.blocks), jnp.int32), exits=jnp.zeros((B, setup.blocks), bool),
        dirty=no_B, accepted=zero_B,
        unmask=memory,
        stop=setup.stop.start(request.tokens),
        inputs=model.embed(request.tokens) if setup.smooth else None,
    )  # fmt: skip
