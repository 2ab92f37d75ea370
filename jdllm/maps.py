"""Maps of a loaded adapter: its B, its gradient dynamics on disk, and what exits make of them."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdllm.decode import Exit
from jdllm.decode.aims import alignment, chosen, make_aims, make_maps
from jdllm.model.model import Model
from jdllm.runtime import processes, sharding
from jdllm.stop import Aim
from jdllm.store.dynamics import read_map


class Maps:
    """The maps of a model's adapter, whose folder holds its dynamics; made when asked for."""

    def __init__(self, model: Model, folder: Path | None = None):
        self.model, self.folder = model, folder
        self._aims: dict[Exit, dict[str, Aim]] = {}
        self._digests: dict[Exit, str] = {}

    @functools.cached_property
    def factors(self) -> dict[str, np.ndarray]:
        """B by module, in PEFT's layout [outputs, R]; ValueError where there is no adapter.

        Modules inside kernels have no probes and are left out.
        """
        if self.model.adapter is None:
            raise ValueError(
                "exit.mode=code and paper read the activations of a LoRA adapter, and this model "
                "has none; name one: adapter=FOLDER"
            )
        own = self.model.adapter.factors
        seen = [n for n in own if ".experts." not in n and ".shared." not in n]
        found: dict[str, Any] = processes.gather({name: own[name].b for name in seen})
        return {name: b.reshape(len(b), -1).T for name, b in found.items()}

    def of(self, settings: Exit) -> dict[str, np.ndarray]:
        """What exit.map names, by module; ValueError where it does not fit the adapter."""
        return make_maps(settings, self.factors, self._window)

    def aims(self, settings: Exit) -> dict[str, Aim] | None:
        """What activations are compared with, on every device; None where nothing is."""
        if not settings.aims:
            return None
        if settings not in self._aims:
            whole = sharding.replicated(self.model.mesh)
            self._aims[settings] = jax.tree.map(
                lambda x: processes.device_put(np.asarray(x), whole),
                make_aims(settings, self.factors, self._window),
            )
        return self._aims[settings]

    def digest(self, settings: Exit) -> str:
        """What tells these maps from any others."""
        if settings not in self._digests:
            digest = hashlib.sha256()
            for name, x in sorted(self.of(settings).items()):
                digest.update(name.encode() + np.asarray(x, np.float32).tobytes())
            self._digests[settings] = digest.hexdigest()[:16]
        return self._digests[settings]

    def alignment(self, settings: Exit) -> dict[str, float]:
        """The cosine of map and B of every module that is read."""
        names, found = chosen(settings, list(self.factors)), self.of(settings)
        return alignment(found, {name: self.factors[name] for name in names})

    def _window(self, window: str) -> dict[str, np.ndarray]:
        if self.folder is None:
            raise ValueError("gradient dynamics lie beside an adapter; name it: adapter=FOLDER")
        return read_map(self.folder, window)
