"""A server on loopback, with a small model of random weights and a real tokenizer."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from jdllm.engine import EngineConfig
from jdllm.llm import LLM
from jdllm.server.config import ServeConfig
from jdllm.server.run import background, listen
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
    with background(service, listener) as url:
        yield Running(service, url)
