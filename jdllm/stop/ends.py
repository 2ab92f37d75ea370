"""Rules that look for ids which end a text."""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.stop.rule import Forgetful, Look, after, first


@dataclasses.dataclass(frozen=True)
class EosStop(Forgetful):
    """A row ends once its first generated end id has no open column before it; eos fills the rest.

    The text up to that id can change no more, so stopping here never changes a completion. Where
    tokens may be edited it waits for the end of the block.
    """

    eos_id: int
    end_ids: tuple[int, ...]
    """Ids that end a text: eos and the end of a turn."""
    after_block: bool = False

    def judge(self, look: Look) -> tuple[jax.Array, jax.Array]:
        ends_BT = look.generated_BT & ~look.open_BT
        ends_BT &= jnp.isin(look.tokens_BT, jnp.array(self.end_ids))
        done_B = jnp.any(ends_BT, 1) & (first(ends_BT) < first(look.open_BT))
        done_B &= look.closing or not self.after_block
        after_BT = after(ends_BT) & look.generated_BT & done_B[:, None]
        return jnp.where(after_BT, self.eos_id, look.tokens_BT), done_B


@dataclasses.dataclass(frozen=True)
class EosFill(Forgetful):
    """dInfer's early_stop for Fast-dLLM: after a step everything behind the first eos becomes eos.

    Quirks, kept: the eos may stand in the prompt, whose own tokens behind it go as well; tokens and
    masks behind it are overwritten even where masks are left before it; the row ends with the
    block; nothing is filled after the full pass that opens a block.
    """

    eos_id: int

    def judge(self, look: Look) -> tuple[jax.Array, jax.Array]:
        inside_BT = _before_padding(look)
        ends_BT = inside_BT & (look.tokens_BT == self.eos_id)
        behind_BT = after(ends_BT) & inside_BT & (not (look.opening or look.closing))
        filled_BT = jnp.where(behind_BT, self.eos_id, look.tokens_BT)
        open_B = jnp.any(look.block_BT & look.open_BT & ~behind_BT, 1)
        return filled_BT, jnp.any(ends_BT, 1) & ~open_B


@dataclasses.dataclass(frozen=True)
class EosBlock(Forgetful):
    """A row ends with the block that holds an eos (dInfer, LLaDA2, SGLang), whatever follows it.

    dInfer looks at the block's columns, the prompt's tail among them (`block_only`), and with
    `fill` (its early_stop) turns every later column into eos; the others look at all generated
    columns.
    """

    eos_id: int
    block_only: bool = False
    fill: bool = False

    def judge(self, look: Look) -> tuple[jax.Array, jax.Array]:
        columns_T = jnp.arange(look.block_BT.shape[1])
        last_B1 = jnp.max(jnp.where(look.block_BT, columns_T, -1), 1)[:, None]
        upto_BT = columns_T <= last_B1
        where_BT = look.block_BT if self.block_only else look.generated_BT & upto_BT
        done_B = jnp.any(where_BT & (look.tokens_BT == self.eos_id), 1) & look.closing
        later_BT = look.generated_BT & ~upto_BT & done_B[:, None] & self.fill
        return jnp.where(later_BT, self.eos_id, look.tokens_BT), done_B


@dataclasses.dataclass(frozen=True)
class EosReturn(Forgetful):
    """LLaDA2.0's eos_early_stop: a step that wrote an eos ends the row if all before it is filled.

    Quirks, kept: the first eos of the whole canvas counts, the prompt's too; a mask before it that
    is filled by a later step does not end the row until the block ends; and as without the flag, a
    row ends with the block that holds an eos.
    """

    eos_id: int

    def judge(self, look: Look) -> tuple[jax.Array, jax.Array]:
        ends_BT = look.tokens_BT == self.eos_id
        wrote_B = jnp.any(ends_BT & look.written_BT, 1)
        done_B = wrote_B & (first(ends_BT) < first(look.open_BT))
        _, block_B = EosBlock(self.eos_id).judge(look)
        return look.tokens_BT, done_B | block_B


@dataclasses.dataclass(frozen=True)
class EosAnywhere(Forgetful):
    """A row ends after the step that leaves an eos anywhere in it, prompt included (apd).

    What is open stays open.
    """

    eos_id: int

    def judge(self, look: Look) -> tuple[jax.Array, jax.Array]:
        ends_BT = _before_padding(look) & (look.tokens_BT == self.eos_id)
        return look.tokens_BT, jnp.any(ends_BT, 1)


def _before_padding(look: Look) -> jax.Array:
    """Columns of the prompt and behind it; what fills a row up may be eos too."""
    behind_BT = jnp.flip(look.generated_BT, axis=1)
    return jnp.flip(jnp.cumsum(behind_BT, axis=1) > 0, axis=1)
