"""What a model call shows of the rows: to the unmasking rule, and to the stop rules."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jdllm import unmask
from jdllm.decode.feed import feed, guided, paired
from jdllm.decode.layout import off_canvas, put, take, take_rows, visible_end, window
from jdllm.decode.rows import Rows
from jdllm.decode.setup import Setup
from jdllm.model.cache import Cache
from jdllm.model.head import Sampling
from jdllm.model.model import Model
from jdllm.stop import Look, StopView
from jdllm.unmask.confidence import entropy, margin

Judge = Callable[[jax.Array, jax.Array], unmask.Verify]
"""Canvases [B, T] and columns in view [B, N] -> the verifier, as a rule sees it."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What a driver says of a model call."""

    active_B: jax.Array
    """Rows for which it counts, and which it may change."""
    full: bool = False
    """Whether every column is fed; else the window that the plan says."""
    draws: jax.Array | None = None
    """Uniform draws [B, T] or [B, T, V] instead of those of the rows' keys."""
    judge: Judge | None = None
    logits: bool = False
    """Whether logits must be in view, whatever the rule reads."""
    aims: Any = None
    """What a stop rule compares activations with."""
    commits_B: jax.Array | None = None
    """Rows apart whose finished block is fed for its keys alone; nothing else of them changes."""
    apart: bool = False
    """Whether other rows keep their keys in the cache; they must where rows are not in lockstep."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a call has shown."""

    view: unmask.View
    columns_BN: jax.Array
    """The columns in view."""
    window_BW: jax.Array
    """The columns fed."""
    hidden_BND: jax.Array
    """Hidden states of the view; under guidance of twice as many rows."""
    hidden_BWD: jax.Array
    """Hidden states of the window."""
    probes: Mapping[str, jax.Array]
    """Activations of the window by module, where a stop rule asks for some."""


def look_at(
    model: Model, setup: Setup, rows: Rows, cache: Cache | None, call: Call
) -> tuple[Seen, Cache | None]:
    """What the rule is shown of each row's view by one model call, and the cache after it."""
    columns_BN, window_BW = setup.view.columns(rows), window(setup, rows, call.full)
    if call.apart:
        window_BW = off_canvas(window_BW, ~written(rows, window_BW, call), rows.tokens.shape[1])
    ends_B = visible_end(setup, rows)
    found = feed(model, setup, rows, cache, window_BW, ends_B, setup.asks.probes)
    hidden_BWD, cache = found.hidden, found.cache
    # A shifted model's logits of a column stand in the column before, or the first one fed.
    source_BN = jnp.maximum(columns_BN - model.config.shift_logits, 0)
    inside_BN = jnp.clip(source_BN - window_BW[:, :1], 0, window_BW.shape[1] - 1)
    hidden_BND = take_rows(hidden_BWD, paired(setup, inside_BN))
    view = view_of(setup, rows, columns_BN, call)
    view = dataclasses.replace(view, **predicted(model, setup, rows, call, hidden_BND))
    return Seen(view, columns_BN, window_BW, hidden_BND, hidden_BWD, found.probes), cache


def predicted(
    model: Model, setup: Setup, rows: Rows, call: Call, hidden_BND: jax.Array
) -> dict[str, Any]:
    """What a view shows of the predictions: best tokens where these suffice, or logits."""
    rule, sampling = setup.unmask, None
    suffices = not (call.logits or setup.cfg_scale or setup.asks.entropy)
    if suffices and rule.sampled is not None:
        keys_B = draw_keys(rows, 2)
        # Recorded draws are given by number, and margins are those of logits without noise.
        suffices = call.draws is None and not setup.asks.margin and counts_draws(keys_B)
        sampling = Sampling(keys_B, *rule.sampled)
    if not suffices or rule.special is None:
        return {"logits": guided(model, setup, hidden_BND)}
    return {"best": model.best(hidden_BND, rule.special, sampling=sampling)}


def written(rows: Rows, window_BW: jax.Array, call: Call) -> jax.Array:
    """Which columns fed [B, W] or [B, 1] get new keys where rows are apart."""
    if call.commits_B is None:
        return call.active_B[:, None]
    own_BW = call.commits_B[:, None] & (window_BW >= rows.first[:, None])
    return call.active_B[:, None] | own_BW


def view_of(setup: Setup, rows: Rows, columns_BN: jax.Array, call: Call) -> unmask.View:
    """What is known of the columns in view before the model has said anything."""
    inside_BN = (columns_BN < rows.limit[:, None]) & call.active_B[:, None]
    open_BN = inside_BN & take(rows.open, columns_BN)
    left_B = jnp.sum(open_BN, axis=1)
    quota_B, share_B = setup.schedule(unmask.Pace(rows.opened, left_B, rows.step, rows.block))
    due_B = jnp.maximum(rows.due, 1)  # a block that is being finished goes by what is left
    quota_B = jnp.where(rows.due > 0, -(-left_B // due_B), quota_B)
    floor_B = jnp.full(left_B.shape, -jnp.inf)
    return unmask.View(
        ids_BN=take(rows.tokens, columns_BN),
        open_BN=open_BN,
        settled_BN=inside_BN & ~open_BN & take(rows.free, columns_BN),
        quota_B=quota_B,
        share_B=share_B,
        floor_B=1 - rows.nfe * setup.smooth.decay if setup.smooth else floor_B,
        draw=draws(rows, columns_BN, call),
        full=call.full and setup.plan.refreshes,
        verify=call.judge(rows.tokens, columns_BN) if call.judge else None,
    )


def draws(rows: Rows, columns_BN: jax.Array, call: Call) -> unmask.Draw:
    """Uniform draws of this call: from each row's key and NFE, or those that the driver has."""
    recorded = call.draws
    if recorded is not None:
        return lambda shape: take_rows(recorded, columns_BN)

    def fresh(shape: tuple[int, ...]) -> jax.Array:
        return jax.vmap(lambda key: jax.random.uniform(key, shape))(draw_keys(rows, len(shape)))

    return fresh


def draw_keys(rows: Rows, rank: int) -> jax.Array:
    """The keys [B] of a call's draws (N,) or (N, V), by their rank: they must not share numbers."""
    keys_B = jax.vmap(jax.random.fold_in)(rows.keys, rows.nfe)
    return jax.vmap(lambda key: jax.random.fold_in(key, rank))(keys_B)


def counts_draws(keys_B: jax.Array) -> bool:
    """Whether each of a key's draws is a function of its number, as the head takes them."""
    threefry = jax.random.key_data(keys_B).shape[1:] == (2,)
    return threefry and bool(jax.config.jax_threefry_partitionable)


def stop_view(rows: Rows, opening: bool = False, closing: bool = False) -> StopView:
    """What stop rules see of the rows as they are: after a call, or when a block is `closing`."""
    return StopView(
        tokens_BT=rows.tokens,
        open_BT=rows.open & rows.generated_BT,
        generated_BT=rows.generated_BT,
        block_BT=rows.block_BT,
        opening=opening,
        closing=closing,
        done_B=rows.done,
        nfe_B=rows.nfe,
        step_B=rows.step,
        candidates_BT=jnp.full_like(rows.tokens, -1),
        written_BT=jnp.zeros(rows.tokens.shape, bool),
    )


def shown(
    setup: Setup, rows: Rows, seen: Seen, call: Call, excluded: tuple[int, ...]
) -> Look | None:
    """What stop rules asked to see of a call, by the rows before it; None where none asks."""
    if not setup.looks:
        return None
    nothing_BT, asks, view = jnp.zeros(rows.tokens.shape), setup.asks, seen.view

    def on_canvas(x_BN: jax.Array) -> jax.Array:
        return put(nothing_BT, jnp.where(view.open_BN, x_BN, 0.0), seen.columns_BN)

    return Look(
        settled_BT=rows.free & ~rows.open,
        opened_B=rows.opened,
        block_B=rows.block,
        steps_B=setup.steps_of(rows.block),
        due_B=rows.due,
        margin_BT=on_canvas(margin(view, excluded)) if asks.margin else None,
        entropy_BT=on_canvas(entropy(view.logits_BNV)) if asks.entropy else None,
        probes=seen.probes,
        window_BW=seen.window_BW,
        aims=call.aims,
    )
