"""jdllm: diffusion language models in JAX."""

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jdllm.decode import DecodeConfig
    from jdllm.llm import LLM, Completion
    from jdllm.model.config import ModelConfig

if os.path.basename("".join(sys.argv[:1])) in ("-m", "jdllm"):  # a command is being started
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until cli.run, Ctrl-C shows no traceback

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "DecodeConfig", "ModelConfig"]

_HOMES = {
    "LLM": "jdllm.llm",
    "Completion": "jdllm.llm",
    "DecodeConfig": "jdllm.decode",
    "ModelConfig": "jdllm.model.config",
}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, so that `--help` does not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jdllm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
