"""The input and the result of a stop rule, and how several rules become one.

Rules know only arrays. No rule changes a row's completion up to its first end.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class StopView:
    """The input of a stop rule: the canvases after a step or a block, and facts about them."""

    tokens_BT: jax.Array
    open_BT: jax.Array
    """Generated columns that are still to be filled."""
    generated_BT: jax.Array
    """Columns after the prompt."""
    block_BT: jax.Array
    """Columns of the block that the row decodes now."""
    opening: bool
    """Whether the step was a full pass that opens a block."""
    closing: bool
    """Whether the block has just ended; if False, a step has."""
    done_B: jax.Array
    """Rows that ended earlier."""
    nfe_B: jax.Array
    """Model evaluations of each row."""
    step_B: jax.Array
    """Model calls made for the block."""
    candidates_BT: jax.Array
    """The token that each column in view would take now, -1 elsewhere."""
    written_BT: jax.Array
    """Columns that the last step wrote."""
    look: "Look | None" = None
    """What else the last step showed, for rules that ask; None when a block closes."""


@dataclasses.dataclass(frozen=True)
class Look:
    """What the model call of a step showed besides candidates."""

    settled_BT: jax.Array
    """Generated columns that held a token when the call was made."""
    opened_B: jax.Array
    """Columns that were open when the block began."""
    block_B: jax.Array
    """The number of the row's block."""
    steps_B: jax.Array
    """Steps that the schedule has for the block."""
    due_B: jax.Array
    """Calls, this one included, in which the block was to be finished; -1 where none said so."""
    margin_BT: jax.Array | None = None
    """How far the logit of each open column's best token exceeds the second best."""
    entropy_BT: jax.Array | None = None
    """The entropy of each open column's prediction, in nats."""
    probes: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    """Activations [R, W, ...] by module; under guidance R is two rows for each of the batch."""
    window_BW: jax.Array | None = None
    """The columns that the probes are of, increasing."""
    aims: Any = None
    """What activations are compared with, by module (jdllm.stop.dynamics.Aim)."""


@dataclasses.dataclass(frozen=True)
class Asks:
    """What of a `Look` a rule reads, so that nothing else is computed."""

    margin: bool = False
    entropy: bool = False
    probes: tuple[str, ...] = ()
    """Patterns of modules' names."""


class Verdict(NamedTuple):
    """The result of a stop rule."""

    tokens_BT: jax.Array
    """The canvases, with the rule's changes; an open column that changes is filled."""
    leave_block_B: jax.Array
    """Rows whose block gets no further call, whatever is open in it."""
    end_row_B: jax.Array
    """Rows that are finished."""
    carry: Any
    """The memory of the rule."""
    finish_B: jax.Array | None = None
    """int32: calls in which what is open in the row's block is to be written, before the block is
    left; -1 where the schedule goes on."""


class Stop(Protocol):
    """A stop rule: it judges the canvases after every step, and after every block."""

    def start(self, tokens_BT: jax.Array) -> Any:
        """Returns the memory before the first step; the first axis of its arrays is the row."""
        ...

    def __call__(self, view: StopView, carry: Any) -> Verdict: ...


@dataclasses.dataclass(frozen=True)
class Forgetful:
    """A rule without memory, which defines only `judge`."""

    def start(self, tokens_BT: jax.Array) -> None:
        return None

    def __call__(self, view: StopView, carry: None) -> Verdict:
        tokens_BT, end_row_B = self.judge(view)
        return Verdict(tokens_BT, jnp.zeros_like(end_row_B), end_row_B, None)

    def judge(self, view: StopView) -> tuple[jax.Array, jax.Array]:
        """Returns the canvases [B, T], and the rows that are finished, bool [B]."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class NoStop(Forgetful):
    """Ends no row early: every canvas is filled to its end."""

    def judge(self, view: StopView) -> tuple[jax.Array, jax.Array]:
        return view.tokens_BT, jnp.zeros(view.tokens_BT.shape[0], bool)


@dataclasses.dataclass(frozen=True)
class Stops:
    """Applies several rules in turn; each one sees what the rules before it have filled."""

    rules: tuple[Stop, ...]

    def start(self, tokens_BT: jax.Array) -> tuple[Any, ...]:
        return tuple(rule.start(tokens_BT) for rule in self.rules)

    def __call__(self, view: StopView, carry: tuple[Any, ...]) -> Verdict:
        none_B = jnp.zeros(view.tokens_BT.shape[0], bool)
        leave_B, end_B, finish_B, kept = none_B, none_B, None, []
        for rule, memory in zip(self.rules, carry, strict=True):
            verdict = rule(view, memory)
            leave_B |= verdict.leave_block_B
            end_B |= verdict.end_row_B
            kept.append(verdict.carry)
            if verdict.finish_B is not None:
                finish_B = verdict.finish_B
            open_BT = view.open_BT & (verdict.tokens_BT == view.tokens_BT)
            view = dataclasses.replace(view, tokens_BT=verdict.tokens_BT, open_BT=open_BT)
        return Verdict(view.tokens_BT, leave_B, end_B, tuple(kept), finish_B)


def rules_of(stop: Any) -> Iterator[Any]:
    """Yields a rule, and those that it is composed of."""
    yield stop
    inside = stop.rules if isinstance(stop, Stops) else [getattr(stop, "inner", None)]
    for rule in inside:
        if rule is not None:
            yield from rules_of(rule)


def with_rule(stop: Stop, rule_type: type, change: Callable[[Any], Stop]) -> Stop:
    """Returns `stop` with every rule of a type changed, also those inside of Stops."""
    if isinstance(stop, Stops):
        return Stops(tuple(with_rule(rule, rule_type, change) for rule in stop.rules))
    return change(stop) if isinstance(stop, rule_type) else stop


def fill_block(view: StopView, rows_B: jax.Array) -> jax.Array:
    """Returns the canvases [B, T]; in the given rows the block's open columns are filled."""
    open_BT = view.block_BT & view.open_BT & (view.candidates_BT >= 0)
    return jnp.where(open_BT & rows_B[:, None], view.candidates_BT, view.tokens_BT)


def first(hit_BT: jax.Array) -> jax.Array:
    """Returns the column of each row's first hit [B], T where there is none."""
    return jnp.where(jnp.any(hit_BT, 1), jnp.argmax(hit_BT, 1), hit_BT.shape[1])


def after(hit_BT: jax.Array) -> jax.Array:
    """Returns the columns after each row's first hit, bool [B, T]."""
    return jnp.arange(hit_BT.shape[1]) > first(hit_BT)[:, None]
