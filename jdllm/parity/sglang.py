"""SGLang's block runners make one more call per block, which sees its final tokens."""

import dataclasses

import jax

from jdllm.decode import DecodeConfig, Setup
from jdllm.model.config import ModelConfig
from jdllm.unmask import Edit, Unmasker
from jdllm.unmask.edit import Edits


@dataclasses.dataclass(frozen=True)
class LateEdit(Edit):
    """Editing that also makes the call whose result is dropped, so that the cache is up to date."""

    def wants(self, open_B: jax.Array, state: Edits) -> jax.Array:
        return ~state.finished_B


def copy(setup: Setup, config: DecodeConfig, model: ModelConfig) -> Setup:
    """Returns the setup of SGLang's loop; LowConfidence edits nothing but ends the same way."""
    rule = setup.unmask
    if isinstance(rule, Unmasker):
        edit = rule.edit or Edit(1.0, config.edit.passes, config.edit.penalty)
        rule = dataclasses.replace(rule, edit=LateEdit(**vars(edit)))
    return dataclasses.replace(setup, unmask=rule, extra_steps=config.edit.passes + 2)
