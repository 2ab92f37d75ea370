"""Decoding in lockstep: block diffusion, jitted whole, no host round trip between steps.

A row's first block starts right behind its own prompt, or at a multiple of the block length.
Blocks are the outer `while_loop`, steps the inner one; a finished row is frozen.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.decode import verify
from jdllm.decode.keys import commit
from jdllm.decode.look import Call, stop_view
from jdllm.decode.rows import Request, Rows, keep
from jdllm.decode.setup import Setup
from jdllm.decode.start import start
from jdllm.decode.step import block_step
from jdllm.decode.trace import COMMIT, FULL, STEP
from jdllm.decode.work import State, Work
from jdllm.model.model import Model


class Phase(NamedTuple):
    """What `with_commit` carries from call to call."""

    state: State
    leaving_B: jax.Array
    """Rows that have left the block."""
    commits_B: jax.Array
    """Those of them whose keys the coming call writes."""
    steps: jax.Array
    """Whether the coming call is a step."""
    writes: jax.Array
    """Whether it commits."""


@partial(jax.jit, static_argnames=("setup", "trace"))
def decode(
    model: Model,
    request: Request,
    setup: Setup,
    trace: bool = False,
    verifier: Model | None = None,
) -> State:
    """Runs a request to its end; the result holds canvases, NFE and forwards.

    Rows never influence each other, unless the setup's driver copies a reference where they do. It
    ends for any weights: a block has at most `setup.step_limit` steps besides full passes. With
    `trace` every model call is recorded. A verifier is needed by rule=verify only.
    """
    work = Work(model, setup, request, verifier)
    state = jax.lax.while_loop(
        lambda state: ~jnp.all(state.rows.done),
        partial(run_block, work),
        start(work, setup.call_limit if trace else 0),
    )
    return close_trace(state)


def run_block(work: Work, state: State) -> State:
    """One block of every row, by the setup's own driver where it has one."""
    run = work.setup.driver.run_block if work.setup.driver else lockstep
    return run(work, state)


def lockstep(work: Work, state: State) -> State:
    """One block of every row: a full pass where the plan opens with one, steps until it is full."""
    state = dataclasses.replace(state, rows=enter_block(work.setup, state.rows, ~state.rows.done))
    if work.setup.plan.refreshes:
        state = step(work, state, full=True)
    if work.setup.plan.kind == "block":
        return with_commit(work, state)
    state = jax.lax.while_loop(
        lambda state: jnp.any(active(work.setup, state.rows)), partial(advance, work), state
    )
    return leave_block(work, state, ~state.rows.done)


def with_commit(work: Work, state: State) -> State:
    """The steps of a block, and the call that commits it, which is one more pass of the same code.

    A program is compiled for as long as it holds layers: so it holds them once for both. The price
    is that a commit also looks for tokens, which nobody asked for, once per block.
    """
    setup = work.setup

    def judged(state: State, leaving_B: jax.Array, left: jax.Array) -> Phase:
        """Where no row needs another step, and none had left before, the rows leave."""
        rows, all_B = state.rows, ~state.rows.done
        closed, dirty_B = closed_block(setup, rows, all_B)
        # One exchange between devices for both.
        steps, writes = jnp.any(jnp.stack([active(setup, rows), dirty_B]), axis=1)
        leave = ~steps & ~left
        rows = jax.tree.map(partial(jnp.where, leave), closed, rows)
        state = dataclasses.replace(state, rows=rows)
        leaving_B = jnp.where(leave, all_B, leaving_B)
        return Phase(state, leaving_B, dirty_B & leave, steps & ~left, writes & leave)

    def call(phase: Phase) -> Phase:
        stepping_B = active(setup, phase.state.rows) & phase.steps
        state = step(work, phase.state, False, stepping_B, phase.commits_B)
        return judged(state, phase.leaving_B, ~phase.steps)

    begun = judged(state, jnp.zeros_like(state.rows.done), jnp.zeros((), bool))
    phase = jax.lax.while_loop(lambda phase: phase.steps | phase.writes, call, begun)
    rows = left_block(setup, phase.state.rows, phase.leaving_B)
    return dataclasses.replace(phase.state, rows=rows)


def enter_block(setup: Setup, rows: Rows, entering_B: jax.Array) -> Rows:
    """Some rows at the start of their blocks; what a rule lets `start` make anew, it forgets."""
    (B, T), zero_B = rows.tokens.shape, jnp.zeros_like(rows.step)
    first_B, last_B = setup.block_span(rows.prompt, rows.block)
    memory = setup.unmask.start(B, setup.view.length(T), setup.block_calls)
    kept = {name: rows.unmask[name] for name in memory}
    rows = dataclasses.replace(
        rows,
        first=jnp.where(entering_B, first_B, rows.first),
        last=jnp.where(entering_B, last_B, rows.last),
        step=jnp.where(entering_B, zero_B, rows.step),
        left=rows.left & ~entering_B,
        due=jnp.where(entering_B, -1, rows.due),
        unmask=rows.unmask | keep(entering_B, memory, kept),
    )
    return dataclasses.replace(rows, opened=jnp.where(entering_B, rows.open_B, rows.opened))


def active(setup: Setup, rows: Rows) -> jax.Array:
    """Rows that are in a block which needs another call [B]."""
    wants_B = setup.unmask.wants(rows.open_B, rows.unmask) & (
        rows.step < setup.limit_of(rows.block)
    )
    return wants_B & (rows.first < rows.last) & ~rows.left & ~rows.done


def advance(work: Work, state: State) -> State:
    """A step, or a full pass where the plan wants the cache renewed."""
    plan, rows = work.setup.plan, state.rows
    if not plan.varies:
        return step(work, state, full=False)
    full_B = plan.full(rows.step, rows.block) & active(work.setup, rows)
    return jax.lax.cond(
        jnp.any(full_B), lambda s: step(work, s, True), lambda s: step(work, s, False), state
    )


def step(
    work: Work,
    state: State,
    full: bool,
    active_B: jax.Array | None = None,
    commits_B: jax.Array | None = None,
) -> State:
    """`block_step` for the active rows, counted and recorded.

    A call with rows in `commits_B` writes their keys and is no step: nothing else changes.
    """
    model, setup, recorded = work.model, work.setup, work.request.recorded
    call = Call(
        active_B=active(setup, state.rows) if active_B is None else active_B,
        full=full,
        draws=None if recorded is None else recorded[state.forwards],
        judge=partial(verify.judge, work.verifier) if work.verifier else None,
        aims=work.request.aims,
        commits_B=commits_B,
        apart=commits_B is not None,
    )
    rows, cache, seen, decision = block_step(model, setup, state.rows, state.cache, call)
    if commits_B is not None:
        rows = dataclasses.replace(rows, nfe=rows.nfe + commits_B, dirty=rows.dirty & ~commits_B)
    trace = state.trace
    if trace is not None:
        before, calls = state.rows.tokens, state.forwards
        stepped = trace.called(calls, before, FULL if full else STEP)
        stepped = stepped.seen(calls, model, setup, seen, decision)
        if commits_B is not None:
            commits, written = jnp.any(commits_B), trace.called(calls, before, COMMIT)
            stepped = jax.tree.map(partial(jnp.where, commits), written, stepped)
        trace = stepped
    return dataclasses.replace(
        state, rows=rows, cache=cache, forwards=state.forwards + 1, trace=trace
    )


def leave_block(work: Work, state: State, leaving_B: jax.Array) -> State:
    """Some rows after their blocks: judged as a whole, keys in a block cache, the next one due."""
    rows, committing_B = closed_block(work.setup, state.rows, leaving_B)
    state = commit(work, dataclasses.replace(state, rows=rows), committing_B)
    return dataclasses.replace(state, rows=left_block(work.setup, state.rows, leaving_B))


def closed_block(setup: Setup, rows: Rows, leaving_B: jax.Array) -> tuple[Rows, jax.Array]:
    """The rows, whose blocks some of them leave; and which must commit theirs first [B]."""
    rows = judge_block(setup, rows, leaving_B)
    rows = dataclasses.replace(rows, done=rows.done | (leaving_B & (rows.last >= rows.end)))
    return rows, leaving_B & ~rows.done & rows.dirty


def left_block(setup: Setup, rows: Rows, leaving_B: jax.Array) -> Rows:
    """The rows, some of them behind their blocks, whose keys are where they belong."""
    rows = noted(rows, leaving_B)
    if setup.plan.kind == "block":  # the commit may have spent a budget
        rows = judge_block(setup, rows, leaving_B & ~rows.done)
    return dataclasses.replace(rows, block=rows.block + leaving_B)


def noted(rows: Rows, leaving_B: jax.Array) -> Rows:
    """The rows with what the blocks that some of them leave have cost, and how they ended."""
    if rows.calls is None or rows.exits is None:
        return rows
    own_BK = leaving_B[:, None] & (jnp.arange(rows.calls.shape[1]) == rows.block[:, None])
    return dataclasses.replace(
        rows,
        calls=jnp.where(own_BK, rows.step[:, None], rows.calls),
        exits=jnp.where(own_BK, rows.due[:, None] >= 0, rows.exits),
    )


def judge_block(setup: Setup, rows: Rows, leaving_B: jax.Array) -> Rows:
    """The rows after the stop rules have seen the finished blocks of some of them."""
    return rows.judged(setup.stop(stop_view(rows, closing=True), rows.stop), leaving_B)


def close_trace(state: State) -> State:
    """The state whose trace, where it has one, also holds the canvas behind its last call."""
    if state.trace is None:
        return state
    return dataclasses.replace(state, trace=state.trace.closed(state.forwards, state.rows.tokens))
