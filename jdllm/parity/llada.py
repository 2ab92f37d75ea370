"""LLaDA's generate.py: every step is made, and masks before the block compete, too."""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.decode import DecodeConfig, Setup
from jdllm.decode.loop import lockstep
from jdllm.decode.rows import Rows
from jdllm.decode.work import State, Work
from jdllm.model.config import ModelConfig
from jdllm.parity.calls import every_step


@dataclasses.dataclass(frozen=True)
class CanvasView:
    """A view of every column, not only of the block."""

    def length(self, canvas: int) -> int:
        return canvas

    def columns(self, rows: Rows) -> jax.Array:
        return jnp.broadcast_to(rows.columns_T, rows.tokens.shape)


@dataclasses.dataclass(frozen=True)
class FillsPrompts:
    """The lockstep driver, but a [MASK] in the prompt is an open column, which may be filled."""

    def start(self, work: Work, state: State) -> State:
        rows = state.rows
        masked_BT = (rows.tokens == work.model.config.mask_id) & ~rows.done[:, None]
        open_BT = masked_BT & (rows.columns_T < rows.end[:, None])
        return dataclasses.replace(
            state, rows=dataclasses.replace(rows, open=open_BT, free=open_BT)
        )

    def run_block(self, work: Work, state: State) -> State:
        return lockstep(work, state)


def copy(setup: Setup, config: DecodeConfig, model: ModelConfig) -> Setup:
    """Returns the setup of LLaDA's loop."""
    return dataclasses.replace(
        setup,
        unmask=every_step(setup.unmask, setup.schedule.steps),
        view=CanvasView(),
        driver=FillsPrompts(),
    )
