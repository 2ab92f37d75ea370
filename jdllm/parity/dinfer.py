"""dInfer's block runners: rows wait for each other, and calls are made without looking."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdllm.decode import DecodeConfig, Setup
from jdllm.decode.keys import commit, prefill
from jdllm.decode.loop import enter_block, judge_block, step
from jdllm.decode.work import State, Work
from jdllm.model.config import ModelConfig
from jdllm.stop import EosBlock, Look, Stop, Verdict
from jdllm.stop.rule import with_rule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clock:
    """What the runner counts."""

    step: jax.Array
    """int32: calls of the block."""
    unlooked: jax.Array
    """int32: iterations still to be made before the next look at what is left to do."""
    iteration: jax.Array
    """int32: iterations of the request."""
    filled: jax.Array
    """bool: the cache holds something."""
    seen_block: jax.Array
    """int32: the block at the last look at the cache's age."""


@dataclasses.dataclass(frozen=True)
class Together:
    """`inner`, but rows end when all of them have come to their end in the same judgement."""

    inner: Stop

    def start(self, tokens_BT: jax.Array) -> Any:
        return self.inner.start(tokens_BT)

    def __call__(self, look: Look, carry: Any) -> Verdict:
        verdict = self.inner(look, carry)
        all_ = jnp.all(verdict.end_row_B | look.done_B)
        return verdict._replace(end_row_B=jnp.broadcast_to(all_, look.done_B.shape))


@dataclasses.dataclass(frozen=True)
class Runner:
    """Blocks as dInfer runs them, every unfinished row in every call."""

    expected_tpf: int
    """Masks / this = iterations made without looking."""
    maximum_unroll: int
    """And at most so many."""
    vicinity: bool
    """Its vicinity runner counts every call, and fills the cache behind its warm-up."""

    def start(self, work: Work, state: State) -> State:
        zero = jnp.zeros((), jnp.int32)
        clock = Clock(zero, zero, zero, jnp.zeros((), bool), zero - 1)
        return prefill(work, dataclasses.replace(state, clock=clock), ~state.rows.done)

    def run_block(self, work: Work, state: State) -> State:
        setup = work.setup
        rows = enter_block(setup, state.rows, ~state.rows.done)
        state = dataclasses.replace(state, rows=rows)
        clock = dataclasses.replace(state.clock, step=jnp.zeros((), jnp.int32))
        state = self.looked(work, dataclasses.replace(state, clock=clock))
        if setup.plan.refreshes and not self.vicinity:
            state = self.call(work, state, True)

        def unfinished(state: State) -> jax.Array:
            left = (state.clock.unlooked > 0) | (jnp.sum(state.rows.open_B) > 0)
            return left & (state.clock.step < 2 * setup.step_limit)

        state = jax.lax.while_loop(unfinished, partial(self.iterate, work), state)
        dirty = jnp.any(~state.rows.done & state.rows.dirty)
        state = commit(work, state, dirty & ~work.request.idle)
        rows = judge_block(setup, state.rows, ~state.rows.done)
        done = rows.done | (rows.last >= rows.end)
        rows = dataclasses.replace(rows, done=done, block=rows.block + 1)
        return dataclasses.replace(state, rows=rows)

    def call(self, work: Work, state: State, full: bool) -> State:
        """A call of all rows."""
        state = step(work, state, full, ~state.rows.done)
        clock = dataclasses.replace(state.clock, step=state.clock.step + 1)
        return dataclasses.replace(state, clock=clock)

    def looked(self, work: Work, state: State) -> State:
        """The clock set to as many iterations as are made before the next look."""
        least = 2 if work.setup.whole_blocks else 1  # the runner of block-causal models
        open_ = jnp.sum(jnp.where(work.request.idle, 0, state.rows.open_B))
        ahead = jnp.minimum(open_ // self.expected_tpf, self.maximum_unroll)
        clock = dataclasses.replace(state.clock, unlooked=jnp.maximum(ahead, least))
        return dataclasses.replace(state, clock=clock)

    def iterate(self, work: Work, state: State) -> State:
        """A full pass where one is due, and at once a step.

        The cache's age is not looked at while it is empty, which costs a second full pass where
        warm-up ends behind block 0, and block 0 is never renewed.
        """
        plan, clock = work.setup.plan, state.clock
        waiting = clock.unlooked > 0
        again = self.looked(work, state).clock
        clock = jax.tree.map(lambda a, b: jnp.where(waiting, a, b), clock, again)
        warm, due, clock = self.due(work, state, clock)
        clock = dataclasses.replace(
            clock, unlooked=clock.unlooked - 1, iteration=clock.iteration + 1
        )
        state = dataclasses.replace(state, clock=clock)
        if not (self.vicinity or plan.refresh_every):
            return self.call(work, state, False)
        state = jax.lax.cond(warm | due, lambda s: self.call(work, s, True), lambda s: s, state)
        return jax.lax.cond(~warm, lambda s: self.call(work, s, False), lambda s: s, state)

    def due(self, work: Work, state: State, clock: Clock) -> tuple[jax.Array, jax.Array, Clock]:
        """Whether the iteration is a warm-up pass, whether a full pass is due, and the clock."""
        plan, every, no = work.setup.plan, work.setup.plan.refresh_every, jnp.zeros((), bool)
        if not self.vicinity:
            if not (every and plan.refreshes):
                return no, no, clock
            # its smoothing runner counts every call, the others count iterations
            age = state.forwards if work.setup.smooth else clock.iteration
            return no, (age % every == 0) & (clock.step > 1), clock
        block = jnp.max(state.rows.block)
        warm = state.forwards < plan.warmup
        old = clock.seen_block != block
        if every:
            old |= state.forwards % every == 0
        due = ~warm & (~clock.filled | (old & (block > 0)))
        looked = ~warm & clock.filled
        clock = dataclasses.replace(
            clock,
            seen_block=jnp.where(looked, block, clock.seen_block),
            filled=clock.filled | due,
        )
        return warm, due, clock


def copy(setup: Setup, config: DecodeConfig, model: ModelConfig) -> Setup:
    """The setup as dInfer's loop has it; a shifted window ends one column before its block does."""
    stop = with_rule(setup.stop, EosBlock, lambda s: dataclasses.replace(s, block_only=True))
    after = config.vicinity.after - model.shift_logits
    vicinity = any(vars(config.vicinity).values())
    return dataclasses.replace(
        setup,
        stop=Together(stop),
        plan=dataclasses.replace(setup.plan, after=after),
        extra_steps=setup.extra_steps + config.dinfer.maximum_unroll,
        driver=Runner(config.dinfer.expected_tpf, config.dinfer.maximum_unroll, vicinity),
    )
