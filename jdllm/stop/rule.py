"""Stop rules: when a row has its answer. Small frozen objects that know arrays only.

They combine: see `Stops`. None changes what a row's completion says up to its first end.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Look:
    """What a stop rule may know besides the canvases."""

    generated_BT: jax.Array
    """Columns behind the prompt."""
    block_BT: jax.Array
    """Columns of the current block."""
    mask_id: int
    opening: bool
    """Whether this was the full pass that opens a block."""
    closing: bool
    """Whether the block has just ended; otherwise a step has."""
    nfe_B: jax.Array
    """Model evaluations of each row."""
    candidates_BT: jax.Array
    """What each column in view would take now, -1 elsewhere."""
    written_BT: jax.Array
    """Columns that the last step wrote."""


class Stop(Protocol):
    """Looks at the canvases after a step, and after a block, and says which rows are finished."""

    def start(self, tokens_BT: jax.Array) -> Any:
        """What the rule remembers, before the first step; its arrays lead with the rows."""
        ...

    def __call__(
        self, tokens_BT: jax.Array, look: Look, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """The canvases [B, T], changed where the rule says so, finished rows [B], the carry."""
        ...


@dataclasses.dataclass(frozen=True)
class Forgetful:
    """A rule without memory: `judge` says all."""

    def start(self, tokens_BT: jax.Array) -> None:
        return None

    def __call__(
        self, tokens_BT: jax.Array, look: Look, carry: None
    ) -> tuple[jax.Array, jax.Array, None]:
        return *self.judge(tokens_BT, look), None

    def judge(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class NoStop(Forgetful):
    """Every canvas is filled to its end."""

    def judge(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        return tokens_BT, jnp.zeros(tokens_BT.shape[0], bool)


@dataclasses.dataclass(frozen=True)
class EosStop(Forgetful):
    """A row ends once its first generated end id has no mask before it; eos fills the rest.

    The text up to that id can change no more, so stopping here never changes a completion. Where
    tokens may be edited it waits for the end of the block.
    """

    eos_id: int
    end_ids: tuple[int, ...]
    """Ids that end a text: eos and the end of a turn."""
    after_block: bool = False

    def judge(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        ends_BT = look.generated_BT & jnp.isin(tokens_BT, jnp.array(self.end_ids))
        open_BT = look.generated_BT & (tokens_BT == look.mask_id)
        done_B = jnp.any(ends_BT, 1) & (first(ends_BT) < first(open_BT))
        done_B &= look.closing or not self.after_block
        after_BT = _after(ends_BT) & look.generated_BT & done_B[:, None]
        return jnp.where(after_BT, self.eos_id, tokens_BT), done_B


@dataclasses.dataclass(frozen=True)
class EosFill(Forgetful):
    """dInfer's early_stop for Fast-dLLM: after a step everything behind the first eos becomes eos.

    Quirks, kept: the eos may stand in the prompt, whose own tokens behind it go as well; tokens and
    masks behind it are overwritten even where masks are left before it; the row ends with the
    block; nothing is filled after the full pass that opens a block.
    """

    eos_id: int

    def judge(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        inside_BT = _before_padding(look)
        ends_BT = inside_BT & (tokens_BT == self.eos_id)
        behind_BT = _after(ends_BT) & inside_BT & (not (look.opening or look.closing))
        filled_BT = jnp.where(behind_BT, self.eos_id, tokens_BT)
        open_B = jnp.any(look.block_BT & (filled_BT == look.mask_id), 1)
        return filled_BT, jnp.any(ends_BT, 1) & ~open_B


@dataclasses.dataclass(frozen=True)
class EosBlock(Forgetful):
    """A row ends with the block that holds an eos (dInfer, LLaDA2, SGLang), whatever follows it.

    dInfer looks at the block's columns, the prompt's tail among them, and with `fill` (its
    early_stop) turns every later column into eos; the others look at all generated columns.
    """

    eos_id: int
    block_only: bool = False
    fill: bool = False

    def judge(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        last_B1 = jnp.max(jnp.where(look.block_BT, _columns(look.block_BT), -1), 1)[:, None]
        upto_BT = _columns(look.block_BT) <= last_B1
        where_BT = look.block_BT if self.block_only else look.generated_BT & upto_BT
        done_B = jnp.any(where_BT & (tokens_BT == self.eos_id), 1) & look.closing
        later_BT = look.generated_BT & ~upto_BT & done_B[:, None] & self.fill
        return jnp.where(later_BT, self.eos_id, tokens_BT), done_B


@dataclasses.dataclass(frozen=True)
class EosReturn(Forgetful):
    """LLaDA2.0's eos_early_stop: a step that wrote an eos ends the row if no mask is before it.

    Quirks, kept: the first eos of the whole canvas counts, the prompt's too; a mask before it that
    is filled by a later step does not end the row until the block ends; and as without the flag, a
    row ends with the block that holds an eos.
    """

    eos_id: int

    def judge(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        ends_BT = tokens_BT == self.eos_id
        open_BT = look.generated_BT & (tokens_BT == look.mask_id)
        wrote_B = jnp.any(ends_BT & look.written_BT, 1)
        done_B = wrote_B & (first(ends_BT) < first(open_BT))
        _, block_B = EosBlock(self.eos_id).judge(tokens_BT, look)
        return tokens_BT, done_B | block_B


@dataclasses.dataclass(frozen=True)
class EosAnywhere(Forgetful):
    """A row ends after the step that leaves an eos anywhere in it, prompt included (apd).

    Masks that are left stay.
    """

    eos_id: int

    def judge(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        return tokens_BT, jnp.any(_before_padding(look) & (tokens_BT == self.eos_id), 1)


@dataclasses.dataclass(frozen=True)
class Budget(Forgetful):
    """A row ends after `forwards` model evaluations.

    The last one fills its block; blocks that were never opened stay masked.
    """

    forwards: int

    def judge(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        spent_B = look.nfe_B >= self.forwards
        return _fill_block(tokens_BT, look, spent_B), spent_B


@dataclasses.dataclass(frozen=True)
class Stable:
    """A block is filled once what its masks would take stayed the same for `steps` steps.

    What would be unmasked one by one anyway is taken at once.
    """

    steps: int

    def start(self, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.full_like(tokens_BT, -1), jnp.zeros(tokens_BT.shape[0], jnp.int32)

    def __call__(
        self, tokens_BT: jax.Array, look: Look, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        before_BT, streak_B = carry
        none_B = jnp.zeros(tokens_BT.shape[0], bool)
        if look.closing:
            return tokens_BT, none_B, carry
        open_BT = look.block_BT & (tokens_BT == look.mask_id)
        same_B = jnp.all(~open_BT | (look.candidates_BT == before_BT), 1)
        streak_B = jnp.where(same_B, streak_B + 1, 0)
        tokens_BT = _fill_block(tokens_BT, look, streak_B >= self.steps)
        return tokens_BT, none_B, (jnp.where(look.block_BT, look.candidates_BT, -1), streak_B)


@dataclasses.dataclass(frozen=True)
class Stops:
    """All of several rules, one after another: a row ends when one of them says so."""

    rules: tuple[Stop, ...]

    def start(self, tokens_BT: jax.Array) -> tuple[Any, ...]:
        return tuple(rule.start(tokens_BT) for rule in self.rules)

    def __call__(
        self, tokens_BT: jax.Array, look: Look, carry: tuple[Any, ...]
    ) -> tuple[jax.Array, jax.Array, tuple[Any, ...]]:
        done_B = jnp.zeros(tokens_BT.shape[0], bool)
        kept = []
        for rule, state in zip(self.rules, carry, strict=True):
            tokens_BT, ended_B, state = rule(tokens_BT, look, state)
            done_B |= ended_B
            kept.append(state)
        return tokens_BT, done_B, tuple(kept)


def _fill_block(tokens_BT: jax.Array, look: Look, rows_B: jax.Array) -> jax.Array:
    """The block's masks take their candidates in the given rows."""
    open_BT = look.block_BT & (tokens_BT == look.mask_id) & (look.candidates_BT >= 0)
    return jnp.where(open_BT & rows_B[:, None], look.candidates_BT, tokens_BT)


def first(hit_BT: jax.Array) -> jax.Array:
    """Column of each row's first hit, T where there is none."""
    return jnp.where(jnp.any(hit_BT, 1), jnp.argmax(hit_BT, 1), hit_BT.shape[1])


def _columns(hit_BT: jax.Array) -> jax.Array:
    return jnp.arange(hit_BT.shape[1])


def _after(hit_BT: jax.Array) -> jax.Array:
    """Columns behind each row's first hit."""
    return _columns(hit_BT) > first(hit_BT)[:, None]


def _before_padding(look: Look) -> jax.Array:
    """Columns of the prompt and behind it; what fills a row up may be eos too."""
    behind_BT = jnp.flip(look.generated_BT, axis=1)
    return jnp.flip(jnp.cumsum(behind_BT, axis=1) > 0, axis=1)
