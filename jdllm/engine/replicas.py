"""Replicas: an engine for each part of the mesh that holds a whole model, and one face for all."""

import dataclasses
import threading

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jdllm.engine.config import EngineConfig
from jdllm.engine.engine import Engine, check
from jdllm.engine.job import Job
from jdllm.model.model import Model


def replicas(model: Model) -> list[Model]:
    """The model once for each row of its mesh's data axis, on that row's devices: nothing is
    copied, as every row holds all weights."""
    mesh = model.mesh
    if mesh is None or mesh.shape["data"] == 1:
        return [model]

    def on(devices: np.ndarray) -> Model:
        part = Mesh(devices[None], mesh.axis_names, axis_types=mesh.axis_types)

        def place(x: jax.Array) -> jax.Array:
            held = {shard.device: shard.data for shard in x.addressable_shards}
            sharding = NamedSharding(part, x.sharding.spec)  # pyright: ignore[reportAttributeAccessIssue]
            pieces = [held[device] for device in devices]
            return jax.make_array_from_single_device_arrays(x.shape, sharding, pieces)

        return dataclasses.replace(model, params=jax.tree.map(place, model.params), mesh=part)

    return [on(row) for row in mesh.devices]


class Engines:
    """Engines side by side; a job goes to the one with the fewest jobs. Used as one engine is."""

    def __init__(self, model: Model, config: EngineConfig | None = None):
        self.engines = [Engine(part, config) for part in replicas(model)]
        self._threads: list[threading.Thread] = []

    @property
    def config(self) -> EngineConfig:
        """What every engine has."""
        return self.engines[0].config

    @property
    def busy(self) -> bool:
        """Whether any of them has something to do."""
        return any(engine.busy for engine in self.engines)

    @property
    def calls(self) -> int:
        """Model calls so far."""
        return sum(engine.calls for engine in self.engines)

    @property
    def compile_seconds(self) -> float:
        """Spent on compiling so far."""
        return sum(engine.compile_seconds for engine in self.engines)

    @property
    def load(self) -> int:
        """Jobs that wait or run."""
        return sum(engine.load for engine in self.engines)

    @property
    def alive(self) -> bool:
        """Whether all that were started still work."""
        return all(thread.is_alive() for thread in self._threads)

    def check(self, job: Job) -> None:
        """ValueError, with its reason, for a job that could never run."""
        check(job, self.config)

    def submit(self, job: Job) -> None:
        """A job from any thread. ValueError, at once, where it could never run."""
        min(self.engines, key=lambda engine: engine.load).submit(job)

    def step(self) -> None:
        """One dispatch of every engine that has something to do, on its own devices."""
        for engine in self.engines:
            if engine.busy:
                engine.step()

    def drain(self) -> None:
        """Works until nothing is left to do."""
        while self.busy:
            self.step()

    def start(self) -> None:
        """Each serves in a thread of its own, until `stop`."""
        self._threads = [threading.Thread(target=e.serve, daemon=True) for e in self.engines]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """What has begun is ended, then the threads are."""
        for engine in self.engines:
            engine.stop()
        for thread in self._threads:
            thread.join()
