"""The engine's rounds on the device: every row takes the call that it needs, wherever it is.

Prompts are read in chunks. Then a dispatch makes a fixed number of rounds: in each, finished
blocks are left, new ones are opened, and one block step serves all rows; rows whose finished block
has yet to reach the cache go along in the same call. What a row gets does not depend on the others.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jdllm.decode.keys import absorb
from jdllm.decode.layout import put, span
from jdllm.decode.look import Call, Seen
from jdllm.decode.loop import active, enter_block, judge_block, noted
from jdllm.decode.rows import Rows
from jdllm.decode.setup import Setup
from jdllm.decode.step import block_step
from jdllm.engine.arrays import Arrivals, Chunks, Orders, Pool, Report, Slots
from jdllm.engine.dials import turned
from jdllm.model.cache import PagedCache
from jdllm.model.model import Model
from jdllm.runtime import sharding
from jdllm.runtime.programs import LOOPS
from jdllm.unmask import Decision


def empty_pool(model: Model, pages: int, page: int) -> Pool:
    """A pool that holds zeros, where it lies."""
    config = model.config

    def zeros() -> tuple[jax.Array, ...]:
        shape = (pages, page, config.kv_heads, config.head_dim)
        return tuple(jnp.zeros(shape, model.dtype) for _ in range(config.layers))

    return jax.jit(lambda: placed(model, (zeros(), zeros())))()


@partial(jax.jit, static_argnames=("setup",))
def begin(
    model: Model,
    setup: Setup,
    tokens_BT: jax.Array,
    prompt_B: jax.Array,
    end_B: jax.Array,
    keys_B: jax.Array,
    done_B: jax.Array,
    dials: dict[str, jax.Array],
) -> Slots:
    """Rows before their first block. With a block cache the reading of the prompt counts as one
    evaluation, in however many chunks it is done."""
    (B, T), zero_B, no_B = tokens_BT.shape, jnp.zeros_like(prompt_B), jnp.zeros_like(done_B)
    columns_T, blocks = jnp.arange(T), max(T // setup.block_length, len(setup.block_lengths)) + 2
    open_BT = (columns_T >= prompt_B[:, None]) & (columns_T < end_B[:, None])
    open_BT &= tokens_BT == model.config.mask_id
    first_B = setup.first_block(prompt_B)
    reads_B = (first_B > 0) & (setup.plan.kind == "block")
    rows = Rows(
        tokens=tokens_BT, open=open_BT, free=open_BT, prompt=prompt_B, end=end_B, keys=keys_B,
        done=done_B, nfe=reads_B.astype(jnp.int32), block=zero_B, first=first_B, last=first_B,
        step=zero_B, opened=zero_B, left=no_B, due=zero_B - 1, dirty=no_B, accepted=zero_B,
        unmask=setup.unmask.start(B, setup.view.length(T), setup.block_calls),
        stop=setup.stop.start(tokens_BT),
        inputs=model.embed(tokens_BT) if setup.smooth else None,
        calls=jnp.zeros((B, blocks), jnp.int32), exits=jnp.zeros((B, blocks), bool),
    )  # fmt: skip
    slots = Slots(rows, dials, zero_B, jnp.zeros((B, T), jnp.int32), jnp.zeros((B, T)), no_B)
    return everywhere(model, slots)


@partial(jax.jit, static_argnames=("setup",), donate_argnames="slots")
def enter(model: Model, setup: Setup, slots: Slots, slot_E: jax.Array, arrivals: Arrivals) -> Slots:
    """The slots with new rows in some of them; a slot that is none drops its row."""
    keys_E, none_E = jnp.stack(arrivals.keys), jnp.zeros(len(slot_E), bool)
    some = begin(
        model, setup, arrivals.tokens, arrivals.prompt, arrivals.end, keys_E, none_E, arrivals.dials
    )
    return everywhere(model, put_rows(slots, slot_E, some))


@partial(jax.jit, donate_argnames="slots")
def put_rows(slots: Slots, slot_E: jax.Array, some: Slots) -> Slots:
    """The slots with the rows of `some` in E of them."""
    return jax.tree.map(lambda all_, new: all_.at[slot_E].set(new, mode="drop"), slots, some)


@jax.jit
def take_row(slots: Slots, slot: jax.Array) -> Slots:
    """One of the slots, as slots of one row."""
    return jax.tree.map(lambda x: x[slot][None], slots)


@partial(jax.jit, donate_argnames="pool")
def wipe(pool: Pool, pages_F: jax.Array) -> Pool:
    """The pool with zeros in some pages."""
    return jax.tree.map(lambda x: x.at[pages_F].set(0), pool)


@partial(
    jax.jit,
    static_argnames=("setup", "rounds", "lanes"),
    donate_argnames=("slots", "pool"),
    compiler_options=LOOPS,
)
def run(
    model: Model, setup: Setup, slots: Slots, pool: Pool, orders: Orders, rounds: int, lanes: int
) -> tuple[Slots, Pool, Report]:
    """A dispatch: so many rounds with at most `lanes` full passes in each.

    Their number is static: else the thread that hands over would wait for the end of the last one.
    """
    whole, cache = slots, PagedCache(*pool, orders.table) if setup.plan.cached else None
    slots = narrowed(model, setup, slots, orders.width)
    rows = slots.rows
    slots = dataclasses.replace(
        slots, rows=dataclasses.replace(rows, done=rows.done | orders.stopped)
    )

    def again(_: int, carry: tuple[Slots, Any, jax.Array]) -> tuple[Slots, Any, jax.Array]:
        return play(model, setup, carry, orders, lanes)

    start = slots, cache, jnp.zeros((), jnp.int32)
    slots, cache, calls = jax.lax.fori_loop(0, rounds, again, start)
    slots = end(setup, slots, orders.ready)
    report = reported(slots, calls)
    if cache is not None:
        pool = placed(model, (cache.keys, cache.values))
    return everywhere(model, widened(model, setup, slots, whole)), pool, report


def play(
    model: Model,
    setup: Setup,
    carry: tuple[Slots, Any, jax.Array],
    orders: Orders,
    lanes: int,
) -> tuple[Slots, Any, jax.Array]:
    """One round of every row: the slots, the cache, and the number of model calls so far."""
    slots, cache, calls = carry
    slots, commits_B = leave(setup, slots, orders.ready)
    slots, cache, full = open_blocks(model, setup, slots, cache, orders, lanes)
    slots, cache, some = step(model, setup, slots, cache, orders.ready, commits_B)
    return slots, cache, calls + full + some


def leave(setup: Setup, slots: Slots, ready_B: jax.Array) -> tuple[Slots, jax.Array]:
    """Finished blocks are judged and left; returns the rows that must commit theirs first."""
    rows, closing_B = slots.rows, closing(setup, slots.rows, ready_B)
    rows = judge_block(setup, rows, closing_B)
    rows = dataclasses.replace(rows, done=rows.done | (closing_B & (rows.last >= rows.end)))
    commits_B = jnp.zeros_like(closing_B)
    if setup.plan.kind == "block":
        commits_B = closing_B & ~rows.done & rows.dirty
    rows = between(setup, rows, closing_B & ~commits_B)
    return dataclasses.replace(slots, rows=rows), commits_B


def closing(setup: Setup, rows: Rows, ready_B: jax.Array) -> jax.Array:
    """Rows in a block that needs no more calls [B]."""
    return ready_B & ~rows.done & (rows.first < rows.last) & ~active(setup, rows)


def end(setup: Setup, slots: Slots, ready_B: jax.Array) -> Slots:
    """Rows behind their last blocks are done, as `leave` of the next round would say: so this
    dispatch's report tells of them, and not that of the next."""
    rows = slots.rows
    ending_B = closing(setup, rows, ready_B) & (rows.last >= rows.end)
    rows = judge_block(setup, rows, ending_B)
    rows = dataclasses.replace(rows, done=rows.done | ending_B)
    return dataclasses.replace(slots, rows=between(setup, rows, ending_B))


def between(setup: Setup, rows: Rows, leaving_B: jax.Array) -> Rows:
    """Some rows behind their blocks, whose keys are where they belong; the next ones are due."""
    rows = noted(rows, leaving_B)
    if setup.plan.kind == "block":  # the commit may have spent a budget
        rows = judge_block(setup, rows, leaving_B & ~rows.done)
    moving_B = leaving_B & ~rows.done
    first_B = jnp.where(moving_B, rows.last, rows.first)
    return dataclasses.replace(rows, block=rows.block + moving_B, first=first_B)


def open_blocks(
    model: Model, setup: Setup, slots: Slots, cache: Any, orders: Orders, lanes: int
) -> tuple[Slots, Any, Any]:
    """Rows between blocks begin the next one, where it has its pages; and whether that took a call.

    Under a plan of full passes at most `lanes` rows have theirs in a round, in a call of their own,
    which waits for as many of them, or for half of all rows; who has waited longest comes first.
    """
    plan, rows = setup.plan, slots.rows
    _, last_B = setup.block_span(rows.prompt, rows.block)
    room_B = jnp.minimum(last_B, rows.end) <= orders.granted
    due_B = orders.ready & ~rows.done & (rows.first == rows.last) & room_B
    if not (plan.refreshes or plan.varies):
        return dataclasses.replace(slots, rows=enter_block(setup, rows, due_B)), cache, 0
    wants_B = due_B | (orders.ready & active(setup, rows) & plan.full(rows.step, rows.block))
    lanes = min(lanes, len(wants_B))
    live = jnp.sum(orders.ready & ~rows.done)
    enough = jnp.sum(wants_B) >= jnp.minimum(lanes, (live + 1) // 2)
    turns_B = jnp.where(wants_B & enough, slots.waited + 1, 0)
    turn_F, which_F = jax.lax.top_k(turns_B, lanes)
    chosen_B = jnp.zeros_like(wants_B).at[which_F].set(turn_F > 0)
    rows = enter_block(setup, rows, due_B & chosen_B)
    waited_B = jnp.where(wants_B & ~chosen_B, slots.waited + 1, 0)
    slots = dataclasses.replace(slots, rows=rows, waited=waited_B)

    def full(carry: tuple[Slots, Any]) -> tuple[Slots, Any]:
        slots, cache = carry
        some = jax.tree.map(lambda x: x[which_F], slots)
        theirs = cache and dataclasses.replace(cache, table=cache.table[which_F])
        turn_B = (turn_F > 0) & active(setup, some.rows)
        some, theirs = called(model, setup, some, theirs, Call(turn_B, True, apart=True))
        back_F = jnp.where(turn_F > 0, which_F, len(wants_B))
        slots = jax.tree.map(lambda x, new: x.at[back_F].set(new, mode="drop"), slots, some)
        return slots, theirs and dataclasses.replace(theirs, table=orders.table)

    some = jnp.any(turn_F > 0)
    return *jax.lax.cond(some, full, lambda carry: carry, (slots, cache)), some


def step(
    model: Model,
    setup: Setup,
    slots: Slots,
    cache: Any,
    ready_B: jax.Array,
    commits_B: jax.Array,
) -> tuple[Slots, Any, jax.Array]:
    """A step of all rows that are in a block, and the commits of those that have finished one; and
    whether there was any."""
    rows = slots.rows
    turn_B = ready_B & active(setup, rows) & ~setup.plan.full(rows.step, rows.block)
    commits = commits_B if setup.plan.kind == "block" else None

    def go(carry: tuple[Slots, Any]) -> tuple[Slots, Any]:
        call = Call(turn_B, commits_B=commits, apart=True)
        slots, cache = called(model, setup, *carry, call)
        rows = slots.rows
        rows = dataclasses.replace(rows, nfe=rows.nfe + commits_B, dirty=rows.dirty & ~commits_B)
        return dataclasses.replace(slots, rows=between(setup, rows, commits_B)), cache

    some = jnp.any(turn_B | commits_B)
    if not (setup.plan.refreshes or setup.plan.varies):
        # There is a row for it nearly always, and to ask would keep the device waiting.
        return *go((slots, cache)), some
    return *jax.lax.cond(some, go, lambda carry: carry, (slots, cache)), some


def called(model: Model, setup: Setup, slots: Slots, cache: Any, call: Call) -> tuple[Slots, Any]:
    """The slots after a block step, with what it has shown noted."""
    before, setup = slots.rows, turned(setup, slots.dials)
    noise = setup.unmask.sampled
    if noise is not None and not (isinstance(noise.heat, float) and noise.heat == 1):
        # The chances that are noted are those of logits before they are divided.
        call = dataclasses.replace(call, logits=True)
    rows, cache, seen, decision = block_step(model, setup, before, cache, call)
    hidden = seen.hidden_BND.reshape(len(call.active_B), -1)
    bad_B = call.active_B & ~jnp.all(jnp.isfinite(hidden), axis=1)
    new_BT = (before.open & ~rows.open) | (before.tokens != rows.tokens)
    chance_BT = put(jnp.zeros_like(slots.chance), chances(seen, decision), seen.columns_BN)
    return dataclasses.replace(
        slots,
        rows=dataclasses.replace(rows, done=rows.done | bad_B),
        failed=slots.failed | bad_B,
        filled_at=jnp.where(new_BT, rows.nfe[:, None], slots.filled_at),
        chance=jnp.where(new_BT, chance_BT, slots.chance),
    ), cache


def chances(seen: Seen, decision: Decision) -> jax.Array:
    """The probability [B, N] of each candidate, before any rule has changed the logits."""
    if seen.view.best is not None:
        return jax.nn.sigmoid(seen.view.best.odds)
    log_p = jax.nn.log_softmax(seen.view.logits_BNV.astype(jnp.float32), axis=-1)
    return jnp.exp(jnp.take_along_axis(log_p, decision.candidate_BN[..., None], axis=-1)[..., 0])


@partial(jax.jit, static_argnames=("setup",), donate_argnames="pool")
def read(
    model: Model, setup: Setup, slots: Slots, pool: Pool, table: jax.Array, chunks: Chunks
) -> Pool:
    """The pool with the keys of the chunks: what a lane reads may stand on the lane before it.

    `table` is that of Orders: it says how many columns of the rows are in use.
    """
    width = table.shape[1] * pool[0][0].shape[1]
    rows = narrowed(model, setup, slots, width).rows
    some: Rows = jax.tree.map(lambda x: x[chunks.slot], rows)
    cache: Any = PagedCache(*pool, table[chunks.slot])
    columns_FW = span(chunks.start, chunks.width)
    wanted_F = chunks.start < chunks.stop
    _, cache = absorb(model, setup, some, cache, columns_FW, chunks.stop, wanted_F)
    return placed(model, (cache.keys, cache.values))


def reported(slots: Slots, calls: jax.Array) -> Report:
    """Copies of what the host may want to see."""
    rows = slots.rows
    return Report(
        calls, rows.done, slots.failed, rows.nfe, rows.first, rows.calls, rows.tokens,
        rows.open, slots.filled_at, slots.chance,
    )  # fmt: skip


def by_column(model: Model, setup: Setup, slots: Slots) -> Any:
    """Which arrays of the slots have an axis of columns: a tree of booleans."""

    def shapes(columns: int) -> Any:
        B = len(slots.waited)
        ints, flags = jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((B,), bool)
        tokens = jax.ShapeDtypeStruct((B, columns), jnp.int32)
        keys = jax.ShapeDtypeStruct((B,), slots.rows.keys.dtype)
        return jax.eval_shape(
            lambda a, b, c, d, e: begin(model, setup, a, b, c, d, e, slots.dials),
            tokens,
            ints,
            ints,
            keys,
            flags,
        )

    return jax.tree.map(lambda a, b: a.shape != b.shape, shapes(128), shapes(256))


def narrowed(model: Model, setup: Setup, slots: Slots, width: int) -> Slots:
    """The first columns of the slots: no canvas in work is longer."""
    wide = by_column(model, setup, slots)
    return jax.tree.map(lambda x, cut: x[:, :width] if cut else x, slots, wide)


def widened(model: Model, setup: Setup, slots: Slots, whole: Slots) -> Slots:
    """The slots with the columns behind them as they were."""
    wide = by_column(model, setup, slots)
    return jax.tree.map(
        lambda x, old, cut: old.at[:, : x.shape[1]].set(x) if cut else x, slots, whole, wide
    )


def placed(model: Model, pool: Pool) -> Pool:
    """The pool where it lies, heads split as those of the weights.

    It is said of one device, too: what a program is given must look like what it gives, or it is
    compiled twice.
    """
    if model.mesh is None:
        return pool
    axes = (None, None, "kv_heads", None)

    def place(x: jax.Array) -> jax.Array:
        spec = sharding.spec("cache", x.shape, axes, model.mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(model.mesh, spec))

    return jax.tree.map(place, pool)


def everywhere(model: Model, slots: Slots) -> Slots:
    """The slots where they lie: whole, on all devices of an engine."""
    if model.mesh is None:
        return slots
    return jax.lax.with_sharding_constraint(slots, sharding.replicated(model.mesh))
