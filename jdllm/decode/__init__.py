"""Decoding: config.py is what a user may set, loop.py the one jitted loop."""

from jdllm.decode.config import DecodeConfig, Setup, make_setup, make_unmasker
from jdllm.decode.loop import DecodeState, Request, decode

__all__ = [
    "DecodeConfig",
    "DecodeState",
    "Request",
    "Setup",
    "decode",
    "make_setup",
    "make_unmasker",
]
