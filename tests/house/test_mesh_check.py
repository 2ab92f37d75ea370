"""The script for a machine with two GPUs, run whole on two of the virtual CPU devices."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jdllm.runtime import cli
from tests.support.scripts import loaded


@pytest.fixture(scope="module")
def script() -> Any:
    with loaded("mesh_check") as module:
        yield module


TINY = ["model=tiny", "prompt_length=8", "gen_length=16", "block_length=8", "repeats=1"]
SETTINGS = {"default": ("", {}), "one-shot all-reduce": ("--xla_there_is_none=1", {})}


@pytest.mark.slow
def test_it_measures_every_case(script, tmp_path, monkeypatch):
    """Rows, speed-ups, settings in processes of their own; one that XLA does not know is told."""
    target = tmp_path / "found" / "mesh_check.json"
    monkeypatch.setattr(script, "VARIANTS", SETTINGS)
    monkeypatch.setattr(script, "CASES", (("1x1", 1), ("1x2", 1), ("2x1", 2)))
    script.main(cli.parse(script.MeshConfig, [*TINY, f"output={target}"]))
    found = json.loads(target.read_text())
    assert [(row["mesh"], row["rows"]) for row in found["rows"]] == list(script.CASES)
    assert not found["left_out"] and not found["nvlink_multicast"]
    for row in found["rows"]:
        assert row["forwards"] == 2 * 8  # two blocks of eight; the opening pass decodes as well
        assert row["forwards_per_second"] > 0 and row["tokens_per_second"] > 0
    weights = {row["mesh"]: row["weight_gigabytes_a_device"] for row in found["rows"]}
    assert 0.5 < weights["1x2"] / weights["1x1"] < 0.6 and weights["2x1"] == weights["1x1"]
    assert len(found["efficiency"]) == 2
    assert found["all_reduce_microseconds"].keys() == {
        f"{n * 8 * 64 * 4} bytes" for n in (1, 8, 64)
    }
    assert "ms_per_block_step" in found["variants"]["default"]
    assert "xla_there_is_none" in found["variants"]["one-shot all-reduce"]["error"]
    assert ["profile" in row for row in found["rows"]] == [True, True, False]
    assert found["rows"][1]["profile"]["planes"]
    assert list(target.parent.iterdir()) == [target]  # no trace, no half-written result is left


def test_nothing_starts_late(script, tmp_path):
    target = tmp_path / "mesh_check.json"
    script.main(cli.parse(script.MeshConfig, [*TINY, f"output={target}", "minutes=0"]))
    found = json.loads(target.read_text())
    assert not found["rows"]
    assert len(found["left_out"]) == len(script.CASES) + len(script.VARIANTS)


def test_efficiency_is_against_one_device(script):
    steps = {("1x1", 1): 6.0, ("1x2", 1): 4.0, ("2x1", 2): 6.0}
    rows = [
        {"mesh": m, "rows": n, "ms_per_block_step": t, "tokens_per_second": 1000 * n / t}
        for (m, n), t in steps.items()
    ]
    assert list(script.efficiencies(rows).values()) == [1.5, 2.0]


def test_kernels_have_kinds(script):
    names = ("ncclDevKernel_AllReduce_Sum_bf16", "nvjet_tst_64x8", "loop_add_fusion_3", "MemcpyD2D")
    found = [script.kind_of(name) for name in names]
    assert found == ["all-reduce", "matrix products", "others", "copies"]


def test_cheap_weights_are_a_model(script):
    """Finite, not all alike, and in slices."""
    config = script.NAMED["tiny"]
    model = script.cheap_weights(config, script.sharding.parse_mesh("1x2"))
    for leaf in jax.tree.leaves(model):
        assert jnp.isfinite(leaf).all() and jnp.unique(leaf).size > 1
    specs = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(model)}
    assert len(specs) > 1
