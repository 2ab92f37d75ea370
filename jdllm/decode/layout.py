"""Where things are on the canvases: blocks, views and windows, by row."""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.decode.rows import FULL, DecodeState, Request
from jdllm.decode.setup import Setup
from jdllm.model.config import ModelConfig
from jdllm.stop.rule import first


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Columns of a request, as the setup lays them out."""

    request: Request
    setup: Setup
    model: ModelConfig

    @property
    def columns_T(self) -> jax.Array:
        return jnp.arange(self.request.tokens.shape[1])

    @property
    def canvas_B1(self) -> jax.Array:
        """Columns of each row before its padding."""
        return self.setup.canvas_length(self.request.prompt_lengths)[:, None]

    @property
    def generated_BT(self) -> jax.Array:
        """Columns behind the prompt, before the padding."""
        behind_BT = self.columns_T >= self.request.prompt_lengths[:, None]
        return behind_BT & (self.columns_T < self.canvas_B1)

    @property
    def first_open_B1(self) -> jax.Array:
        """The column from which masks are filled: [MASK] in a prompt stays, but for one quirk."""
        lengths_B1 = self.request.prompt_lengths[:, None]
        return jnp.zeros_like(lengths_B1) if self.setup.quirks.earlier_masks else lengths_B1

    @property
    def shift(self) -> int:
        """1 where a column's logits stand in the column before it."""
        return int(self.model.shift_logits)

    @property
    def view_length(self) -> int:
        if self.setup.quirks.earlier_masks:
            return self.request.tokens.shape[1]
        return self.setup.lookahead or self.setup.block_length

    def ids(self, tokens_BT: jax.Array, columns_BN: jax.Array) -> jax.Array:
        """Tokens at columns; those beyond the canvas give the last one."""
        return jnp.take_along_axis(tokens_BT, columns_BN, axis=1, mode="clip")

    def block_start(self, block: jax.Array | int) -> jax.Array:
        """First column of the block, by row [B]."""
        first_B = self.setup.first_block(self.request.prompt_lengths)
        return first_B + block * self.setup.block_length

    def block_BT(self, block: jax.Array) -> jax.Array:
        """Whether a column belongs to the row's block."""
        start_B1 = self.block_start(block)[:, None]
        end_B1 = jnp.minimum(start_B1 + self.setup.block_length, self.canvas_B1)
        return (self.columns_T >= start_B1) & (self.columns_T < end_B1)

    def first_mask(self, state: DecodeState) -> jax.Array:
        """Column of each row's first generated mask [B]."""
        return first(self.generated_BT & (state.tokens == self.model.mask_id))

    def view(self, state: DecodeState) -> jax.Array:
        """Columns whose logits are wanted [B, N].

        The block; with a lookahead the columns from the first mask on; with earlier_masks all.
        """
        B, T = self.request.tokens.shape
        if self.setup.quirks.earlier_masks:
            return jnp.broadcast_to(self.columns_T, (B, T))
        if self.setup.lookahead or self.setup.kv_window:
            return span(self.first_mask(state), self.view_length)
        return span(self.block_start(state.block), self.setup.block_length)

    def limit_B1(self, state: DecodeState) -> jax.Array:
        """The column where what may be unmasked now ends."""
        end_B1 = self.block_start(state.block + 1)[:, None]
        return jnp.minimum(end_B1, self.canvas_B1)

    def visible_end(self, state: DecodeState) -> jax.Array:
        """The column where what may be seen now ends [B, 1]."""
        if self.setup.lookahead:
            end_B1 = self.first_mask(state)[:, None] + self.setup.lookahead
            return jnp.minimum(end_B1, self.canvas_B1)
        return self.limit_B1(state) if self.setup.plan.kind == "block" else self.canvas_B1

    def window(self, state: DecodeState, kind: int) -> jax.Array:
        """Columns to feed [B, W], increasing; those beyond the canvas are neither kept nor seen."""
        setup, plan = self.setup, self.setup.plan
        B, T = self.request.tokens.shape
        if kind == FULL or (plan.kind == "none" and not setup.kv_window):
            return jnp.broadcast_to(self.columns_T, (B, T))
        if setup.kv_window:  # apd: what was accepted last is fed once more, with some context
            back_B = setup.kv_window + state.accepted - 1
            start_B = self.first_mask(state) - back_B
            width = setup.kv_window + 2 * self.view_length
            return self._clamped(start_B, width, self.visible_end(state))
        quirks = setup.quirks
        before = plan.look_back + (0 if quirks.first_column else self.shift)
        start_B = self.block_start(state.block) - before
        if plan.kind == "prefix":
            width = setup.blocks * setup.block_length + before
            return self._clamped(start_B, width, self.canvas_B1)
        behind = plan.look_ahead - (self.shift if quirks.narrow else 0)
        width = before + setup.block_length + behind
        end_B1 = self.limit_B1(state) + behind
        return self._clamped(start_B, width, jnp.minimum(end_B1, self.canvas_B1))

    def _clamped(self, start_B: jax.Array, width: int, end_B1: jax.Array) -> jax.Array:
        """`width` columns from `start_B` on (at least 0); those from `end_B1` on are off canvas."""
        T = self.request.tokens.shape[1]
        columns_BW = span(jnp.maximum(start_B, 0), width)
        return jnp.where(columns_BW < end_B1, columns_BW, T + jnp.arange(width))


def span(start_B: jax.Array, length: int) -> jax.Array:
    """`length` columns from `start_B` on [B, length]."""
    return start_B[:, None] + jnp.arange(length)


def rows(x_BTX: jax.Array, columns_BN: jax.Array) -> jax.Array:
    """Some columns of every row."""
    return jax.vmap(lambda x, columns: x[columns])(x_BTX, columns_BN)


def put(tokens_BT: jax.Array, new_BN: jax.Array, columns_BN: jax.Array) -> jax.Array:
    """Canvases with `new_BN` at columns; those beyond the canvas are dropped."""
    return jax.vmap(lambda row, new, columns: row.at[columns].set(new, mode="drop"))(
        tokens_BT, new_BN, columns_BN
    )
