"""The engine's benchmark: both ways serve every request, and the figures follow from the times."""

import dataclasses
from pathlib import Path

import pytest

from jdllm.decode import DecodeConfig
from jdllm.evaluation.traffic import Batches, Call, Clock, Traffic, draw, figures, measure, shown
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


def test_rows_of_a_batch_end_where_their_own_completions_do():
    """One program, of the longest completion: tokens and NFE are those of each alone."""
    llm, decode = tiny("blocks"), DecodeConfig(block_length=4, cache="block", stop="none")
    calls = [Call(0.0, [5, 6, 7, 8], 4), Call(0.0, [9, 10, 11], 8)]
    program, request, _ = Batches(llm, decode, 2, 8).program(calls)
    rows = program(llm.model, request, None).rows
    for i, call in enumerate(calls):
        config = dataclasses.replace(decode, gen_length=call.tokens)
        (alone,) = llm.generate([call.prompt], config)
        start = len(call.prompt)
        assert rows.tokens[i, start : start + len(alone.ids)].tolist() == alone.ids
        assert int(rows.nfe[i]) == alone.nfe


@pytest.mark.slow
def test_both_ways_are_measured(tmp_path: Path):
    decode = DecodeConfig(block_length=4, cache="dual")
    rows = measure(tiny(), decode, Traffic(6, 50.0, 6, 6), 2, 0, tmp_path)
    assert 0 < profile(read(tmp_path)).busy <= 1
    assert rows["engine"]["tokens"] == rows["batches"]["tokens"] > 0
    assert "times the tokens/s" in shown(rows)
