"""Parity: decoding that copies a reference's loop call by call.

That includes calls which change nothing and rows which depend on their batch. Each reference has a
file that exchanges parts of a Setup; `decode` itself knows none of them.
"""

from collections.abc import Callable

from jdllm import decode
from jdllm.decode import DecodeConfig, Setup
from jdllm.model.config import ModelConfig
from jdllm.parity import apd, dinfer, dream, edit, fast_dllm, llada, llada2, sglang

Copy = Callable[[Setup, DecodeConfig, ModelConfig], Setup]

COPIES: dict[str, Copy] = {
    "llada": llada.copy,
    "fast_dllm": fast_dllm.copy,
    "dinfer": dinfer.copy,
    "dream": dream.copy,
    "fast_dream": fast_dllm.copy_for_dream,
    "llada2": llada2.copy,
    "sglang": sglang.copy,
    "apd": apd.copy,
    "edit": edit.copy,
}


def make_setup(config: DecodeConfig, model: ModelConfig) -> Setup:
    """Returns the Setup of a resolved `config` for `model`, changed as its `parity` asks."""
    setup = decode.make_setup(config, model)
    copy = COPIES.get(config.parity)
    return copy(setup, config, model) if copy else setup
