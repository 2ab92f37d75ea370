"""EDIT's generate: every step is made, and what an exit has no call left for stays open."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jdllm.decode import DecodeConfig, Setup
from jdllm.model.config import ModelConfig
from jdllm.parity.calls import Around
from jdllm.parity.llada import CanvasView, FillsPrompts
from jdllm.stop import Exit
from jdllm.stop.rule import with_rule
from jdllm.unmask import Carry
from jdllm.unmask.schedule import Pace


@dataclasses.dataclass(frozen=True)
class Restless(Around):
    """The rule `inner`, but a block is called until its steps are over, open or not."""

    def wants(self, open_B: jax.Array, carry: Carry) -> jax.Array:
        return jnp.ones_like(open_B, bool)


@dataclasses.dataclass(frozen=True)
class Counted:
    """A schedule of recorded counts: tokens of every step, block by block.

    EDIT sums float32 fractions in the order that a CPU's vector units have, truncates, and so loses
    one token of some blocks (63 of 64). Another device or thread count may lose others; only the
    counts themselves can be repeated.
    """

    counts: tuple[tuple[int, ...], ...]

    @property
    def steps(self) -> int | None:
        return max(map(len, self.counts))

    def __call__(self, pace: Pace) -> tuple[jax.Array, jax.Array]:
        table = np.zeros((len(self.counts), (self.steps or 0) + 1), np.int32)
        for i, row in enumerate(self.counts):
            table[i, : len(row)] = row
        block_B = jnp.minimum(pace.block_B, len(self.counts) - 1)
        step_B = jnp.minimum(pace.step_B, table.shape[1] - 1)
        return jnp.asarray(table)[block_B, step_B], jnp.ones(step_B.shape)


def copy(setup: Setup, config: DecodeConfig, model: ModelConfig) -> Setup:
    """Returns the setup of EDIT's loop, but for the tokens that its schedule loses: `counted`."""
    return dataclasses.replace(
        setup,
        unmask=Restless(setup.unmask),
        stop=with_rule(setup.stop, Exit, lambda rule: dataclasses.replace(rule, leaves_open=True)),
        view=CanvasView(),
        driver=FillsPrompts(),
    )


def counted(setup: Setup, counts: tuple[tuple[int, ...], ...]) -> Setup:
    """Returns the setup with recorded counts of every block in place of its schedule."""
    steps = tuple(map(len, counts))
    return dataclasses.replace(setup, schedule=Counted(counts), block_steps=steps)
