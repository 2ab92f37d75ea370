"""The protocol of an unmasking rule, and Unmasker, the rule that is composed of parts."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jdllm.model.head import Special
from jdllm.unmask.candidate import Argmax, Candidate, Gumbel, Warp
from jdllm.unmask.confidence import Confidence
from jdllm.unmask.credit import Credit
from jdllm.unmask.edit import Edit
from jdllm.unmask.klass import Klass
from jdllm.unmask.selection import Selection
from jdllm.unmask.view import View, without

Carry = dict[str, Any]
"""The memory of a rule between the calls of a block, by the name of the part."""


class Decision(NamedTuple):
    """The result of a rule for one view."""

    ids_BN: jax.Array
    """The new tokens of the columns."""
    open_BN: jax.Array
    """Columns that are still to be filled."""
    candidate_BN: jax.Array
    """The token that each column would take."""
    value_BN: jax.Array
    """The confidence in that token, as thresholds are compared with it."""


class Sampled(NamedTuple):
    """What makes the best token a sample: Gumbel noise on the logits that tokens are ranked by."""

    scale: float | jax.Array
    """What it is multiplied with; of all rows or [B, 1, 1]."""
    heat: float | jax.Array
    """What logits are divided by before; of all rows or [B, 1, 1]."""


class Rule(Protocol):
    """What the decode loop needs of a rule. Rows never depend on each other."""

    @property
    def special(self) -> Special | None:
        """Returns the ids to treat apart, for a rule that needs only the best tokens.

        None means that the rule reads logits.
        """
        ...

    @property
    def sampled(self) -> Sampled | None:
        """Returns what makes the best tokens samples; None for those of greedy rules."""
        ...

    def start(self, rows: int, columns: int, calls: int) -> Carry:
        """Returns the memory of a new block of at most `calls` calls."""
        ...

    def wants(self, open_B: jax.Array, carry: Carry) -> jax.Array:
        """Returns the rows whose block needs another call, given its number of open columns [B]."""
        ...

    def __call__(self, view: View, carry: Carry) -> tuple[Decision, Carry]:
        """Returns the decision for the columns in view, and the memory after this call."""
        ...


@dataclasses.dataclass(frozen=True)
class Unmasker:
    """A rule composed of parts: a candidate, a confidence, a selection, and optional ones."""

    candidate: Candidate
    confidence: Confidence
    selection: Selection
    forbidden: tuple[int, ...] = ()
    """Ids whose logits are -inf from the start (LLaDA's logits_eos_inf)."""
    credit: Credit | None = None
    warp: Warp | None = None
    edit: Edit | None = None
    klass: Klass | None = None

    @property
    def special(self) -> Special | None:
        if self.credit or self.klass or (self.edit and self.edit.penalty):
            return None
        if self.warp and (self.warp.filters or self.sampled is None):
            return None
        if not isinstance(self.candidate, Argmax | Gumbel) or self.confidence.reads_logits:
            return None
        suppressed = getattr(self.confidence, "suppressed", ())
        return Special(self.candidate.excluded, suppressed, self.forbidden)

    @property
    def sampled(self) -> Sampled | None:
        if not isinstance(self.candidate, Gumbel):
            return None
        return Sampled(self.candidate.temperature, self.warp.heat if self.warp else 1.0)

    def start(self, rows: int, columns: int, calls: int) -> Carry:
        carry: Carry = {}
        if self.credit:
            carry["credit"] = self.credit.start(rows, columns, calls)
        if self.edit:
            carry["edit"] = self.edit.start(rows)
        if self.klass:
            carry["klass"] = self.klass.start(rows, columns)
        return carry

    def wants(self, open_B: jax.Array, carry: Carry) -> jax.Array:
        return self.edit.wants(open_B, carry["edit"]) if self.edit else open_B > 0

    def __call__(self, view: View, carry: Carry) -> tuple[Decision, Carry]:
        carry, still_BN = dict(carry), None
        if view.best is not None:
            ids_BN = view.best.ids
            score_BN = self.confidence.of_best(view.best, view.draw)
        else:
            logits = without(view.logits_BNV.astype(jnp.float32), self.forbidden)
            if self.credit:
                logits, carry["credit"] = self.credit(logits, view.open_BN, carry["credit"])
            if self.edit:
                logits = self.edit.discourage(logits, view.ids_BN)
            if self.warp:
                logits = self.warp(logits)
            if self.klass:
                still_BN, carry["klass"] = self.klass(logits, carry["klass"])
            ids_BN = self.candidate(logits, view.draw)
            score_BN = self.confidence(logits, ids_BN, view.draw)
        value_BN = self.confidence.value(score_BN)
        sure_BN = value_BN if still_BN is None else jnp.where(still_BN, value_BN, -jnp.inf)
        chosen_BN = self.selection(score_BN, sure_BN, view)
        new_BN, open_BN = jnp.where(chosen_BN, ids_BN, view.ids_BN), view.open_BN & ~chosen_BN
        if self.edit:
            new_BN, carry["edit"] = self.edit(new_BN, ids_BN, value_BN, view, carry["edit"])
        return Decision(new_BN, open_BN, ids_BN, value_BN), carry
