"""Rules around a rule: what the copies of references put around the one that a config describes."""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.model.head import Special
from jdllm.unmask import Carry, Decision, Rule, Sampled, View


@dataclasses.dataclass(frozen=True)
class Around:
    """The rule `inner` in all that a subclass does not change."""

    inner: Rule

    @property
    def special(self) -> Special | None:
        return self.inner.special

    @property
    def sampled(self) -> Sampled | None:
        return self.inner.sampled

    def start(self, rows: int, columns: int, calls: int) -> Carry:
        return self.inner.start(rows, columns, calls)

    def wants(self, open_B: jax.Array, carry: Carry) -> jax.Array:
        return self.inner.wants(open_B, carry)

    def __call__(self, view: View, carry: Carry) -> tuple[Decision, Carry]:
        return self.inner(view, carry)


@dataclasses.dataclass(frozen=True)
class AtLeast(Around):
    """The rule `inner`, but every block gets at least `calls` calls, open or not."""

    calls: int

    def start(self, rows: int, columns: int, calls: int) -> Carry:
        return self.inner.start(rows, columns, calls) | {"calls": jnp.zeros(rows, jnp.int32)}

    def wants(self, open_B: jax.Array, carry: Carry) -> jax.Array:
        return self.inner.wants(open_B, carry) | (carry["calls"] < self.calls)

    def __call__(self, view: View, carry: Carry) -> tuple[Decision, Carry]:
        decision, after = self.inner(view, carry)
        return decision, after | {"calls": carry["calls"] + 1}


def every_step(rule: Rule, steps: int | None) -> Rule:
    """Returns the rule that makes all `steps` of a block, even when nothing is left to do."""
    return AtLeast(rule, steps) if steps else rule
