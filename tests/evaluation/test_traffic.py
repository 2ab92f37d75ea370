"""The engine's benchmark: both ways serve every request, and the figures follow from the times."""

from pathlib import Path

import pytest

from jdllm.decode import DecodeConfig
from jdllm.evaluation.traffic import Call, Clock, Traffic, draw, figures, measure, shown
from jdllm.runtime.profiling import profile, read
from tests.support.tiny_models import tiny


def test_figures():
    calls = [Call(0.0, [1], 10), Call(1.0, [1], 30)]
    found = figures(calls, Clock({0: 0.5, 1: 2.0}, {0: 1.0, 1: 4.0}))
    assert found["tokens_per_second"] == 10.0
    assert found["first_block_p50"] == 0.75 and found["latency_p50"] == 2.0
    assert found["tpot_p50"] == 100.0


def test_times_and_lengths_are_drawn():
    calls = draw(Traffic(200, 10.0, 8, 12), tiny("blocks"), 0)
    assert calls == draw(Traffic(200, 10.0, 8, 12), tiny("blocks"), 0)
    assert 10 < calls[-1].due < 40 and [c.due for c in calls] == sorted(c.due for c in calls)
    assert {len(call.prompt) for call in calls} <= set(range(2, 33))
    alike = draw(Traffic(5, 0.0, 8, 12, spread=0.0, prompt_spread=0.0), tiny("blocks"), 0)
    assert {(len(call.prompt), call.tokens) for call in alike} == {(8, 12)}
    with pytest.raises(ValueError, match="rate=-1"):
        Traffic(rate=-1)


@pytest.mark.slow
def test_both_ways_are_measured(tmp_path: Path):
    decode = DecodeConfig(block_length=4, cache="dual")
    rows = measure(tiny(), decode, Traffic(6, 50.0, 6, 6), 2, 0, tmp_path)
    assert 0 < profile(read(tmp_path)).busy <= 1
    assert rows["engine"]["tokens"] == rows["batches"]["tokens"] > 0
    assert "times the tokens/s" in shown(rows)
