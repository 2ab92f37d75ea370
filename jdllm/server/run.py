"""Starts a server, and ends it in order."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn

from jdllm.load import enable_compilation_cache
from jdllm.runtime import processes, sharding
from jdllm.server.app import make_app
from jdllm.server.config import ServeConfig
from jdllm.server.service import Service


def serve(config: ServeConfig) -> None:
    """Loads the model and serves it until a signal asks to end; what has begun is finished.

    ValueError or OSError, in one sentence, where the model cannot be loaded or the port is taken.
    """
    listener = listen(config)  # now rather than after the weights
    service = prepare(config)
    host, port = listener.getsockname()[:2]
    processes.say(f"{config.title} is served at http://{host}:{port}")
    server(service).run([listener])


def prepare(config: ServeConfig) -> Service:
    """The service of a model that has been loaded, its engine started."""
    enable_compilation_cache()
    llm = config.load_llm()
    service = Service(llm, config)
    if config.warm:
        processes.say(f"compiling for {sharding.describe(llm.mesh)}")
    service.start()
    return service


def server(service: Service) -> uvicorn.Server:
    """The HTTP server of a service."""
    settings = uvicorn.Config(
        make_app(service),
        log_config=None,  # its own would end the handlers of everybody else in the process
        log_level="warning",
        timeout_graceful_shutdown=max(1, int(service.config.drain)),
        server_header=False,
    )
    return uvicorn.Server(settings)


@contextlib.contextmanager
def background(service: Service, listener: socket.socket) -> Iterator[str]:
    """A server in a thread, for as long as the block lasts; yields its address."""
    http = server(service)
    thread = threading.Thread(target=http.run, args=([listener],), daemon=True)
    thread.start()
    host, port = listener.getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        http.should_exit = True
        thread.join()
        listener.close()


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
