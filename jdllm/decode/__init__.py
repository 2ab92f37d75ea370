"""Decoding: what a user may set, what that means for a model, and the one loop that does it."""

from jdllm.decode.config import DecodeConfig
from jdllm.decode.groups import (
    Credit,
    Dinfer,
    Edit,
    Exit,
    Gaussian,
    Klass,
    Smooth,
    Verify,
    Vicinity,
)
from jdllm.decode.loop import decode
from jdllm.decode.prefixes import read_prefix
from jdllm.decode.rows import Prefixes, Request, Rows
from jdllm.decode.setup import Setup, make_setup
from jdllm.decode.trace import Trace
from jdllm.decode.watch import compile_blocks
from jdllm.decode.work import State

__all__ = [
    "Credit",
    "DecodeConfig",
    "Dinfer",
    "Edit",
    "Exit",
    "Gaussian",
    "Klass",
    "Prefixes",
    "Request",
    "Rows",
    "Setup",
    "Smooth",
    "State",
    "Trace",
    "Verify",
    "Vicinity",
    "compile_blocks",
    "decode",
    "make_setup",
    "read_prefix",
]
