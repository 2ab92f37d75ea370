"""Stop rules that search for ids which end a text, such as eos."""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.stop.rule import Forgetful, StopView, after, first


@dataclasses.dataclass(frozen=True)
class EosStop(Forgetful):
    """Ends a row once its first generated end id has no open column before it; eos fills the rest.

    The text up to that id cannot change any more, so stopping never changes a completion. Where
    tokens may be edited, the rule waits for the end of the block (`after_block`).
    """

    eos_id: int
    end_ids: tuple[int, ...]
    """Ids that end a text: eos, and the end of a chat turn."""
    after_block: bool = False

    def judge(self, view: StopView) -> tuple[jax.Array, jax.Array]:
        ends_BT = view.generated_BT & ~view.open_BT
        ends_BT &= jnp.isin(view.tokens_BT, jnp.array(self.end_ids))
        done_B = jnp.any(ends_BT, 1) & (first(ends_BT) < first(view.open_BT))
        done_B &= view.closing or not self.after_block
        after_BT = after(ends_BT) & view.generated_BT & done_B[:, None]
        return jnp.where(after_BT, self.eos_id, view.tokens_BT), done_B


@dataclasses.dataclass(frozen=True)
class EosFill(Forgetful):
    """Fills everything after the first eos with eos, after a step: dInfer's early_stop.

    dInfer does so in its port of Fast-dLLM. Quirks, kept: the eos may be in the prompt, and
    overwrites prompt tokens after it, too; tokens and masks after it are overwritten even where
    masks are left before it; the row ends with the block; nothing is filled after the full pass
    that opens a block.
    """

    eos_id: int

    def judge(self, view: StopView) -> tuple[jax.Array, jax.Array]:
        inside_BT = _before_padding(view)
        ends_BT = inside_BT & (view.tokens_BT == self.eos_id)
        behind_BT = after(ends_BT) & inside_BT & (not (view.opening or view.closing))
        filled_BT = jnp.where(behind_BT, self.eos_id, view.tokens_BT)
        open_B = jnp.any(view.block_BT & view.open_BT & ~behind_BT, 1)
        return filled_BT, jnp.any(ends_BT, 1) & ~open_B


@dataclasses.dataclass(frozen=True)
class EosBlock(Forgetful):
    """Ends a row with the block that holds an eos, whatever follows it (dInfer, LLaDA2, SGLang).

    dInfer searches the block's columns, prompt columns included (`block_only`), and with `fill`
    (its early_stop) writes eos into every later column; the others search all generated columns.
    """

    eos_id: int
    block_only: bool = False
    fill: bool = False

    def judge(self, view: StopView) -> tuple[jax.Array, jax.Array]:
        columns_T = jnp.arange(view.block_BT.shape[1])
        last_B1 = jnp.max(jnp.where(view.block_BT, columns_T, -1), 1)[:, None]
        upto_BT = columns_T <= last_B1
        where_BT = view.block_BT if self.block_only else view.generated_BT & upto_BT
        done_B = jnp.any(where_BT & (view.tokens_BT == self.eos_id), 1) & view.closing
        later_BT = view.generated_BT & ~upto_BT & done_B[:, None] & self.fill
        return jnp.where(later_BT, self.eos_id, view.tokens_BT), done_B


@dataclasses.dataclass(frozen=True)
class EosReturn(Forgetful):
    """Ends a row when a step wrote an eos and all before it is filled: LLaDA2.0's eos_early_stop.

    Quirks, kept: the first eos of the whole canvas counts, also one in the prompt; where a later
    step fills the last mask before it, the row ends only with the block; and as without the flag, a
    row ends with the block that holds an eos.
    """

    eos_id: int

    def judge(self, view: StopView) -> tuple[jax.Array, jax.Array]:
        ends_BT = view.tokens_BT == self.eos_id
        wrote_B = jnp.any(ends_BT & view.written_BT, 1)
        done_B = wrote_B & (first(ends_BT) < first(view.open_BT))
        _, block_B = EosBlock(self.eos_id).judge(view)
        return view.tokens_BT, done_B | block_B


@dataclasses.dataclass(frozen=True)
class EosAnywhere(Forgetful):
    """Ends a row after the step that leaves an eos anywhere in it, prompt included (apd).

    Open columns stay open.
    """

    eos_id: int

    def judge(self, view: StopView) -> tuple[jax.Array, jax.Array]:
        ends_BT = _before_padding(view) & (view.tokens_BT == self.eos_id)
        return view.tokens_BT, jnp.any(ends_BT, 1)


def _before_padding(view: StopView) -> jax.Array:
    """Returns the columns of the prompt and the completion: padding may hold eos, too."""
    behind_BT = jnp.flip(view.generated_BT, axis=1)
    return jnp.flip(jnp.cumsum(behind_BT, axis=1) > 0, axis=1)
