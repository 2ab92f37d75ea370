"""The pool of pages: nothing is lost, nothing is given twice, what is kept is what it was."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.engine import EngineConfig
from jdllm.engine.pages import PagePool, affordable, digests
from jdllm.llm import LLM

MOVES = st.lists(
    st.tuples(st.sampled_from(["take", "release", "publish", "adopt"]), st.integers(0, 7)),
    max_size=60,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(MOVES)
def test_pages_are_never_lost(moves: list[tuple[str, int]]):
    pool, held = PagePool(6), list[int]()
    content: dict[int, bytes] = {}  # of pages that were published
    for move, number in moves:
        digest = bytes([number])
        if move == "take" and (pages := pool.take(number % 3 + 1)):
            held += pages
            for page in pages:
                content.pop(page, None)
        elif move == "release" and held:
            pool.release([held.pop(number % len(held))])
        elif move == "publish" and held and held[number % len(held)] not in content:
            if digest not in content.values():
                content[held[number % len(held)]] = digest
            pool.publish(held[number % len(held)], digest)
        elif move == "adopt" and (page := pool.adopt(digest)) is not None:
            assert content[page] == digest
            held.append(page)
        assert pool.free == 6 - len(set(held))
        assert all(1 <= page <= 6 for page in held)


def test_what_was_used_last_is_kept_longest():
    pool = PagePool(3)
    for name in (b"a", b"b"):
        (page,) = pool.take(1)
        pool.publish(page, name)
        pool.release([page])
    first: Any = pool.adopt(b"a")
    pool.release([first])
    assert pool.kept == 2
    pool.take(2)
    assert pool.adopt(b"b") is None and pool.adopt(b"a") == first
    assert pool.take(2) == []


def test_digests_tell_beginnings():
    tokens = np.arange(11)
    a, b = digests(tokens, 4, "x"), digests(np.r_[9, tokens[1:]], 4, "x")
    assert len(a) == 2 and not set(a) & set(b)
    assert digests(tokens[:8], 4, "x") == a != digests(tokens, 4, "y")


def test_pages_are_as_many_as_memory_has_room_for(monkeypatch: pytest.MonkeyPatch):
    model = LLM.load("random:tiny", "1x1").model
    whole = EngineConfig(slots=4, columns=64).filled(model, 1)
    assert whole.pages == 4 * 64 // whole.page
    config = model.config
    key = 4 * config.kv_heads * config.head_dim  # bytes, float32
    page = 2 * config.layers * whole.page * key
    facts = {"bytes_limit": 10_000_000, "bytes_in_use": 8_500_000 - 3 * page}
    device = SimpleNamespace(memory_stats=lambda: facts)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert affordable(dataclasses.replace(model, mesh=None), whole.page) == 3
    facts["bytes_in_use"] = 9_999_999
    assert affordable(dataclasses.replace(model, mesh=None), whole.page) == 1
