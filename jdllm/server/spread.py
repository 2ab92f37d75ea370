"""Replicas behind one address: a Ray Serve deployment whose every process is a whole server.

python -m jdllm.serve executor=ray replicas=2
serve run jdllm.server.spread:app model=bundled replicas=2
"""

import dataclasses
import os
import threading
from typing import Any

from jdllm.cluster.connect import connect, identity, room, share
from jdllm.runtime import cli, processes, signals
from jdllm.server.app import make_app
from jdllm.server.config import ServeConfig
from jdllm.server.run import listen, prepare
from jdllm.server.service import Service

NAME = "jdllm"
_served: list[Service] = []  # of this process, which Ray has started as a replica


class Replica:
    """One process with a model, an engine and the whole HTTP interface."""

    def __init__(self, wanted: str):
        """RuntimeError where this process has another version than the one that plans."""
        if identity() != wanted:
            raise RuntimeError(f"a node has {identity()}, not {wanted}; install the same there")

    async def check_health(self) -> None:
        """RuntimeError once the engine has ended, so that Ray starts another replica."""
        if _served and not _served[-1].closing and not _served[-1].engines.alive:
            raise RuntimeError("the engine of this replica has ended")


def application(config: ServeConfig) -> Any:
    """The deployment that `config` describes, for serve.run."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    key = config.api_key or os.environ.get("JDLLM_API_KEY", "")
    config = dataclasses.replace(config, api_key=key)  # a replica has an environment of its own
    own = share(config.mesh, config.gpus)
    slots = config.engine.slots + config.max_queue

    def build() -> Any:
        _served.append(prepare(config))
        return make_app(_served[-1])

    deployed = serve.deployment(
        serve.ingress(build)(Replica),
        name=NAME,
        num_replicas=config.replicas or max(room(own), 1),
        ray_actor_options=own,
        max_ongoing_requests=slots,
        graceful_shutdown_timeout_s=config.drain,
        health_check_period_s=5,
    )
    return deployed.bind(identity())


def words_of(settings: dict[str, Any]) -> list[str]:
    """The words of a command line that say what a dict does."""
    return ["executor=ray", *(f"{name}={value}" for name, value in settings.items())]


def app(settings: dict[str, Any]) -> Any:
    """The same from a dict, as `serve run` and a RayService pass it."""
    return application(cli.parse(ServeConfig, words_of(settings), prog="jdllm.serve"))


def serve(config: ServeConfig) -> None:
    """Serves until a signal asks to end; what has begun is finished.

    OSError, in one sentence, where there is no cluster, the port is taken, or no replica starts.
    """
    listener = listen(config)  # which finds out whether the port is free, and which one 0 is
    host, port = listener.getsockname()[:2]
    listener.close()
    connect()
    from ray import serve as ray_serve  # pyright: ignore[reportMissingImports]

    asked = threading.Event()
    with signals.handled(lambda *_: asked.set()):
        ray_serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
        try:
            deployed = application(config)
            ray_serve.run(deployed, name=NAME, route_prefix="/")
            processes.say(f"{config.title} is served at http://{host}:{port}")
            asked.wait()
        except RuntimeError as error:
            raise ConnectionError(f"no replica has started: {error}") from None
        finally:
            ray_serve.shutdown()
