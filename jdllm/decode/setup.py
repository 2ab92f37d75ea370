"""Setup: what a DecodeConfig means for one model, as objects that are static under jit."""

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp

from jdllm import stop as stops
from jdllm.decode.config import DecodeConfig
from jdllm.decode.groups import Smooth
from jdllm.decode.layout import BlockView, OpenView, View
from jdllm.decode.plan import Plan
from jdllm.decode.rules import make_rule, make_schedule, make_stop, steps_of_blocks
from jdllm.model.config import ModelConfig
from jdllm.stop.exit import of_block
from jdllm.stop.rule import rules_of
from jdllm.unmask import Rule, Schedule

if TYPE_CHECKING:  # loop.py stands on this file
    from jdllm.decode.loop import State, Work


class Driver(Protocol):
    """Who decides which rows take part in which calls, where it is not the loop in lockstep."""

    def start(self, work: "Work", state: "State") -> "State":
        """The state before the first block, from one in which nothing has been called yet."""
        ...

    def run_block(self, work: "Work", state: "State") -> "State":
        """The state after one block of every row."""
        ...


@dataclasses.dataclass(frozen=True)
class Setup:
    """A resolved DecodeConfig for one model: the rules as objects, static under jit."""

    unmask: Rule
    schedule: Schedule
    stop: stops.Stop
    plan: Plan
    view: View
    """Which columns the rule is shown."""
    gen_length: int
    block_length: int
    align: bool
    whole_blocks: bool
    """The canvas is rounded up to whole blocks (block-causal models)."""
    smooth: Smooth | None = None
    cfg_scale: float = 0.0
    lookahead: int | None = None
    extra_steps: int = 0
    """Steps a block may need beyond those of its schedule, or one per column."""
    block_lengths: tuple[int, ...] = ()
    """Blocks of unequal length, one after another, instead of `block_length`."""
    block_steps: tuple[int, ...] = ()
    """Steps of each block, where they have not equally many."""
    driver: Driver | None = None
    """Default: every row in lockstep (loop.py)."""

    @property
    def blocks(self) -> int:
        """Blocks of a row, at most."""
        return len(self.block_lengths) or -(-self.gen_length // self.block_length) + self.align

    @property
    def longest_block(self) -> int:
        """Columns of the longest block."""
        return max(self.block_lengths, default=self.block_length)

    @property
    def longest_canvas(self) -> int:
        """Columns of all blocks together, at most."""
        return sum(self.block_lengths) or self.blocks * self.block_length

    @property
    def step_limit(self) -> int:
        """A bound on the calls of a block for any weights: each fills at least one column."""
        steps = self.schedule.steps or self.longest_block + 1
        return steps + self.extra_steps + self.plan.warmup

    def steps_of(self, block_B: jax.Array) -> jax.Array:
        """Steps of a block by its number [B], as its schedule has them, or one per column."""
        if self.block_steps:
            return of_block(self.block_steps, block_B)
        return jnp.full(block_B.shape, self.schedule.steps or self.longest_block)

    def limit_of(self, block_B: jax.Array) -> jax.Array:
        """`step_limit` of each row's block [B]."""
        return self.step_limit - self.most_steps + self.steps_of(block_B)

    @property
    def most_steps(self) -> int:
        """The most that `steps_of` says of a block."""
        return self.schedule.steps or self.longest_block

    @property
    def asks(self) -> stops.Asks:
        """What the stop rules read of a call."""
        found = [rule.asks for rule in rules_of(self.stop) if isinstance(rule, stops.Exit)]
        return found[0] if found else stops.Asks()

    @property
    def looks(self) -> bool:
        """Whether a stop rule reads anything of a call besides its tokens."""
        return any(isinstance(rule, stops.Exit) for rule in rules_of(self.stop))

    @property
    def block_calls(self) -> int:
        """A bound on the model calls of a block, those that only write keys included."""
        return 2 * self.step_limit + 3

    @property
    def call_limit(self) -> int:
        """A bound on the model calls of a request."""
        return self.blocks * self.block_calls + 1

    @property
    def fixed_past(self) -> bool:
        """Whether the keys of a finished block depend on nothing but the tokens up to its end.

        With guidance a second row of masks has keys of its own; then they are not shared.
        """
        return self.plan.kind == "block" and self.whole_blocks and not self.cfg_scale

    def first_block(self, prompt_length: Any) -> Any:
        """The column where the first block begins; an int or an array."""
        L = self.block_length
        return prompt_length // L * L if self.align else prompt_length

    def block_span(self, prompt_B: jax.Array, block_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first column of a block by its number, and the column behind its last one [B]."""
        start_B = self.first_block(prompt_B)
        if not self.block_lengths:
            first_B = start_B + block_B * self.block_length
            return first_B, first_B + self.block_length
        edges = jnp.array([0, *itertools.accumulate(self.block_lengths)])
        before_B = edges[jnp.minimum(block_B, self.blocks - 1)]
        after_B = edges[jnp.minimum(block_B + 1, self.blocks)]
        return start_B + before_B, start_B + after_B

    def canvas_length(self, prompt_length: Any) -> Any:
        """Columns of a prompt and what is decoded for it; an int or an array."""
        end, L = prompt_length + self.gen_length, self.block_length
        return -(-end // L) * L if self.whole_blocks else end


def make_setup(config: DecodeConfig, model: ModelConfig) -> Setup:
    """Static description of the loop for a resolved `config` and `model`.

    The config's `parity` is not looked at: jdllm.parity puts that on top. ValueError where the
    config is still open, or does not fit the model.
    """
    if model.causal:
        raise ValueError(
            "the model is causal (an autoregressive one); it can judge drafts as a verifier, but a "
            "diffusion model must make them"
        )
    if config.gen_length is None or config.block_length is None or config.cache is None:
        raise ValueError("the config is still open: call DecodeConfig.resolve first")
    if model.block_causal and config.cache in ("prefix", "dual"):
        raise ValueError(
            f"cache={config.cache} reads keys of later blocks, which a block-causal model never "
            "sees; use cache=block, which is exact"
        )
    if model.block_causal and not config.align:
        raise ValueError(
            "a block-causal model counts its blocks from column 0; align=false would straddle "
            "them, leave it out"
        )
    if model.shift_logits and config.smooth.weight:
        raise ValueError(
            f"smooth.weight={config.smooth.weight} feeds a mask what stands in its own row of the "
            "logits, which in this model predicts the next token; set smooth.weight=0"
        )
    gen_length, block_length = config.gen_length, config.block_length
    from_open = config.verify.lookahead or (config.verify.window and block_length)
    blocks = len(config.block_lengths) or -(-gen_length // block_length)
    return Setup(
        unmask=make_rule(config, model),
        schedule=make_schedule(config, blocks),
        stop=make_stop(config, model),
        plan=Plan(
            config.cache,
            config.refresh_every,
            config.vicinity.warmup,
            before=config.vicinity.before + model.shift_logits,
            after=config.vicinity.after,
            window=config.verify.window or None,
        ),
        view=OpenView(from_open) if from_open else BlockView(block_length),
        gen_length=gen_length,
        block_length=block_length,
        align=bool(config.align),
        whole_blocks=model.block_causal is not None,
        smooth=config.smooth if config.smooth.weight else None,
        cfg_scale=config.cfg_scale,
        lookahead=config.verify.lookahead or None,
        extra_steps=config.edit.passes + 2 if config.edit.on else 0,
        block_lengths=config.block_lengths,
        block_steps=steps_of_blocks(config) if config.schedule == "gaussian" else (),
    )
