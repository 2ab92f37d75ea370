"""Compiled programs are few, and said to be compiled while they are."""

import io

import jax
import jax.numpy as jnp
import pytest

from jdllm.runtime import programs
from jdllm.runtime.programs import LOOPS, MAPS, Programs, loop_options
from jdllm.runtime.progress import Bar, doing


def compiled(number: int):
    """A program of its own."""
    return jax.jit(lambda x: jnp.sin(x) * number).lower(jnp.zeros(3)).compile()


def test_loops_are_compiled_for_the_device_unless_flags_say_otherwise():
    options = loop_options("--xla_cpu_max_isa=AVX2")
    assert {"WHILE", "CONDITIONAL", "FUSION"} < set(options.popitem()[1].split(","))
    assert loop_options("--xla_gpu_enable_command_buffer=") == {}
    count = jax.jit(lambda n: jax.lax.while_loop(lambda x: x < n, lambda x: 2 * x, 1))
    assert count.lower(0).compile(LOOPS)(100) == 128, "XLA knows the options"


def test_the_oldest_go_first():
    kept = Programs(most=4)
    for key in range(4):
        assert kept.get(key, lambda key=key: compiled(key))[1] > 0
    assert kept.get(0, pytest.fail)[1] == 0
    kept.get(4, lambda: "new")
    assert len(kept) == 3
    for key in (0, 3, 4):
        assert kept.get(key, pytest.fail)[1] == 0


@pytest.mark.skipif(not MAPS.exists(), reason="Linux counts memory maps")
def test_dropped_programs_give_their_maps_back(monkeypatch: pytest.MonkeyPatch):
    def maps() -> int:
        return MAPS.read_bytes().count(b"\n")

    kept = Programs()
    jax.clear_caches()
    before = maps()
    for key in range(20):
        kept.get(key, lambda key=key: compiled(key))
    grown = maps() - before
    assert grown >= 20
    monkeypatch.setattr(programs, "SHARE", 0.0)
    kept.get("one more", lambda: "new")
    assert len(kept) == 1 and maps() - before < grown / 2


def test_off_linux_nothing_is_crowded(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(programs, "MAPS", tmp_path / "none")
    assert not programs.is_crowded()


def test_the_bar_says_what_is_done():
    with doing("nothing is shown"):
        pass
    text = io.StringIO()
    with Bar(total=2, file=text) as bar:
        bar.set_postfix_str("before")
        Programs().get("key", lambda: "program")
        assert "compiling" in text.getvalue() and bar.postfix == "before"
    with Bar(total=2, disable=True), doing("hidden"):
        pass
