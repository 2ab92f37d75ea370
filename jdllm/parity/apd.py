"""Adaptive parallel decoding: the verifier's side forgets the temperature."""

import dataclasses

from jdllm.decode import DecodeConfig, Setup
from jdllm.model.config import ModelConfig
from jdllm.unmask.speculate import Speculate


def copy(setup: Setup, config: DecodeConfig, model: ModelConfig) -> Setup:
    """The setup as apd's loop has it."""
    rule = setup.unmask
    if isinstance(rule, Speculate):
        rule = dataclasses.replace(rule, greedy_target=True)
    return dataclasses.replace(setup, unmask=rule)
