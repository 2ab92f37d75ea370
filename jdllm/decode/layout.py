"""Layout: where things are on the canvases. Blocks, views and windows, by row."""

import dataclasses
from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp

from jdllm.stop.rule import first

if TYPE_CHECKING:  # setup.py and rows.py stand on this file
    from jdllm.decode.rows import Rows
    from jdllm.decode.setup import Setup


class View(Protocol):
    """Which columns a rule is shown."""

    def length(self, canvas: int) -> int:
        """How many, on a canvas of so many columns."""
        ...

    def columns(self, rows: "Rows") -> jax.Array:
        """Their numbers [B, N], increasing; some may lie beyond the canvas."""
        ...


@dataclasses.dataclass(frozen=True)
class BlockView:
    """The block in work, `width` columns long at most."""

    width: int

    def length(self, canvas: int) -> int:
        return self.width

    def columns(self, rows: "Rows") -> jax.Array:
        return span(rows.first, self.width)


@dataclasses.dataclass(frozen=True)
class OpenView:
    """The first open column and what follows it, `width` columns (apd)."""

    width: int

    def length(self, canvas: int) -> int:
        return self.width

    def columns(self, rows: "Rows") -> jax.Array:
        return span(first_open(rows), self.width)


def window(setup: "Setup", rows: "Rows", full: bool) -> jax.Array:
    """Columns that a call feeds [B, W], increasing; nothing sees those beyond the canvas."""
    plan, (B, T) = setup.plan, rows.tokens.shape
    if full or not plan.cached:
        return jnp.broadcast_to(rows.columns_T, (B, T))
    if plan.window:  # what was accepted last is fed once more, with some context
        start_B = first_open(rows) - (plan.window + rows.accepted - 1)
        width = plan.window + 2 * setup.view.length(T)
        return clamped(start_B, width, visible_end(setup, rows), T)
    start_B = rows.first - plan.before
    if plan.kind == "prefix":
        return clamped(start_B, setup.longest_canvas + plan.before, rows.end, T)
    width = plan.before + setup.longest_block + plan.after
    return clamped(start_B, width, jnp.minimum(rows.limit + plan.after, rows.end), T)


def visible_end(setup: "Setup", rows: "Rows") -> jax.Array:
    """The column where what may be seen now ends [B]."""
    if setup.lookahead:
        return jnp.minimum(first_open(rows) + setup.lookahead, rows.end)
    return rows.limit if setup.plan.kind == "block" else rows.end


def first_open(rows: "Rows") -> jax.Array:
    """The first open column of each row [B]; T where there is none."""
    return first(rows.open & rows.generated_BT)


def span(start_B: jax.Array, length: int) -> jax.Array:
    """`length` columns from `start_B` on [B, length]."""
    return start_B[:, None] + jnp.arange(length)


def clamped(start_B: jax.Array, width: int, end_B: jax.Array, T: int) -> jax.Array:
    """`width` columns from `start_B` on (at least 0); those from `end_B` on are off canvas."""
    columns_BW = span(jnp.maximum(start_B, 0), width)
    return off_canvas(columns_BW, columns_BW >= end_B[:, None], T)


def off_canvas(columns_BW: jax.Array, off_BW: jax.Array, T: int) -> jax.Array:
    """The columns, with some of each row's last ones moved behind a canvas of T columns."""
    return jnp.where(off_BW, T + jnp.arange(columns_BW.shape[1]), columns_BW)


def take(x_BT: jax.Array, columns_BN: jax.Array) -> jax.Array:
    """What stands at columns [B, N]; those beyond the canvas give the last one."""
    return jnp.take_along_axis(x_BT, columns_BN, axis=1, mode="clip")


def take_rows(x_BTX: jax.Array, columns_BN: jax.Array) -> jax.Array:
    """Some columns of every row [B, N, ...]."""
    return jax.vmap(lambda x, columns: x[columns])(x_BTX, columns_BN)


def put(x_BT: jax.Array, new_BN: jax.Array, columns_BN: jax.Array) -> jax.Array:
    """Canvases with `new_BN` at columns; those beyond the canvas are dropped."""
    return jax.vmap(lambda row, new, columns: row.at[columns].set(new, mode="drop"))(
        x_BT, new_BN, columns_BN
    )
