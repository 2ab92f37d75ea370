"""Decoding: what a user may set, what that means for a model, and the one loop that does it."""

from jdllm.decode.blocks import compile_blocks
from jdllm.decode.config import DecodeConfig
from jdllm.decode.loop import decode
from jdllm.decode.prefixes import read_prefix
from jdllm.decode.setup import Setup, make_rule, make_setup
from jdllm.decode.state import DecodeState, Prefixes, Request, Trace

__all__ = [
    "DecodeConfig",
    "DecodeState",
    "Prefixes",
    "Request",
    "Setup",
    "Trace",
    "compile_blocks",
    "decode",
    "make_rule",
    "make_setup",
    "read_prefix",
]
