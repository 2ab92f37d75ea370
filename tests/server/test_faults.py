"""The server under load, with clients that leave, bodies that are none, and signals."""

import asyncio
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import pytest

from jdllm.server.app import make_app
from tests.server.conftest import Running
from tests.server.test_server import post
from tests.support.tiny_models import write_small

ROOT = Path(__file__).parents[2]
CHAT = {"messages": [{"role": "user", "content": "7 + 5 ="}]}


def quiet(served: Running, seconds: float = 20) -> bool:
    """Whether nothing runs or waits any more, and every page is free, within some seconds."""
    engines, end = served.service.engines, time.monotonic() + seconds
    while time.monotonic() < end:
        if not engines.busy:
            return all(e.scheduler.pool.free == e.config.pages for e in engines.engines)
        time.sleep(0.02)
    return False


def open_stream(served: Running, body: Any) -> socket.socket:
    """A connection on which a request has been sent, and the first bytes of the reply read."""
    place = urlsplit(served.url)
    data = json.dumps(body).encode()
    connection = socket.create_connection((place.hostname, place.port))
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        + f"content-length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return connection


def test_who_leaves_makes_room(served: Running):
    """Within a stream, and while waiting for a whole reply."""
    post(served.url, CHAT | {"max_tokens": 8})  # compiles
    cancelled = served.service.metrics.requests.labels("cancelled")._value
    for stream in (True, False):
        before = cancelled.get()
        connection = open_stream(served, CHAT | {"stream": stream, "n": 8, "canvas": True})
        if stream:
            connection.recv(10)
        else:
            time.sleep(0.05)
        connection.close()
        assert quiet(served)
        assert cancelled.get() > before or not stream


def test_too_many_too_late(served: Running, monkeypatch: pytest.MonkeyPatch):
    config = served.service.config
    monkeypatch.setattr(served.service, "config", dataclasses.replace(config, max_queue=1))
    status, reply = post(served.url, CHAT | {"n": 8})
    assert (status, reply["error"]["type"]) == (429, "rate_limit_error")
    monkeypatch.setattr(served.service, "config", dataclasses.replace(config, timeout=1e-6))
    status, reply = post(served.url, CHAT)
    assert status == 504 and "seconds" in reply["error"]["message"]
    monkeypatch.setattr(served.service, "closing", True)
    assert post(served.url, CHAT)[0] == 503
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"{served.url}/health")
    assert quiet(served)


async def status_of(app: Any, path: str, headers: list[tuple[bytes, bytes]]) -> int:
    """The status of a GET, asked of the application itself."""
    found: list[int] = []

    async def send(message: Any) -> None:
        found.extend([message["status"]] if "status" in message else [])

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http", "method": "GET", "path": path, "headers": headers, "query_string": b"",
        "http_version": "1.1", "scheme": "http", "raw_path": path.encode(), "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    return found[0]


def test_the_key_is_asked_for(served: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JDLLM_API_KEY", "secret \u2713")
    app = make_app(served.service)

    def status(path: str, key: str = "") -> int:
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        return asyncio.run(status_of(app, path, headers))

    assert status("/v1/models") == status("/metrics") == status("/v1/models", "secret") == 401
    assert status("/") == status("/health") == 200


@pytest.mark.slow
def test_lm_eval_reads_it(served: Running):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.openai_completions import LocalChatCompletion

    from jdllm.tasks.lm_eval.resolve import resolve

    url = f"{served.url}/v1/chat/completions"
    make: Any = LocalChatCompletion
    model, tasks = make(base_url=url, model="small", num_concurrent=2), resolve(["sudoku"], limit=2)
    (task,) = tasks["tasks"].values()
    task.set_config("generation_kwargs", {"max_gen_toks": 40}, update=True)
    found: Any = evaluate(model, tasks, bootstrap_iters=0, apply_chat_template=True)
    (rows,) = found["samples"].values()
    assert len(rows) == 2


# ---- heavier


@pytest.mark.slow
def test_a_thousand_requests(served: Running):
    """From 64 connections, of random lengths; one in ten leaves in the middle."""
    rng, seen = random.Random(0), Counter[Any]()

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        chance = rng.random()
        body = CHAT | {"max_tokens": rng.randint(1, 60), "stream": chance < 0.5}
        body["messages"] = [{"role": "user", "content": "1 " * rng.randint(0, 20)}]
        try:
            timeout = aiohttp.ClientTimeout(total=0.2 if number % 10 == 0 else 300)
            url = f"{served.url}/v1/chat/completions"
            async with session.post(url, json=body, timeout=timeout) as reply:
                text = await reply.text()
                good = "[DONE]" in text if body["stream"] else "usage" in text
                seen[reply.status if good or reply.status != 200 else "torn"] += 1
        except TimeoutError:
            seen["left"] += 1

    async def all_of_them() -> None:
        connector = aiohttp.TCPConnector(limit=64)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(one(session, i) for i in range(1000)))

    asyncio.run(all_of_them())
    assert set(seen) <= {200, 429, "left"} and sum(seen.values()) == 1000, seen
    assert seen[200] > 500
    assert quiet(served, 60)


@pytest.mark.slow
def test_bodies_that_are_none(served: Running):
    rng = np.random.default_rng(0)
    good = json.dumps(CHAT | {"max_tokens": 2, "temperature": 0.5, "stop": ["x"]}).encode()
    for _ in range(500):
        body = bytearray(good)
        for place in rng.integers(0, len(body), rng.integers(1, 6)):
            body[place] = rng.integers(0, 256)
        status, reply = post(served.url, bytes(body))
        assert status in (200, 400, 404) and (status == 200 or reply["error"]["message"])
    odd = ["\u202e\U0001f600\x00\ud7ff" * 5, "\ufdd0\ufdd1", "<|mdm_mask|>" * 3, "a" * 500_000]
    for text in odd:
        status, _ = post(served.url, {"messages": [{"role": "user", "content": text}]})
        assert status in (200, 400)
    assert quiet(served)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small", 64)


def launch(folder: Path, port: int) -> subprocess.Popen:
    words = [f"model={folder}", f"port={port}", "engine.slots=2", "engine.columns=256", "name=x"]
    words.append("drain=300")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JDLLM_HOME": str(folder.parent / "home")}
    process = subprocess.Popen(
        [sys.executable, "-m", "jdllm.serve", *words], env=environment, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return process
        except OSError:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.2)
    raise AssertionError("it does not start")


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    yield number


@pytest.mark.slow
def test_signals(folder: Path, port: int):
    """SIGTERM lets a stream end; after SIGKILL the next start serves at once."""
    process = launch(folder, port)
    served: Any = dataclasses.make_dataclass("Place", ["url"])(f"http://127.0.0.1:{port}")
    with open_stream(served, CHAT | {"stream": True, "n": 6, "max_tokens": 100}) as connection:
        found = connection.recv(1000)
        process.send_signal(signal.SIGTERM)
        while part := connection.recv(65536):
            found += part
    assert b"[DONE]" in found
    process.wait(60)
    assert process.stderr and "Traceback" not in process.stderr.read()
    process.stderr.close()
    process = launch(folder, port)
    with open_stream(served, CHAT | {"stream": True, "n": 6, "max_tokens": 100}) as connection:
        connection.recv(100)
        process.kill()
    process.wait(30)
    assert process.stderr
    process.stderr.close()
    process = launch(folder, port)
    assert post(served.url, CHAT)[0] == 200
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert process.stderr
    process.stderr.close()
