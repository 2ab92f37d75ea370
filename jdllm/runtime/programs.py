"""How programs with loops are compiled, and those that are kept, by key.

They are so few that a process never runs out of memory maps. A program for a CPU takes hundreds of
the 65,530 that Linux gives a process by default; where none is left, the compiler ends the process.
"""

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jdllm.runtime.progress import doing

GRAPHS = "xla_gpu_enable_command_buffer"
BY_DEFAULT = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"  # XLA's


def loop_options(flags: str) -> dict[str, str]:
    """Compiler options with which a GPU runs loops and branches by itself, within a CUDA graph.

    Without them it waits at every turn, while the host reads whether there is another one. Other
    devices do not mind. Whoever says something else in XLA's `flags` is heard.
    """
    return {} if GRAPHS in flags else {GRAPHS: f"{BY_DEFAULT},WHILE,CONDITIONAL"}


LOOPS = loop_options(os.environ.get("XLA_FLAGS", ""))
MOST = 64  # programs kept: more than a task of many prompt lengths needs at once
MAPS, LIMIT = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
SHARE = 0.5  # of the limit; what is compiled next may take a tenth at once


def is_crowded() -> bool:
    """Whether this process has used more than SHARE of its memory maps; False off Linux."""
    try:
        return MAPS.read_bytes().count(b"\n") > SHARE * int(LIMIT.read_text())
    except (OSError, ValueError):
        return False


class Programs:
    """Those used last, at most `most` of them; none stays where memory maps run out."""

    def __init__(self, most: int = MOST):
        self.most = most
        self._kept: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Any, make: Callable[[], Any]) -> tuple[Any, float]:
        """The program kept under `key`, and the seconds spent if it is made now."""
        if key in self._kept:
            self._kept[key] = self._kept.pop(key)  # the newest stand last
            return self._kept[key], 0.0
        if is_crowded():
            self._drop(len(self._kept))
        elif len(self._kept) >= self.most:
            self._drop(self.most // 2)
        start = time.perf_counter()
        with doing("compiling"):
            self._kept[key] = make()
        return self._kept[key], time.perf_counter() - start

    def _drop(self, count: int) -> None:
        """Drops the oldest `count`, which JAX keeps, too, until it is told."""
        for key in list(self._kept)[:count]:
            del self._kept[key]
        jax.clear_caches()
        gc.collect()
