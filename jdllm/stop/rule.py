"""What a stop rule sees, what it says, and how several become one.

Rules know arrays only. None changes what a row's completion says up to its first end.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Look:
    """The canvases after a step or after a block, and what a stop rule may know besides."""

    tokens_BT: jax.Array
    open_BT: jax.Array
    """Generated columns that are still to be filled."""
    generated_BT: jax.Array
    """Columns behind the prompt."""
    block_BT: jax.Array
    """Columns of the row's block in work."""
    opening: bool
    """Whether this was a full pass, of those that open a block."""
    closing: bool
    """Whether the block has just ended; otherwise a step has."""
    done_B: jax.Array
    """Rows that had ended before."""
    nfe_B: jax.Array
    """Model evaluations of each row."""
    step_B: jax.Array
    """Calls made for the block."""
    candidates_BT: jax.Array
    """What each column in view would take now, -1 elsewhere."""
    written_BT: jax.Array
    """Columns that the last step wrote."""


class Verdict(NamedTuple):
    """What a stop rule says."""

    tokens_BT: jax.Array
    """The canvases, changed where the rule says so; an open column that changes is filled."""
    leave_block_B: jax.Array
    """Rows whose block gets no further call, whatever is open in it."""
    end_row_B: jax.Array
    """Rows that are finished."""
    carry: Any
    """What the rule remembers."""


class Stop(Protocol):
    """Judges the canvases after a step, and after a block."""

    def start(self, tokens_BT: jax.Array) -> Any:
        """What the rule remembers before the first step; its arrays lead with the rows."""
        ...

    def __call__(self, look: Look, carry: Any) -> Verdict: ...


@dataclasses.dataclass(frozen=True)
class Forgetful:
    """A rule without memory: `judge` says all."""

    def start(self, tokens_BT: jax.Array) -> None:
        return None

    def __call__(self, look: Look, carry: None) -> Verdict:
        tokens_BT, end_row_B = self.judge(look)
        return Verdict(tokens_BT, jnp.zeros_like(end_row_B), end_row_B, None)

    def judge(self, look: Look) -> tuple[jax.Array, jax.Array]:
        """The canvases [B, T], and the rows that are finished [B]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class NoStop(Forgetful):
    """Every canvas is filled to its end."""

    def judge(self, look: Look) -> tuple[jax.Array, jax.Array]:
        return look.tokens_BT, jnp.zeros(look.tokens_BT.shape[0], bool)


@dataclasses.dataclass(frozen=True)
class Stops:
    """All of several rules, one after another: each sees what those before it have filled."""

    rules: tuple[Stop, ...]

    def start(self, tokens_BT: jax.Array) -> tuple[Any, ...]:
        return tuple(rule.start(tokens_BT) for rule in self.rules)

    def __call__(self, look: Look, carry: tuple[Any, ...]) -> Verdict:
        none_B = jnp.zeros(look.tokens_BT.shape[0], bool)
        leave_B, end_B, kept = none_B, none_B, []
        for rule, memory in zip(self.rules, carry, strict=True):
            verdict = rule(look, memory)
            leave_B |= verdict.leave_block_B
            end_B |= verdict.end_row_B
            kept.append(verdict.carry)
            open_BT = look.open_BT & (verdict.tokens_BT == look.tokens_BT)
            look = dataclasses.replace(look, tokens_BT=verdict.tokens_BT, open_BT=open_BT)
        return Verdict(look.tokens_BT, leave_B, end_B, tuple(kept))


def with_rule(stop: Stop, kind: type, change: Callable[[Any], Stop]) -> Stop:
    """`stop` with every rule of a kind changed, in whatever composition it stands."""
    if isinstance(stop, Stops):
        return Stops(tuple(with_rule(rule, kind, change) for rule in stop.rules))
    return change(stop) if isinstance(stop, kind) else stop


def fill_block(look: Look, rows_B: jax.Array) -> jax.Array:
    """The canvases whose block's open columns take their candidates, in the given rows."""
    open_BT = look.block_BT & look.open_BT & (look.candidates_BT >= 0)
    return jnp.where(open_BT & rows_B[:, None], look.candidates_BT, look.tokens_BT)


def first(hit_BT: jax.Array) -> jax.Array:
    """Column of each row's first hit, T where there is none."""
    return jnp.where(jnp.any(hit_BT, 1), jnp.argmax(hit_BT, 1), hit_BT.shape[1])


def after(hit_BT: jax.Array) -> jax.Array:
    """Columns behind each row's first hit [B, T]."""
    return jnp.arange(hit_BT.shape[1]) > first(hit_BT)[:, None]
