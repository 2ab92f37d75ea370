"""dInfer's block runners: rows wait for each other, and checks for the end are rare."""

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
from jdllm.stop import EosBlock, Stop, StopView, Verdict
from jdllm.stop.rule import with_rule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clock:
    """The counters of the runner."""

    step: jax.Array
    """int32: calls made for the block."""
    unchecked: jax.Array
    """int32: iterations to make before the next check of what is left to do."""
    iteration: jax.Array
    """int32: iterations of the request."""
    filled: jax.Array
    """bool: whether the cache holds anything."""
    seen_block: jax.Array
    """int32: the block at the last check of the cache's age."""


@dataclasses.dataclass(frozen=True)
class Together:
    """The rule `inner`, but rows end only when all of them end in the same judgement."""

    inner: Stop

    def start(self, tokens_BT: jax.Array) -> Any:
        return self.inner.start(tokens_BT)

    def __call__(self, view: StopView, carry: Any) -> Verdict:
        verdict = self.inner(view, carry)
        all_ = jnp.all(verdict.end_row_B | view.done_B)
        return verdict._replace(end_row_B=jnp.broadcast_to(all_, view.done_B.shape))


@dataclasses.dataclass(frozen=True)
class Runner:
    """A driver that runs blocks as dInfer does, with every unfinished row in every call."""

    expected_tpf: int
    """Tokens per call that it expects: open columns / this = iterations between checks."""
    maximum_unroll: int
    """The most iterations between checks."""
    vicinity: bool
    """Whether it is the vicinity runner, which counts every call and caches after its warm-up."""

    def start(self, work: Work, state: State) -> State:
        zero = jnp.zeros((), jnp.int32)
        clock = Clock(zero, zero, zero, jnp.zeros((), bool), zero - 1)
        return prefill(work, dataclasses.replace(state, clock=clock), ~state.rows.done)

    def run_block(self, work: Work, state: State) -> State:
        setup = work.setup
        rows = enter_block(setup, state.rows, ~state.rows.done)
        state = dataclasses.replace(state, rows=rows)
        clock = dataclasses.replace(state.clock, step=jnp.zeros((), jnp.int32))
        state = self.checked(work, dataclasses.replace(state, clock=clock))
        if setup.plan.refreshes and not self.vicinity:
            state = self.call(work, state, True)

        def unfinished(state: State) -> jax.Array:
            left = (state.clock.unchecked > 0) | (jnp.sum(state.rows.open_B) > 0)
            return left & (state.clock.step < 2 * setup.step_limit)

        state = jax.lax.while_loop(unfinished, partial(self.iterate, work), state)
        dirty = jnp.any(~state.rows.done & state.rows.dirty)
        state = commit(work, state, dirty & ~work.request.idle)
        rows = judge_block(setup, state.rows, ~state.rows.done)
        done = rows.done | (rows.last >= rows.end)
        rows = dataclasses.replace(rows, done=done, block=rows.block + 1)
        return dataclasses.replace(state, rows=rows)

    def call(self, work: Work, state: State, full: bool) -> State:
        """Returns the state after one call of all rows."""
        state = step(work, state, full, ~state.rows.done)
        clock = dataclasses.replace(state.clock, step=state.clock.step + 1)
        return dataclasses.replace(state, clock=clock)

    def checked(self, work: Work, state: State) -> State:
        """Returns the state with the number of iterations before the next check."""
        least = 2 if work.setup.whole_blocks else 1  # the runner of block-causal models
        open_ = jnp.sum(jnp.where(work.request.idle, 0, state.rows.open_B))
        ahead = jnp.minimum(open_ // self.expected_tpf, self.maximum_unroll)
        clock = dataclasses.replace(state.clock, unchecked=jnp.maximum(ahead, least))
        return dataclasses.replace(state, clock=clock)

    def iterate(self, work: Work, state: State) -> State:
        """Returns the state after a full pass where one is due, and a step right after it.

        The cache's age is not checked while it is empty. That costs a second full pass where
        warm-up ends after block 0. Block 0 is never renewed.
        """
        plan, clock = work.setup.plan, state.clock
        waiting = clock.unchecked > 0
        again = self.checked(work, state).clock
        clock = jax.tree.map(lambda a, b: jnp.where(waiting, a, b), clock, again)
        warm, due, clock = self.due(work, state, clock)
        clock = dataclasses.replace(
            clock, unchecked=clock.unchecked - 1, iteration=clock.iteration + 1
        )
        state = dataclasses.replace(state, clock=clock)
        if not (self.vicinity or plan.refresh_every):
            return self.call(work, state, False)
        state = jax.lax.cond(warm | due, lambda s: self.call(work, s, True), lambda s: s, state)
        return jax.lax.cond(~warm, lambda s: self.call(work, s, False), lambda s: s, state)

    def due(self, work: Work, state: State, clock: Clock) -> tuple[jax.Array, jax.Array, Clock]:
        """Returns whether this is a warm-up pass, whether a full pass is due, and the clock."""
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
    """Returns the setup of dInfer's loop; a shifted window ends a column before its block does."""
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
