"""The only decode loop: block diffusion, jitted whole, no host round trip between steps.

A row is [prompt | generated columns | padding]: its first block starts right behind its own
prompt, so rows of unequal prompts share a batch without touching each other. Blocks are the outer
`while_loop`, denoising steps the inner one; a finished row is frozen, and its NFE stops counting.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jdllm import stop as stops
from jdllm import unmask
from jdllm.cache import PLANS, Cache
from jdllm.decode.config import Setup
from jdllm.model import Transformer
from jdllm.unmask import split_quota


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What decoding starts from: one row a prompt."""

    tokens: jax.Array
    """int32 [B, T]: prompt, then gen_length masks, then padding."""
    prompt_lengths: jax.Array
    """int32 [B]."""
    keys: jax.Array
    """Random keys [B], one a row, so that draws do not depend on batch mates."""
    idle: jax.Array
    """bool [B]: rows that only fill up the batch."""
    recorded: jax.Array | None = None
    """Uniform draws to use instead of the keys: [forwards, B, T] or [forwards, B, T, V]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a step changes."""

    tokens: jax.Array
    """int32 [B, T]."""
    done: jax.Array
    """bool [B]."""
    nfe: jax.Array
    """int32 [B]: model evaluations made while the row was unfinished."""
    forwards: jax.Array
    """int32: model calls of the batch."""
    block: jax.Array
    """int32: number of the block."""
    step: jax.Array
    """int32: step within the block, the opening full pass included."""
    cache: Cache | None
    trace: jax.Array | None
    """int32 [limit + 1, B, T]: the canvas before every model call, where asked for."""


@partial(jax.jit, static_argnames=("graph", "setup", "trace"))
def decode(
    graph: nnx.GraphDef, params: nnx.State, request: Request, setup: Setup, trace: bool = False
) -> DecodeState:
    """Runs a request to its end; the result holds canvases, NFE and forwards.

    Rows never influence each other. It ends for any weights: a block has at most
    `setup.step_limit` steps besides its opening pass. With `trace` the canvas before every model
    call is kept.
    """
    model = nnx.merge(graph, params)
    loop = Loop(model, request, setup)
    state = loop.start(trace)
    state = jax.lax.while_loop(
        lambda s: (s.block < setup.blocks) & ~jnp.all(s.done), loop.run_block, state
    )
    if state.trace is None:
        return state
    return dataclasses.replace(state, trace=state.trace.at[state.forwards].set(state.tokens))


@dataclasses.dataclass(frozen=True)
class Loop:
    """The parts of the loop that stay the same while it runs."""

    model: Transformer
    request: Request
    setup: Setup

    def start(self, trace: bool) -> DecodeState:
        """The state before the first block."""
        request, setup = self.request, self.setup
        B, T = request.tokens.shape
        zero = jnp.zeros((), jnp.int32)
        kind = self.model.embedding[...].dtype
        rows = 2 * B if setup.cfg_scale else B
        needs_cache = PLANS[setup.cache].refresh
        limit = setup.blocks * (setup.step_limit + 1)
        return DecodeState(
            tokens=request.tokens,
            done=request.idle,
            nfe=jnp.zeros(B, jnp.int32),
            forwards=zero,
            block=zero,
            step=zero,
            cache=Cache.zeros(self.model.config, rows, T, kind) if needs_cache else None,
            trace=jnp.zeros((limit + 1, B, T), jnp.int32) if trace else None,
        )

    @property
    def columns_T(self) -> jax.Array:
        return jnp.arange(self.request.tokens.shape[1])

    @property
    def generated_BT(self) -> jax.Array:
        """Columns behind the prompt, before the padding."""
        return (self.columns_T >= self.request.prompt_lengths[:, None]) & self.visible_BT

    @property
    def visible_BT(self) -> jax.Array:
        """Columns before the padding."""
        return self.columns_T < self.block_start(self.setup.blocks)[:, None]

    def block_start(self, block: jax.Array | int) -> jax.Array:
        """First column of the block, by row [B]."""
        return self.request.prompt_lengths + block * self.setup.block_length

    def block_masks(self, tokens_BT: jax.Array, block: jax.Array) -> jax.Array:
        """How many masks each row's block holds [B]."""
        columns_BN = _span(self.block_start(block), self.setup.block_length)
        ids_BN = jnp.take_along_axis(tokens_BT, columns_BN, axis=1)
        return jnp.sum(ids_BN == self.model.config.mask_id, axis=1)

    def active(self, state: DecodeState) -> jax.Array:
        """Rows for which the coming call counts and may write [B]."""
        wanted_B = self.block_masks(state.tokens, state.block) > 0
        if self.setup.run_all_steps:
            wanted_B = jnp.ones_like(wanted_B)
        if self.setup.check_late:
            wanted_B |= state.step == 1
        return wanted_B & ~state.done

    def run_block(self, state: DecodeState) -> DecodeState:
        """One block: an opening pass where the cache plan has one, then steps until it is clean."""
        masks_B = self.block_masks(state.tokens, state.block)
        refresh = PLANS[self.setup.cache].refresh
        state = dataclasses.replace(state, step=jnp.zeros((), jnp.int32))
        if refresh:
            state = self.call(state, masks_B, opening=True)
        last = self.setup.step_limit + (refresh and self.setup.check_late)

        def unfinished(s: DecodeState) -> jax.Array:
            return (s.step < last) & jnp.any(self.active(s))

        state = jax.lax.while_loop(unfinished, lambda s: self.call(s, masks_B, False), state)
        return dataclasses.replace(state, block=state.block + 1)

    def call(self, state: DecodeState, masks_B: jax.Array, opening: bool) -> DecodeState:
        """One model call and what follows from it: unmask, stop, count."""
        setup, mask_id = self.setup, self.model.config.mask_id
        active_B = ~state.done if opening else self.active(state)
        trace = state.trace
        if trace is not None:
            trace = trace.at[state.forwards].set(state.tokens)
        view_BN = self.view(state.block)
        logits_BNV, cache = self.logits(state, view_BN, opening)
        before_BN = jnp.take_along_axis(state.tokens, view_BN, axis=1)
        end_B1 = self.block_start(state.block + 1)[:, None]
        masked_BN = (before_BN == mask_id) & (view_BN < end_B1) & active_B[:, None]
        quota_B = split_quota(masks_B, setup.quota_steps or 1, state.step)
        ids_BN, chosen_BN = setup.unmasker(
            logits_BNV, masked_BN, quota_B, self.draw(state, view_BN)
        )
        tokens_BT = _put(state.tokens, jnp.where(chosen_BN, ids_BN, before_BN), view_BN)
        start_B1 = self.block_start(state.block)[:, None]
        block_BT = (self.columns_T >= start_B1) & (self.columns_T < end_B1)
        look = stops.Look(self.generated_BT, block_BT, mask_id, opening)
        stopped_BT, ended_B = setup.stop(tokens_BT, look)
        return DecodeState(
            tokens=jnp.where(active_B[:, None], stopped_BT, tokens_BT),
            done=state.done | (ended_B & active_B),
            nfe=state.nfe + active_B,
            forwards=state.forwards + 1,
            block=state.block,
            step=state.step + 1,
            cache=cache,
            trace=trace,
        )

    def view(self, block: jax.Array) -> jax.Array:
        """Columns whose logits are wanted [B, N]: the block, or with earlier_masks the canvas."""
        if self.setup.earlier_masks:
            return jnp.broadcast_to(self.columns_T, self.request.tokens.shape)
        return _span(self.block_start(block), self.setup.block_length)

    def logits(
        self, state: DecodeState, view_BN: jax.Array, opening: bool
    ) -> tuple[jax.Array, Cache | None]:
        """Logits [B, N, V] of the columns in view, and the cache after the call."""
        tokens_BT, scale = state.tokens, self.setup.cfg_scale
        B, T = tokens_BT.shape
        visible_BT = self.visible_BT
        window_BT = self.window(state.block, opening)
        if scale:
            tokens_BT = _interleave(tokens_BT, self.without_prompt(tokens_BT))
            visible_BT, window_BT, view_BN = (
                _interleave(x, x) for x in (visible_BT, window_BT, view_BN)
            )
        fed_BT = jnp.take_along_axis(tokens_BT, window_BT, axis=1, mode="clip")
        x_BTD = self.model.embed(fed_BT, self.model.embedding[...].dtype)
        hidden_BTD, cache = self.model(x_BTD, window_BT, visible_BT, state.cache)
        inside_BN = view_BN - window_BT[:, :1]
        logits_BNV = self.model.logits(_rows(hidden_BTD, inside_BN))
        if scale:
            pair = logits_BNV.reshape(B, 2, *logits_BNV.shape[1:])
            logits_BNV = pair[:, 1] + (scale + 1) * (pair[:, 0] - pair[:, 1])
        return logits_BNV, None if state.cache is None else cache

    def window(self, block: jax.Array, opening: bool) -> jax.Array:
        """Columns to feed; those beyond the canvas are neither kept nor seen."""
        B, T = self.request.tokens.shape
        kind = "canvas" if opening else PLANS[self.setup.cache].window
        if kind == "canvas":
            return jnp.broadcast_to(self.columns_T, (B, T))
        blocks = 1 if kind == "block" else self.setup.blocks
        return _span(self.block_start(block), blocks * self.setup.block_length)

    def without_prompt(self, tokens_BT: jax.Array) -> jax.Array:
        """The unconditional canvas: every column that was given is masked."""
        given_BT = self.request.tokens != self.model.config.mask_id
        return jnp.where(given_BT, self.model.config.mask_id, tokens_BT)

    def draw(self, state: DecodeState, view_BN: jax.Array) -> unmask.Draw:
        """Uniform draws of this call: from each row's key and NFE, or as recorded."""
        recorded = self.request.recorded
        if recorded is not None:
            return lambda shape: _rows(recorded[state.forwards], view_BN)
        keys_B = jax.vmap(jax.random.fold_in)(self.request.keys, state.nfe)

        def fresh(shape: tuple[int, ...]) -> jax.Array:
            # The rank tells candidates' draws from confidences', which must not share numbers.
            return jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, len(shape)), shape))(
                keys_B
            )

        return fresh


def _span(start_B: jax.Array, length: int) -> jax.Array:
    return start_B[:, None] + jnp.arange(length)


def _rows(x_BTX: jax.Array, columns_BN: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, columns: x[columns])(x_BTX, columns_BN)


def _put(tokens_BT: jax.Array, new_BN: jax.Array, columns_BN: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, new, columns: row.at[columns].set(new))(
        tokens_BT, new_BN, columns_BN
    )


def _interleave(a_BX: jax.Array, b_BX: jax.Array) -> jax.Array:
    """Rows a0, b0, a1, b1, ...: pairs stay on one shard of the batch."""
    return jnp.stack([a_BX, b_BX], axis=1).reshape(-1, *a_BX.shape[1:])
