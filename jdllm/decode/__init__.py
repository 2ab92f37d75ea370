"""Decoding: what a user may set, what that means for a model, and the one loop that does it."""

from jdllm.decode.config import DecodeConfig
from jdllm.decode.loop import decode
from jdllm.decode.prefixes import read_prefix
from jdllm.decode.rows import DecodeState, Prefixes, Request, Trace
from jdllm.decode.setup import Setup, make_rule, make_setup
from jdllm.decode.watch import compile_blocks

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
