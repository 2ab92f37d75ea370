"""A server on loopback, with a small model of random weights and a real tokenizer."""

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from jdllm.engine import EngineConfig
from jdllm.llm import LLM
from jdllm.server.app import make_app
from jdllm.server.config import ServeConfig
from jdllm.server.run import listen
from jdllm.server.service import Service
from tests.support.tiny_models import write_small

ENGINE = EngineConfig(slots=4, columns=128, page=128, rounds=2)
SETTINGS: Any = {"port": 0, "engine": ENGINE, "warm": False}


@dataclasses.dataclass
class Running:
    """A server in a thread of this process."""

    service: Service
    url: str


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM.load(str(write_small(tmp_path_factory.mktemp("small"), 64)), "1x1")


@pytest.fixture(scope="session")
def served(small: LLM) -> Iterator[Running]:
    config = ServeConfig(name="small", **SETTINGS)
    service, listener = Service(small, config), listen(config)
    service.start()
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    yield Running(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
    server.should_exit = True
    thread.join()
    listener.close()
