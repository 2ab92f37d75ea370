"""The cost model: its arithmetic, the measured points, and the page that shows its tables."""

import dataclasses
import json
import re
from typing import Any

import pytest

from jdllm.model.config import count_parameters
from tests.support.scripts import ROOT, loaded


@pytest.fixture(scope="module")
def script() -> Any:
    with loaded("cost_model") as module:
        yield module


def numbers(table: str) -> list[float]:
    return [float(x.replace(",", "")) for x in re.findall(r"[\d,]+", table) if x != ","]


def test_the_page_shows_what_the_script_finds(script):
    """Exactly, but for the memory that another version of XLA may plan a little differently."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    found = script.tables()
    shown = dict(re.findall("<!-- table: (.*?) -->\n(.*?)\n<!-- end of table -->", page, re.DOTALL))
    assert shown.keys() == found.keys()
    assert numbers(shown.pop("head")) == pytest.approx(numbers(found.pop("head")), rel=0.1)
    assert shown == found
    assert script.with_tables(page, found) == page


def test_measured_passes_are_met(script):
    """Within 20 %; those of two devices were not fitted."""
    found = json.loads((script.RESULTS / "mesh_check.json").read_text())
    points = script.measured(found)
    machine = script.fit(points, found["all_reduce_microseconds"])
    assert {p.alone for p in points} == {True, False} and len(points) == 12
    for point in points:
        assert point.predicted(machine) == pytest.approx(point.milliseconds, rel=0.2)


def test_one_step_reads_every_weight_once(script):
    """But for the embedding and the norms; and multiplies each with every token."""
    config = script.LLADA_8B
    found = script.cost(config, script.Pass(rows=1, columns=32, keys=0, wanted=32))
    weights = count_parameters(config) - config.vocab * config.embed
    logits = script.LOGIT_PASSES * 4 * 32 * config.vocab
    assert found.weights == pytest.approx(2 * weights, rel=1e-4)
    residual, width = script.RESIDUAL_PASSES * config.embed, script.MLP_PASSES * config.mlp
    layer = residual + script.HEAD_PASSES * config.heads * config.head_dim + width
    assert found.streams == pytest.approx(2 * 32 * config.layers * layer + logits)
    assert found.flops == pytest.approx(2 * weights * 32, rel=1e-4)
    assert count_parameters(script.LLADA2_FLASH) == pytest.approx(100e9, rel=0.05)


def test_axes_share_the_work(script):
    """The model axis shares weights and cache, the data axis rows; few key heads stay whole."""
    config, step = script.LLADA_8B, script.Pass(8, 32, 1024, 32)
    one = script.cost(config, step)
    split = script.cost(config, step, model=4)
    assert split.weights == pytest.approx(one.weights / 4)
    whole = 2 * 8 * 32 * config.layers * script.RESIDUAL_PASSES * config.embed
    assert split.streams - whole == pytest.approx((one.streams - whole) / 4)
    assert split.flops == pytest.approx(one.flops / 4)
    assert split.sums == 2 * config.layers + 2
    assert script.cost(config, step, data=8) == script.cost(
        config, dataclasses.replace(step, rows=1)
    )
    grouped = dataclasses.replace(config, kv_heads=4)
    four, eight, sixteen = (script.cost(grouped, step, model=n).streams for n in (4, 8, 16))
    # Logits and heads still split; the cache of one key/value head stays.
    assert four - eight == pytest.approx(2 * (eight - sixteen))
    cache = 2 * 8 * 1024 * 2 * 128 * 32
    assert 2 * eight - four == pytest.approx(whole + cache)


def test_a_grouped_kernel_reads_what_was_picked(script):
    moe = script.LLADA2_FLASH.moe
    one_token = script.layer_weights(script.LLADA2_FLASH, 1, 1, grouped=True)
    many = script.layer_weights(script.LLADA2_FLASH, 1, 10_000, grouped=True)
    dense = script.layer_weights(script.LLADA2_FLASH, 1, 1, grouped=False)
    assert one_token[0] == pytest.approx(one_token[1])
    assert many[0] == pytest.approx(dense[0])
    expert = 3 * script.LLADA2_FLASH.embed * moe.expert_mlp
    assert dense[1] - one_token[1] == pytest.approx((moe.experts - moe.top_k) * expert)


def test_constants_are_found_again(script):
    """From passes and all-reduces that a known machine would have taken."""
    truth = script.Machine(3e12, 7e14, 1e-5, 2e-5, 2e11)
    steps = [script.Pass(n, columns, 1024, 32) for n in (1, 8, 32) for columns in (32, 1024)]
    costs = [script.cost(script.LLADA_8B, step) for step in steps]
    points = [script.Point("", 1, 1, c, 1e3 * c.seconds(truth)) for c in costs]
    links = {f"{n} bytes": 1e6 * (2e-5 + n / 2e11) for n in (1 << 18, 1 << 21, 1 << 24)}
    found = script.fit(points, links)
    for field in dataclasses.fields(truth):
        assert getattr(found, field.name) == pytest.approx(getattr(truth, field.name), rel=1e-3)
