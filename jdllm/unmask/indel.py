"""SGLang's JointThresholdInDel unmasks, replaces, deletes and inserts tokens of a block."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.unmask.rule import Carry, Decision
from jdllm.unmask.view import View, rank, without


class Memory(NamedTuple):
    """The memory of a block, with room for S calls."""

    original_BN: jax.Array
    """Masks that the block began with, wherever edits have moved them; others were inserted."""
    passes_B: jax.Array
    """Calls that began without an original mask."""
    calls_B: jax.Array
    finished_B: jax.Array
    """Rows whose block will not change any more."""
    closed_B: jax.Array
    """Those of them whose last call has also seen the final tokens."""
    blocks_BSN: jax.Array
    """The block before every call, -1 where there was none."""
    written_BSN: jax.Array
    """The tokens that every call wrote, -1 elsewhere."""


@dataclasses.dataclass(frozen=True)
class InDel:
    """A rule of its own, whose parts depend on each other too much for a composition.

    Two ids are commands, not text: `delete_id` removes its position, `split_id` inserts a mask
    before the token that stood there; the block keeps its length. While original masks are left,
    every call fills one more position than there are inserted masks (or all above `threshold`).
    Then follow `passes` more calls. The last call fills every mask, and writes no special id. A
    block that returns to an earlier state changes its least certain token to one not tried there.
    """

    threshold: float
    edit_threshold: float
    passes: int
    mask_id: int
    delete_id: int
    split_id: int

    @property
    def special(self) -> None:
        """Returns None: this rule reads logits."""
        return None

    @property
    def sampled(self) -> None:
        """Returns None, as it reads logits."""
        return None

    def start(self, rows: int, columns: int, calls: int) -> Carry:
        zero_B, no_B = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
        none_BSN = jnp.full((rows, calls, columns), -1, jnp.int32)
        original_BN = jnp.ones((rows, columns), bool)
        return {"indel": Memory(original_BN, zero_B, zero_B, no_B, no_B, none_BSN, none_BSN)}

    def wants(self, open_B: jax.Array, carry: Carry) -> jax.Array:
        return ~carry["indel"].closed_B

    def __call__(self, view: View, carry: Carry) -> tuple[Decision, Carry]:
        old: Memory = carry["indel"]
        logits = view.logits_BNV.astype(jnp.float32)
        original_BN = old.original_BN & view.open_BN
        left_B = jnp.sum(original_BN, axis=1)
        calls_B, passes_B = old.calls_B + 1, old.passes_B + (left_B == 0)
        over_B = calls_B > view.ids_BN.shape[1] + self.passes
        final_B = over_B | (passes_B >= self.passes if self.passes else left_B == 0)
        plain_BN, p_BN = _best(logits, ())
        real_BN, real_p_BN = _best(logits, (self.mask_id,))
        instead_BN = original_BN & (plain_BN == self.mask_id) & ~final_B[:, None]
        ids_BN = jnp.where(instead_BN, real_BN, plain_BN)
        p_BN = jnp.where(instead_BN, real_p_BN, p_BN)
        fill_BN, final_B = self._unmasked(view, original_BN, p_BN, final_B)
        edit_BN = view.settled_BN & (p_BN > self.edit_threshold) & (ids_BN != view.ids_BN)
        chosen_BN = (fill_BN | edit_BN) & ~old.finished_B[:, None]
        none_B = ~jnp.any(chosen_BN, axis=1)
        specials = (self.mask_id, self.delete_id, self.split_id)
        banned_BN = jnp.isin(ids_BN, jnp.array(specials)) & final_B[:, None]
        ids_BN = jnp.where(banned_BN, _best(logits, specials)[0], ids_BN)
        ids_BN = self._untried(view, logits, ids_BN, p_BN, chosen_BN & ~final_B[:, None],
                               original_BN, old)  # fmt: skip
        new_BN = jnp.where(chosen_BN, ids_BN, view.ids_BN)
        given_BN = ~view.open_BN & ~view.settled_BN
        rebuilt_BN, flags_BN = self._rebuilt(new_BN, view.ids_BN, original_BN, given_BN)
        changed_B = jnp.any(rebuilt_BN != view.ids_BN, axis=1)
        finished_B = old.finished_B | none_B | final_B
        at_BS1 = (jnp.arange(old.blocks_BSN.shape[1]) == old.calls_B[:, None])[..., None]
        written_BN = jnp.where(chosen_BN, ids_BN, -1)
        memory = Memory(
            original_BN=flags_BN,
            passes_B=passes_B,
            calls_B=calls_B,
            finished_B=finished_B,
            closed_B=finished_B & ~changed_B,
            blocks_BSN=jnp.where(at_BS1, view.ids_BN[:, None], old.blocks_BSN),
            written_BSN=jnp.where(at_BS1, written_BN[:, None], old.written_BSN),
        )
        open_BN = ~given_BN & (rebuilt_BN == self.mask_id)
        return Decision(rebuilt_BN, open_BN, ids_BN, p_BN), carry | {"indel": memory}

    def _unmasked(
        self, view: View, original_BN: jax.Array, p_BN: jax.Array, final_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the masks that this call fills, and whether it is the last to change anything."""
        masked_BN = view.open_BN
        wanted_B = jnp.sum(masked_BN & ~original_BN, axis=1) + 1
        sure_BN = masked_BN & (p_BN > self.threshold)
        best_BN = masked_BN & (rank(p_BN, masked_BN) < wanted_B[:, None])
        enough_B = jnp.sum(sure_BN, axis=1) >= wanted_B
        some_BN = jnp.where(enough_B[:, None], sure_BN, best_BN)
        fill_BN = jnp.where(jnp.any(original_BN, axis=1)[:, None], some_BN, masked_BN)
        if not self.passes:
            final_B |= ~jnp.any(original_BN & ~fill_BN, axis=1)
        return jnp.where(final_B[:, None], masked_BN, fill_BN), final_B

    def _untried(
        self,
        view: View,
        logits: jax.Array,
        ids_BN: jax.Array,
        p_BN: jax.Array,
        chosen_BN: jax.Array,
        original_BN: jax.Array,
        old: Memory,
    ) -> jax.Array:
        """Returns the tokens to write, one of them replaced where the block was seen before."""
        seen_B = jnp.any(jnp.all(old.blocks_BSN == view.ids_BN[:, None], axis=2), axis=1)
        moves_BN = chosen_BN & (ids_BN != view.ids_BN)
        weakest_BN = moves_BN & (rank(-p_BN, moves_BN) == 0) & seen_B[:, None]
        V = logits.shape[-1]
        tried_BNS = jnp.where(old.written_BSN < 0, V, old.written_BSN).swapaxes(1, 2)
        fresh = jax.vmap(jax.vmap(lambda row, ids: row.at[ids].set(-jnp.inf, mode="drop")))(
            logits, tried_BNS
        )
        no_mask = original_BN[..., None] & (jnp.arange(V) == self.mask_id)
        return jnp.where(weakest_BN, _best(jnp.where(no_mask, -jnp.inf, fresh), ())[0], ids_BN)

    def _rebuilt(
        self, new_BN: jax.Array, old_BN: jax.Array, original_BN: jax.Array, given_BN: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the block after deletions and insertions, and which masks are original."""
        N = new_BN.shape[1]
        deleted_BN = (new_BN == self.delete_id) & ~given_BN
        split_BN = (new_BN == self.split_id) & ~given_BN
        room_BN = jnp.where(deleted_BN, 0, jnp.where(split_BN, 2, 1))
        last_BN = jnp.cumsum(room_BN, axis=1) - 1
        target_BN = jnp.where(deleted_BN | (last_BN >= N), N, last_BN)
        kept_BN = jnp.where(split_BN, old_BN, new_BN)
        flag_BN = original_BN & (kept_BN == self.mask_id)

        def place(values_N: jax.Array, target_N: jax.Array, empty: int) -> jax.Array:
            return jnp.full(N, empty).at[target_N].set(values_N, mode="drop")

        rebuilt_BN = jax.vmap(lambda v, t: place(v, t, self.mask_id))(kept_BN, target_BN)
        return rebuilt_BN, jax.vmap(lambda v, t: place(v, t, False))(flag_BN, target_BN)


def _best(logits: jax.Array, banned: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the most likely ids that are not banned, and their probabilities among all ids."""
    ids_BN = jnp.argmax(without(logits, banned), axis=-1).astype(jnp.int32)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return ids_BN, jnp.exp(jnp.take_along_axis(log_p, ids_BN[..., None], axis=-1))[..., 0]
