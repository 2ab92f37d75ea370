"""Starts a server, and ends it in order."""

import socket

import uvicorn

from jdllm.load import enable_compilation_cache
from jdllm.runtime import processes, sharding
from jdllm.server.app import make_app
from jdllm.server.config import ServeConfig
from jdllm.server.service import Service


def serve(config: ServeConfig) -> None:
    """Loads the model and serves it until a signal asks to end.

    ValueError or OSError, in one sentence, where the model cannot be loaded or the port is taken.
    """
    listener = listen(config)  # now rather than after the weights
    enable_compilation_cache()
    llm = config.load_llm()
    service = Service(llm, config)
    processes.say(f"compiling for {sharding.describe(llm.mesh)}" if config.warm else "")
    service.start()
    host, port = listener.getsockname()[:2]
    processes.say(f"{config.title} is served at http://{host}:{port}")
    settings = uvicorn.Config(
        make_app(service),
        log_level="warning",
        timeout_graceful_shutdown=int(config.drain) or 1,
        server_header=False,
    )
    uvicorn.Server(settings).run([listener])


def listen(config: ServeConfig) -> socket.socket:
    """A socket at the address. OSError, with the address, where it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen at {config.host}:{config.port}: {error.strerror}; choose another port"
        ) from None
    listener.listen(1024)
    return listener
