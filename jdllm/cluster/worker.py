"""A worker: one process of the cluster with the model, which does what it is handed."""

import os
import platform
from typing import Any

import jax

from jdllm.cluster.connect import identity
from jdllm.kernels.choose import choices
from jdllm.llm import LLM, Batch
from jdllm.load import enable_compilation_cache
from jdllm.runtime.environment import environment, peak_bytes
from jdllm.score.scoring import Likelihood


class Worker:
    """An LLM behind calls whose arguments and results can be sent; crew.Crew starts it."""

    def __init__(self):
        self._llm: LLM | None = None

    def place(self) -> tuple[int, str]:
        """The number of the process, and its host."""
        return os.getpid(), platform.node()

    def load(self, wanted: str, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Loads the model; returns what tells it from others, or why this process may not work.

        `wanted` is the planner's `connect.identity`; `folder` is where its paths begin.
        """
        pid, host = self.place()
        if identity() != wanted:
            return {"refused": f"{host} has {identity()}, not {wanted}; install the same there"}
        if os.path.isdir(folder):
            os.chdir(folder)
        enable_compilation_cache()
        self._llm = LLM.load(**settings)
        return {"fingerprint": self._llm.fingerprint(), "pid": pid, "host": host}

    @property
    def llm(self) -> LLM:
        """The model, which is loaded first."""
        if self._llm is None:
            raise ValueError("a worker was asked to work before it had loaded its model")
        return self._llm

    def parts(self) -> dict[str, Any]:
        """What planning needs of the model: all but its weights."""
        llm = self.llm
        return {
            "config": llm.config,
            "tokenizer": llm.tokenizer,
            "defaults": llm.defaults,
            "shape": dict(llm.mesh.shape),
            "device": jax.devices()[0].device_kind,
            "verifier": llm.verifier_fingerprint(),
        }

    def stream(
        self, rows: list[list[int]], options: dict[str, Any], watched: bool
    ) -> tuple[list[Batch], list[tuple[int, Any]]]:
        """The batches of `LLM.stream`, and what it would have told `watch`."""
        seen: list[tuple[int, Any]] = []
        watch = (lambda i, record: seen.append((i, record))) if watched else None
        return list(self.llm.stream(rows, watch=watch, **options)), seen

    def loglikelihood(self, pairs: list[Any], config: Any, batch_size: int) -> list[Likelihood]:
        """The scores of `LLM.loglikelihood`."""
        return self.llm.loglikelihood(pairs, config, batch_size=batch_size)

    def maps(self, question: str, settings: Any) -> Any:
        """What the adapter's maps answer: `digest` or `alignment`."""
        return getattr(self.llm.maps, question)(settings)

    def surroundings(self) -> dict[str, Any]:
        """What the work is measured on."""
        return environment()

    def kernels(self) -> list[dict[str, Any]]:
        """The kernels that were chosen in this process."""
        return choices()

    def peak_bytes(self) -> int:
        """What the first device has held at most so far."""
        return peak_bytes()
