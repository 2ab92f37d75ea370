"""The only decode loop: block diffusion, jitted whole, no host round trip between steps.

A row is [prompt | generated columns | padding]: its first block starts right behind its own
prompt, or at a multiple of the block length. Blocks are the outer `while_loop`, denoising steps
the inner one; a finished row is frozen, and its NFE stops counting.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jdllm.decode import runner, verifier
from jdllm.decode.inputs import forward, guided, smoothed
from jdllm.decode.layout import Geometry, put, rows, span
from jdllm.decode.rows import COMMIT, FULL, PREFILL, Clock, DecodeState, Request, Trace
from jdllm.decode.setup import Setup
from jdllm.model.cache import Cache
from jdllm.model.transformer import Transformer
from jdllm.stop.rule import Look
from jdllm.unmask import Carry, Decision, Draw, View


@partial(jax.jit, static_argnames=("graph", "setup", "trace", "verifier_graph"))
def decode(
    graph: nnx.GraphDef,
    params: nnx.State,
    request: Request,
    setup: Setup,
    trace: bool = False,
    verifier_graph: nnx.GraphDef | None = None,
    verifier_params: nnx.State | None = None,
) -> DecodeState:
    """Runs a request to its end; the result holds canvases, NFE and forwards.

    Rows never influence each other, unless the setup copies a reference where they do. It ends for
    any weights: a block has at most `setup.step_limit` steps besides full passes. With `trace`
    every model call is recorded. A verifier is needed by rule=verify only.
    """
    loop = make_loop(graph, params, request, setup, verifier_graph, verifier_params)
    state = jax.lax.while_loop(
        lambda s: (s.block < setup.blocks) & ~jnp.all(s.done),
        loop.run_block,
        loop.start(setup.call_limit if trace else 0),
    )
    return close_trace(state) if trace else state


def make_loop(
    graph: nnx.GraphDef,
    params: nnx.State,
    request: Request,
    setup: Setup,
    verifier_graph: nnx.GraphDef | None = None,
    verifier_params: nnx.State | None = None,
) -> "Loop":
    """The loop over a request, with its models put together."""
    model = merged(graph, params, setup.block_length)
    second = nnx.merge(verifier_graph, verifier_params) if verifier_graph is not None else None
    return Loop(model, request, setup, second)


def close_trace(state: DecodeState) -> DecodeState:
    """The state whose trace also holds the canvas behind its last call."""
    trace = state.trace
    assert trace is not None
    tokens = trace.tokens.at[state.forwards - trace.first].set(state.tokens)
    return dataclasses.replace(state, trace=dataclasses.replace(trace, tokens=tokens))


def merged(graph: nnx.GraphDef, params: nnx.State, block_length: int) -> Transformer:
    """The model; one that attends block by block has blocks as long as the setup says."""
    model = nnx.merge(graph, params)
    if model.config.block_causal:
        model.config = dataclasses.replace(model.config, block_causal=block_length)
    return model


@dataclasses.dataclass(frozen=True)
class Loop:
    """The parts of the loop that stay the same while it runs."""

    model: Transformer
    request: Request
    setup: Setup
    verifier: Transformer | None = None

    @property
    def at(self) -> Geometry:
        return Geometry(self.request, self.setup, self.model.config)

    def start(self, calls: int = 0) -> DecodeState:
        """The state before the first block; with a block cache the prompts' keys are in it.

        With `calls` it has room to record so many of them.
        """
        request, setup, model = self.request, self.setup, self.model
        B, T = request.tokens.shape
        zero, zeros_B = jnp.zeros((), jnp.int32), jnp.zeros(B, jnp.int32)
        kind = model.embedding[...].dtype
        cached = setup.plan.kind != "none" or setup.kv_window
        doubled = 2 * B if setup.cfg_scale else B
        state = DecodeState(
            tokens=request.tokens,
            done=request.idle,
            nfe=zeros_B,
            forwards=zero,
            block=zero,
            step=zero,
            opened=zeros_B,
            dirty=jnp.zeros(B, bool),
            accepted=zeros_B,
            rule=self.fresh_rule() | self.read(),
            stop=setup.stop.start(request.tokens),
            clock=Clock(zero, zero, jnp.zeros((), bool), zero - 1),
            cache=self.begun(Cache.zeros(model.config, doubled, T, kind)) if cached else None,
            inputs=model.embed(request.tokens, kind) if setup.smooth else None,
            trace=self.fresh_trace(calls, zero) if calls else None,
        )
        return self.prefill(state) if setup.plan.kind == "block" else state

    def begun(self, cache: Cache) -> Cache:
        """An empty cache with what was computed before."""
        shared = self.request.prefixes
        return cache if shared is None else cache.begun(shared.cache, shared.which)

    def fresh_rule(self) -> Carry:
        """What the rule forgets from block to block, as it is at the start of one."""
        setup, B = self.setup, self.request.tokens.shape[0]
        calls = 2 * setup.step_limit + 2 * setup.maximum_unroll + 2
        return setup.rule.start(B, self.at.view_length, calls)

    def read(self) -> Carry:
        """What lasts from block to block: a verifier's keys, once it has read the prompt."""
        if self.verifier is None:
            return {}
        return {"verifier": verifier.read_prompt(self.verifier, self.request)}

    def fresh_trace(self, calls: int, first: jax.Array) -> Trace:
        """Room for a record of `calls` calls, from the one that `first` calls precede."""
        (B, T), C, N = self.request.tokens.shape, calls, self.at.view_length
        return Trace(
            first=first,
            tokens=jnp.zeros((C + 1, B, T), jnp.int32),
            kind=jnp.zeros(C, jnp.int32),
            columns=jnp.full((C, B, N), -1, jnp.int32),
            candidates=jnp.zeros((C, B, N), jnp.int32),
            confidence=jnp.zeros((C, B, N)),
            entropy=jnp.zeros((C, B, N)),
        )

    def run_block(self, state: DecodeState) -> DecodeState:
        """One block: an opening pass where the cache plan has one, then steps until it is clean."""
        setup = self.setup
        masks_B = self.masks(state)
        state = dataclasses.replace(
            state,
            step=jnp.zeros((), jnp.int32),
            opened=masks_B,
            rule=state.rule | self.fresh_rule(),
        )
        state = runner.open_block(self, state)
        state = jax.lax.while_loop(
            lambda s: (s.step < runner.last_step(setup)) & runner.unfinished(self, s),
            lambda s: runner.iterate(self, s),
            state,
        )
        return self.close_block(state)

    def masks(self, state: DecodeState) -> jax.Array:
        """How many masks each row's block holds [B]."""
        columns_BN = span(self.at.block_start(state.block), self.setup.block_length)
        masked_BN = self.at.ids(state.tokens, columns_BN) == self.model.config.mask_id
        inside_BN = (columns_BN >= self.at.first_open_B1) & (columns_BN < self.at.canvas_B1)
        return jnp.sum(masked_BN & inside_BN, axis=1)

    def active(self, state: DecodeState) -> jax.Array:
        """Rows for which the coming call counts and may write [B]."""
        quirks = self.setup.quirks
        if quirks.coupled:
            return ~state.done
        wanted_B = self.setup.rule.wants(self.masks(state), state.rule)
        if quirks.all_steps:
            wanted_B |= state.step < self.setup.least_steps
        if quirks.late_check and self.setup.plan.refreshes:
            wanted_B |= state.step == 1
        return wanted_B & ~state.done

    def call(self, state: DecodeState, kind: int) -> DecodeState:
        """One model call, FULL or STEP, and what follows from it: unmask, stop, count."""
        setup, at = self.setup, self.at
        active_B = self.active(state)
        view_BN, window_BT = at.view(state), at.window(state, kind)
        hidden_BND, hidden_BTD, cache = forward(self, state, view_BN, window_BT)
        special = None if setup.cfg_scale else setup.rule.special
        view = self.look(state, kind, view_BN, active_B)
        if special is None:
            view = dataclasses.replace(view, logits=guided(self, hidden_BND))
        else:
            view = dataclasses.replace(view, best=self.model.best(hidden_BND, special))
        decision, carry = setup.rule(view, state.rule)
        new_BN = jnp.where(active_B[:, None], decision.ids_BN, view.ids_BN)
        tokens_BT = put(state.tokens, new_BN, view_BN)
        after = dataclasses.replace(
            state,
            nfe=state.nfe + active_B,
            trace=self.recorded(state, kind, view_BN, decision, hidden_BND),
            rule=_keep(active_B, carry, state.rule),
            dirty=jnp.where(active_B, jnp.any(new_BN != view.ids_BN, 1), state.dirty),
            accepted=jnp.where(active_B, jnp.sum(new_BN != view.ids_BN, 1), state.accepted),
            cache=cache,
            forwards=state.forwards + 1,
            step=state.step + 1,
        )
        seen = self.stop_look(after, tokens_BT, kind)
        candidates_BT = put(seen.candidates_BT, decision.candidate_BN, view_BN)
        seen = dataclasses.replace(seen, candidates_BT=candidates_BT)
        after = self.judge(after, tokens_BT, seen, active_B)
        if not setup.smooth:
            return after
        inputs = smoothed(self, state, after.tokens, window_BT, hidden_BTD)
        return dataclasses.replace(after, inputs=_keep(active_B, inputs, state.inputs))

    def look(
        self,
        state: DecodeState,
        kind: int,
        view_BN: jax.Array,
        active_B: jax.Array,
    ) -> View:
        """What the rule is shown of this call, but for the head's output."""
        setup, at = self.setup, self.at
        ids_BN = at.ids(state.tokens, view_BN)
        inside_BN = (view_BN < at.limit_B1(state)) & active_B[:, None]
        inside_BN &= view_BN >= at.first_open_B1
        masked_BN = inside_BN & (ids_BN == self.model.config.mask_id)
        opening = kind == FULL and setup.plan.refreshes
        if setup.quirks.first_column and opening:
            masked_BN &= view_BN == at.block_start(state.block)[:, None]
        masks_B = jnp.sum(masked_BN, axis=1)
        quota_B, share_B = setup.schedule(state.opened, masks_B, state.step)
        if setup.quirks.first_column and opening:
            quota_B = jnp.ones_like(quota_B)
        floor_B = jnp.full(masks_B.shape, -jnp.inf)
        if setup.smooth:
            floor_B = 1 - state.nfe * setup.smooth.decay
        given_BN = at.ids(self.request.tokens, view_BN) != self.model.config.mask_id
        return View(
            ids_BN=ids_BN,
            masked_BN=masked_BN,
            settled_BN=inside_BN & ~masked_BN & ~given_BN,
            quota_B=quota_B,
            share_B=share_B,
            floor_B=floor_B,
            draw=self.draw(state, view_BN),
            verify=None
            if self.verifier is None
            else verifier.judge(self.verifier, state.tokens, view_BN),
        )

    def judge(
        self, state: DecodeState, tokens_BT: jax.Array, look: Look, rows_B: jax.Array
    ) -> DecodeState:
        """The state with `tokens_BT`, after the stop rules have had their say on some rows."""
        stopped_BT, ended_B, carry = self.setup.stop(tokens_BT, look, state.stop)
        ended_B &= rows_B
        if self.setup.quirks.coupled:
            ended_B = jnp.broadcast_to(jnp.all(ended_B | self.request.idle), ended_B.shape)
        return dataclasses.replace(
            state,
            tokens=jnp.where(rows_B[:, None], stopped_BT, tokens_BT),
            dirty=state.dirty | (rows_B & jnp.any(stopped_BT != tokens_BT, 1)),
            done=state.done | ended_B,
            stop=_keep(rows_B, carry, state.stop),
        )

    def stop_look(self, state: DecodeState, tokens_BT: jax.Array, kind: int | None) -> Look:
        """What stop rules see after a call of some kind, or after a block (None)."""
        return Look(
            generated_BT=self.at.generated_BT,
            block_BT=self.at.block_BT(state.block),
            mask_id=self.model.config.mask_id,
            opening=kind == FULL and self.setup.plan.refreshes,
            closing=kind is None,
            nfe_B=state.nfe,
            candidates_BT=jnp.full_like(tokens_BT, -1),
            written_BT=tokens_BT != state.tokens,
        )

    def close_block(self, state: DecodeState) -> DecodeState:
        """Stop rules for the block as a whole, and its keys into a block cache."""
        coupled = self.setup.quirks.coupled
        state = self.judge_block(self.commit(state) if coupled else state)
        over_B = self.at.block_start(state.block + 1) >= self.at.canvas_B1[:, 0]
        state = dataclasses.replace(state, done=state.done | over_B)
        if self.setup.plan.kind == "block" and not coupled:
            state = self.judge_block(self.commit(state))  # which may have spent the budget
        return dataclasses.replace(state, block=state.block + 1)

    def judge_block(self, state: DecodeState) -> DecodeState:
        """The state after the stop rules have seen a finished block."""
        look = self.stop_look(state, state.tokens, None)
        return self.judge(state, state.tokens, look, ~state.done)

    def prefill(self, state: DecodeState) -> DecodeState:
        """Keys of everything before the first blocks, but what was computed before."""
        B, T = state.tokens.shape
        shared = self.request.prefixes
        own = jnp.arange(shared.length if shared else 0, T - self.setup.gen_length)
        starts_B = self.at.block_start(0)
        rows_B = ~state.done & ((starts_B > 0) | self.setup.quirks.coupled)
        columns_BT = jnp.broadcast_to(own, (B, len(own)))
        return jax.lax.cond(
            jnp.any(rows_B),
            lambda s: self.absorb(s, columns_BT, starts_B[:, None], rows_B, PREFILL),
            lambda s: s,
            state,
        )

    def commit(self, state: DecodeState) -> DecodeState:
        """Keys of a block's final tokens, unless its last call has seen them."""
        if self.setup.plan.kind != "block":
            return state
        rows_B = ~state.done & state.dirty
        if self.setup.quirks.coupled:
            rows_B = jnp.any(rows_B) & ~self.request.idle
        columns_BN = span(self.at.block_start(state.block), self.setup.block_length)
        ends_B1 = self.at.block_start(state.block + 1)[:, None]
        return jax.lax.cond(
            jnp.any(rows_B),
            lambda s: self.absorb(s, columns_BN, ends_B1, rows_B, COMMIT),
            lambda s: s,
            state,
        )

    def absorb(
        self,
        state: DecodeState,
        columns_BT: jax.Array,
        ends_B1: jax.Array,
        rows_B: jax.Array,
        kind: int,
    ) -> DecodeState:
        """A model call that only writes keys and values; columns from `ends_B1` on are left out."""
        T = state.tokens.shape[1]
        width = columns_BT.shape[1]
        columns_BT = jnp.where(columns_BT < ends_B1, columns_BT, T + jnp.arange(width))
        _, _, cache = forward(self, state, columns_BT[:, :0], columns_BT, ends_B1)
        trace = state.trace
        if trace is not None:
            i = state.forwards - trace.first
            trace = dataclasses.replace(
                trace, tokens=trace.tokens.at[i].set(state.tokens), kind=trace.kind.at[i].set(kind)
            )
        return dataclasses.replace(
            state,
            cache=cache,
            trace=trace,
            nfe=state.nfe + rows_B,
            forwards=state.forwards + 1,
            dirty=state.dirty & ~rows_B,
        )

    def recorded(
        self,
        state: DecodeState,
        kind: int,
        view_BN: jax.Array,
        decision: Decision,
        hidden_BND: jax.Array,
    ) -> Trace | None:
        """The trace with this call, where one is kept."""
        trace = state.trace
        if trace is None:
            return None
        i = state.forwards - trace.first
        log_p = jax.nn.log_softmax(guided(self, hidden_BND), axis=-1)
        own_BN = jnp.take_along_axis(log_p, decision.candidate_BN[..., None], axis=-1)[..., 0]
        entropy_BN = -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, -1e9), axis=-1)
        return Trace(
            first=trace.first,
            tokens=trace.tokens.at[i].set(state.tokens),
            kind=trace.kind.at[i].set(kind),
            columns=trace.columns.at[i].set(view_BN),
            candidates=trace.candidates.at[i].set(decision.candidate_BN),
            confidence=trace.confidence.at[i].set(jnp.exp(own_BN)),
            entropy=trace.entropy.at[i].set(entropy_BN),
        )

    def draw(self, state: DecodeState, view_BN: jax.Array) -> Draw:
        """Uniform draws of this call: from each row's key and NFE, or as recorded."""
        recorded = self.request.recorded
        if recorded is not None:
            return lambda shape: rows(recorded[state.forwards], view_BN)
        keys_B = jax.vmap(jax.random.fold_in)(self.request.keys, state.nfe)

        def fresh(shape: tuple[int, ...]) -> jax.Array:
            # The rank tells candidates' draws from confidences', which must not share numbers.
            return jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, len(shape)), shape))(
                keys_B
            )

        return fresh


def _keep(rows_B: jax.Array, new, old):
    """`new` in the given rows, `old` elsewhere; every array leads with the rows."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(rows_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, new, old)
