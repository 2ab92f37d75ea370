"""Which calls a block makes, full ones and steps, and when it looks whether it is finished."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from jdllm.decode.rows import FULL, STEP, DecodeState, Request
from jdllm.decode.setup import Setup


class Calls(Protocol):
    """What a runner needs of the loop."""

    @property
    def setup(self) -> Setup: ...

    @property
    def request(self) -> Request: ...

    def call(self, state: DecodeState, kind: int) -> DecodeState: ...

    def active(self, state: DecodeState) -> jax.Array: ...

    def masks(self, state: DecodeState) -> jax.Array: ...


def last_step(setup: Setup) -> int:
    """A bound on the calls of a block."""
    limit = setup.step_limit + (setup.plan.refreshes and setup.quirks.late_check)
    if setup.quirks.coupled:
        return 2 * (limit + setup.maximum_unroll)
    return limit + setup.plan.warmup


def open_block(loop: Calls, state: DecodeState) -> DecodeState:
    """The full pass that fills the cache for a block; it also decodes."""
    setup = loop.setup
    if setup.quirks.coupled:
        state = dataclasses.replace(state, clock=_look(loop, state))
    if not setup.plan.refreshes or (setup.quirks.coupled and setup.plan.vicinity):
        return state
    return loop.call(state, FULL)


def unfinished(loop: Calls, state: DecodeState) -> jax.Array:
    """Whether the block needs another iteration."""
    if not loop.setup.quirks.coupled:
        return jnp.any(loop.active(state))
    return (state.clock.unlooked > 0) | (jnp.sum(loop.masks(state)) > 0)


def iterate(loop: Calls, state: DecodeState) -> DecodeState:
    """One step, or a full pass where the plan wants the cache renewed."""
    setup, plan = loop.setup, loop.setup.plan
    if setup.quirks.coupled:
        return _iterate_coupled(loop, state)
    if setup.kv_window:
        return _choose(loop, state, state.step == 0)
    full = jnp.zeros((), bool)
    if plan.refresh_every:
        full |= state.step % plan.refresh_every == 0
    if plan.warmup:
        full |= (state.block == 0) & (state.step < plan.warmup)
    if plan.refresh_every or plan.warmup:
        # The pass behind the last warm one is full as well: it is the cache's first.
        return _choose(loop, state, full)
    return loop.call(state, STEP)


def _choose(loop: Calls, state: DecodeState, full: jax.Array) -> DecodeState:
    return jax.lax.cond(full, lambda s: loop.call(s, FULL), lambda s: loop.call(s, STEP), state)


def _iterate_coupled(loop: Calls, state: DecodeState) -> DecodeState:
    """dInfer's iteration: a full pass where one is due, and at once a step.

    Its vicinity and smoothing runners count every call, the others count iterations. Of vicinity:
    the cache's age is not looked at while it is empty, which costs a second full pass where warm-up
    ends behind block 0, and block 0 is never renewed.
    """
    plan, clock = loop.setup.plan, state.clock
    waiting = clock.unlooked > 0
    clock = jax.tree.map(lambda a, b: jnp.where(waiting, a, b), clock, _look(loop, state))
    every = plan.refresh_every
    if plan.vicinity:
        warm = state.forwards < plan.warmup
        old = clock.seen_block != state.block
        if every:
            old |= state.forwards % every == 0
        due = ~warm & (~clock.filled | (old & (state.block > 0)))
        looked = ~warm & clock.filled
        clock = dataclasses.replace(
            clock,
            seen_block=jnp.where(looked, state.block, clock.seen_block),
            filled=clock.filled | due,
        )
    else:
        warm = jnp.zeros((), bool)
        due = jnp.zeros((), bool)
        if every and plan.refreshes:
            age = state.forwards if loop.setup.smooth else clock.iteration
            due = (age % every == 0) & (state.step > 1)
    clock = dataclasses.replace(clock, unlooked=clock.unlooked - 1, iteration=clock.iteration + 1)
    state = dataclasses.replace(state, clock=clock)
    if plan.vicinity or every:
        state = jax.lax.cond(warm | due, lambda s: loop.call(s, FULL), lambda s: s, state)
        return jax.lax.cond(~warm, lambda s: loop.call(s, STEP), lambda s: s, state)
    return loop.call(state, STEP)


def _look(loop: Calls, state: DecodeState):
    """The clock, set to as many iterations as dInfer makes before it looks again."""
    setup = loop.setup
    least = 2 if setup.whole_blocks else 1  # its runner of block-causal models
    masks = jnp.sum(jnp.where(loop.request.idle, 0, loop.masks(state)))
    ahead = jnp.minimum(masks // setup.expected_tpf, setup.maximum_unroll)
    return dataclasses.replace(state.clock, unlooked=jnp.maximum(ahead, least))
