"""apd (adaptive parallel decoding): its temperature counts twice, and not for the verifier."""

import dataclasses

from jdllm.decode import DecodeConfig, Setup
from jdllm.model.config import ModelConfig
from jdllm.unmask import Gumbel, Unmasker
from jdllm.unmask.speculate import Speculate


def copy(setup: Setup, config: DecodeConfig, model: ModelConfig) -> Setup:
    """Returns the setup of apd's loop: the temperature divides logits and scales the noise."""
    rule = setup.unmask
    if isinstance(rule, Speculate):
        rule = dataclasses.replace(rule, noise=config.temperature, greedy_target=True)
    elif isinstance(rule, Unmasker) and isinstance(rule.candidate, Gumbel):
        candidate = dataclasses.replace(rule.candidate, temperature=config.temperature)
        rule = dataclasses.replace(rule, candidate=candidate)
    return dataclasses.replace(setup, unmask=rule)
