"""Stop rules: when a row has its answer. Small frozen objects that know arrays only."""

import dataclasses
from typing import Protocol

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


class Stop(Protocol):
    """Looks at the canvases after a step and says which rows are finished."""

    def __call__(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        """The canvases [B, T], changed where the rule says so, and finished rows [B]."""
        ...


@dataclasses.dataclass(frozen=True)
class NoStop:
    """Every canvas is filled to its end."""

    def __call__(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        return tokens_BT, jnp.zeros(tokens_BT.shape[0], bool)


@dataclasses.dataclass(frozen=True)
class EosStop:
    """A row ends once its first generated end id has no mask before it; eos fills the rest.

    The text up to that id can change no more, so stopping here never changes a completion.
    """

    eos_id: int
    end_ids: tuple[int, ...]
    """Ids that end a text: eos and the end of a turn."""

    def __call__(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        ends_BT = look.generated_BT & jnp.isin(tokens_BT, jnp.array(self.end_ids))
        open_BT = look.generated_BT & (tokens_BT == look.mask_id)
        done_B = jnp.any(ends_BT, 1) & (_first(ends_BT) < _first(open_BT))
        after_BT = _after(ends_BT) & look.generated_BT & done_B[:, None]
        return jnp.where(after_BT, self.eos_id, tokens_BT), done_B


@dataclasses.dataclass(frozen=True)
class EosFill:
    """dInfer's early_stop for Fast-dLLM: after a step everything behind the first eos becomes eos.

    Quirks, kept: the eos may stand in the prompt; tokens and masks behind it are overwritten even
    where masks are left before it; the row ends with the block; nothing is filled after the full
    pass that opens a block.
    """

    eos_id: int

    def __call__(self, tokens_BT: jax.Array, look: Look) -> tuple[jax.Array, jax.Array]:
        ends_BT = tokens_BT == self.eos_id
        behind_BT = _after(ends_BT) & look.generated_BT & (not look.opening)
        filled_BT = jnp.where(behind_BT, self.eos_id, tokens_BT)
        open_B = jnp.any(look.block_BT & (filled_BT == look.mask_id), 1)
        return filled_BT, jnp.any(ends_BT, 1) & ~open_B


def _first(hit_BT: jax.Array) -> jax.Array:
    """Column of each row's first hit, T where there is none."""
    return jnp.where(jnp.any(hit_BT, 1), jnp.argmax(hit_BT, 1), hit_BT.shape[1])


def _after(hit_BT: jax.Array) -> jax.Array:
    """Columns behind each row's first hit."""
    return jnp.arange(hit_BT.shape[1]) > _first(hit_BT)[:, None]
