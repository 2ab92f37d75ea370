"""Calls that only write keys and values: of prompts, and of blocks that are finished."""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.decode.feed import feed
from jdllm.decode.layout import off_canvas, span
from jdllm.decode.rows import Rows
from jdllm.decode.setup import Setup
from jdllm.decode.trace import COMMIT, PREFILL
from jdllm.decode.work import State, Work
from jdllm.model.cache import Cache
from jdllm.model.model import Model


def prefill(work: Work, state: State, rows_B: jax.Array) -> State:
    """Into a block cache the keys of everything before the first blocks, in the given rows.

    What was computed before, for many rows at once, is left out.
    """
    if work.setup.plan.kind != "block":
        return state
    (B, T), shared = state.rows.tokens.shape, work.request.prefixes
    own = jnp.arange(shared.length if shared else 0, T - work.setup.gen_length)
    columns_BW = jnp.broadcast_to(own, (B, len(own)))
    return write_keys(work, state, columns_BW, state.rows.first, rows_B, PREFILL)


def commit(work: Work, state: State, rows_B: jax.Array) -> State:
    """Into a block cache the keys of a block's final tokens, in the given rows."""
    if work.setup.plan.kind != "block":
        return state
    columns_BW = span(state.rows.first, work.setup.longest_block)
    return write_keys(work, state, columns_BW, state.rows.last, rows_B, COMMIT)


def write_keys(
    work: Work,
    state: State,
    columns_BW: jax.Array,
    ends_B: jax.Array,
    rows_B: jax.Array,
    kind: int,
) -> State:
    """A call that only writes keys, made where some row wants it, counted and recorded."""

    def write(state: State) -> State:
        rows, cache = absorb(
            work.model, work.setup, state.rows, state.cache, columns_BW, ends_B, rows_B
        )
        trace = state.trace and state.trace.called(state.forwards, state.rows.tokens, kind)
        return dataclasses.replace(
            state, rows=rows, cache=cache, forwards=state.forwards + 1, trace=trace
        )

    return jax.lax.cond(jnp.any(rows_B), write, lambda state: state, state)


def absorb(
    model: Model,
    setup: Setup,
    rows: Rows,
    cache: Cache | None,
    columns_BW: jax.Array,
    ends_B: jax.Array,
    active_B: jax.Array,
) -> tuple[Rows, Cache | None]:
    """A model call that only writes keys and values of active rows, of columns before `ends_B`."""
    off_BW = (columns_BW >= ends_B[:, None]) | ~active_B[:, None]
    columns_BW = off_canvas(columns_BW, off_BW, rows.tokens.shape[1])
    cache = feed(model, setup, rows, cache, columns_BW, ends_B).cache
    return dataclasses.replace(rows, nfe=rows.nfe + active_B, dirty=rows.dirty & ~active_B), cache
