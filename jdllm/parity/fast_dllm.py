"""Fast-dLLM's loops for LLaDA and for Dream."""

import dataclasses

import jax.numpy as jnp

from jdllm.decode import DecodeConfig, Setup
from jdllm.model.config import ModelConfig
from jdllm.parity.calls import Around, AtLeast
from jdllm.parity.dream import averaged
from jdllm.unmask import Carry, Decision, View


def copy(setup: Setup, config: DecodeConfig, model: ModelConfig) -> Setup:
    """Returns the setup in which a cached pass always follows the full pass that opens a block."""
    if not setup.plan.refreshes:
        return setup
    return dataclasses.replace(
        setup, unmask=AtLeast(setup.unmask, 2), extra_steps=setup.extra_steps + 1
    )


@dataclasses.dataclass(frozen=True)
class FirstColumn(Around):
    """The rule `inner`, but the full pass that opens a block fills only its first column."""

    def __call__(self, view: View, carry: Carry) -> tuple[Decision, Carry]:
        if not view.full:
            return self.inner(view, carry)
        others_BN = view.open_BN & (jnp.arange(view.open_BN.shape[1]) > 0)
        first = dataclasses.replace(
            view, open_BN=view.open_BN & ~others_BN, quota_B=jnp.ones_like(view.quota_B)
        )
        decision, carry = self.inner(first, carry)
        return decision._replace(open_BN=decision.open_BN | others_BN), carry


def copy_for_dream(setup: Setup, config: DecodeConfig, model: ModelConfig) -> Setup:
    """Returns the setup of the block sampler for Dream, whose window begins at its block."""
    plan = dataclasses.replace(setup.plan, before=config.vicinity.before)
    rule = FirstColumn(setup.unmask) if plan.refreshes else setup.unmask
    return dataclasses.replace(setup, unmask=rule, schedule=averaged(setup.schedule), plan=plan)
