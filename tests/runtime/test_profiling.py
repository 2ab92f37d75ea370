"""Traces: sums over kernels, time in which streams overlap, and a recorded run on this machine."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jdllm.runtime.profiling import (
    Event,
    busy_seconds,
    moved,
    newest,
    profile,
    read,
    recording,
    shown,
    waits,
)


def test_kernels_are_added_up_and_overlaps_counted_once():
    streams = [Event("a", 0.0, 2.0, 4_000), Event("b", 1.0, 2.0), Event("a", 5.0, 5.0, 10_000)]
    found = profile({"/device:GPU:0": streams})
    assert [(k.name, k.seconds, k.calls) for k in found.kernels] == [("a", 7.0, 2), ("b", 2.0, 1)]
    assert found.kernels[0].share == pytest.approx(7 / 9)
    assert found.kernels[0].bytes_per_second == 2_000 and found.kernels[1].bytes_per_second is None
    assert (found.busy, found.seconds) == (pytest.approx(0.8), 10.0)
    text = shown(found)
    assert "| a | 7000.000 | 77.8 | 2 | 0 |" in text and "| b | 2000.000 | 22.2 | 1 | - |" in text
    assert "| b | a | 2000.000 | 1 |" in text, "where the device waits is told"
    assert text.endswith("device busy 80.0 % of 10.000 s")
    assert len(found.facts(1)["kernels"]) == 1


def test_devices_are_taken_together():
    one, other = [Event("a", 0.0, 1.0), Event("a", 3.0, 1.0)], [Event("a", 1.0, 4.0)]
    found = profile({"/device:GPU:0": one, "/device:GPU:1": other})
    assert found.devices == 2 and found.busy == pytest.approx(6 / 8)
    assert "2 devices busy 75.0 %" in shown(found)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=12))
def test_busy_time_is_that_of_a_raster(spans: list[tuple[int, int]]):
    events = [Event("k", float(start), float(length)) for start, length in sorted(spans)]
    raster = {t for start, length in spans for t in range(start, start + length)}
    assert busy_seconds(events) == len(raster)
    idle = max(raster) + 1 - min(raster) - len(raster)
    assert sum(wait.seconds for wait in waits({"/device:GPU:0": events})) == idle


def test_bytes_are_read_where_the_trace_tells():
    assert moved([("hlo_op", "fusion"), ("bytes_accessed", 12)]) == 12
    assert moved([("memcpy_details", "kind_src:device kind_dst:device size:4096 dest:0")]) == 4096
    assert moved([("hlo_op", "fusion")]) is None


def test_a_run_is_recorded(tmp_path: Path):
    run = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ x), x))
    x = jnp.ones((64, 64))
    jax.block_until_ready(run(x))
    with recording(tmp_path):
        jax.block_until_ready(run(x))
    found = profile(read(tmp_path))
    assert 0 < found.busy <= 1 and found.seconds > 0
    assert sum(k.share for k in found.kernels) == pytest.approx(1)
    assert max(k.calls for k in found.kernels) >= 3, "the loop's own kernels are not told apart"
    assert not any(
        name.startswith(("end:", "Threadpool")) for name in (k.name for k in found.kernels)
    )
    assert newest(tmp_path).name.endswith(".xplane.pb") and list(tmp_path.rglob("*.trace.json.gz"))


def test_nothing_is_refused_by_name(tmp_path: Path):
    with recording(None):
        pass
    with pytest.raises(FileNotFoundError, match="holds no trace"):
        read(tmp_path)
    with pytest.raises(ValueError, match="no kernel"):
        profile({})
