"""Gradient dynamics of a training run: kept over a kill, written beside the adapter, read back."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdllm import LLM, DecodeConfig
from jdllm.decode import Exit
from jdllm.decode.memory import Planner
from jdllm.runtime import sharding
from jdllm.store import dynamics as store
from jdllm.train.dynamics import STATISTICS, WINDOWS
from jdllm.training import run
from jdllm.training.config import SFTConfig
from jdllm.training.dynamics import DynamicsConfig, read_log
from tests.training.test_lora_run import Killed, dies_at, refusal, settings, write_base

EVERY = DynamicsConfig(",".join(WINDOWS))
CANVAS: dict[str, Any] = {
    "rule": "quota", "schedule": "gaussian", "gen_length": 16, "block_length": 8, "steps": 16,
    "stop": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> SFTConfig:
    """Five updates of two micro-batches each."""
    config = settings(
        base, tmp_path_factory.mktemp("runs") / "whole", dynamics=EVERY, accumulation=2
    )
    run.fine_tune(config)
    return config


@pytest.fixture(scope="module")
def adapted(base, finished) -> LLM:
    return LLM.load(str(base), "1x1", adapter=finished.output / "adapter")


def arrays(config: SFTConfig) -> dict[str, np.ndarray]:
    with np.load(config.output / "adapter" / store.FILE) as file:
        return {name: file[name] for name in file.files}


def test_dynamics_lie_beside_the_adapter(finished, adapted: LLM):
    """A map per window and module in the layout of PEFT's B, once an update, and the energy."""
    found, facts = arrays(finished), store.read_facts(finished.output / "adapter")
    assert facts["updates"] == facts["steps"] == 5 and facts["windows"] == list(WINDOWS)
    assert facts["modules"] == sorted(adapted.maps.factors)
    for name, b in adapted.maps.factors.items():
        for window in WINDOWS:
            assert found[f"{window}/{name}"].shape == b.shape
            assert found[f"{window}/{name}"].dtype == np.float32
        np.testing.assert_allclose(
            found[f"energy/{name}"], np.linalg.norm(found[f"mean/{name}"], axis=1), rtol=1e-6
        )
    assert not np.allclose(found["mean/layers.0.attention.q"], found["late/layers.0.attention.q"])


def test_dynamics_of_a_constant_rate_are_what_the_weights_did(finished, adapted: LLM):
    """The mean update is nearly minus B: why exit.map=weights is a control."""
    cosines = adapted.maps.alignment(Exit(mode="code"))
    assert set(cosines) == set(adapted.maps.factors) and max(cosines.values()) < -0.8


@pytest.mark.slow
def test_dynamics_of_a_killed_run_are_the_same_bits(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished, output=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run.train, "train_step", dies_at(4))
        with pytest.raises(Killed):
            run.fine_tune(config)
    run.fine_tune(config)
    ours, theirs = arrays(config), arrays(finished)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"facts"}:
        np.testing.assert_array_equal(ours[name], theirs[name])
    mine, other = ([without_time(x) for x in read_log(c.output / "dynamics.jsonl")]
                   for c in (config, finished))  # fmt: skip
    assert mine == other


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "time"}


def test_dynamics_are_logged_by_module_and_drawn(finished):
    log = read_log(finished.output / "dynamics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert all(set(own) == set(STATISTICS) for own in log[0]["modules"].values())
    assert all(own["update_norm"] > 0 for own in log[-1]["modules"].values())
    pytest.importorskip("matplotlib")
    assert (finished.output / "dynamics.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("map_name", ["mean", "shuffled"])
def test_dynamics_decide_when_a_block_is_left(adapted: LLM, map_name: str):
    """With a loose threshold every block is left at the earliest step, and is finished then."""
    exits = {"exit.mode": "code", "exit.map": map_name, "exit.patience": (2,)}
    loose = DecodeConfig.of(CANVAS | exits | {"exit.threshold": (1e9,), "exit.polish": (1,)})
    tight = DecodeConfig.of(CANVAS | exits | {"exit.threshold": (-1.0,)})
    (early,), (late,) = (adapted.generate([[5, 6, 7]], config) for config in (loose, tight))
    assert early.exits == [0, 1] and len(early.calls) == 2
    assert early.nfe == sum(early.calls) and early.calls == [4, 4]  # two calm steps, one more
    assert late.exits == [] and late.calls == [5, 5]  # then nothing is masked any more


def test_dynamics_that_do_not_fit_are_refused(base, finished, adapted: LLM, tmp_path):
    asked = DecodeConfig.of(CANVAS | {"exit.mode": "code"})

    def says(llm: LLM, config: DecodeConfig = asked) -> str:
        with pytest.raises(ValueError) as caught:
            llm.generate([[5]], config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "name one: adapter=FOLDER" in says(LLM(dataclasses.replace(adapted.model, adapter=None)))
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "has no dynamics.npz" in says(LLM(adapted.model, adapter=bare))
    maps = {name: np.ones((3, 2)) for name in adapted.maps.factors}
    store.write_dynamics(bare, {"mean": maps}, {})
    assert "does not fit the adapter: the map of" in says(LLM(adapted.model, adapter=bare))
    late = dataclasses.replace(asked, exit=Exit(mode="code", map="late"))
    assert "holds no window late; it has mean" in says(LLM(adapted.model, adapter=bare), late)
    store.write_dynamics(bare, {"mean": {"layers.7.attention.q": np.ones((3, 2))}}, {})
    assert "the dynamics have no map for" in says(LLM(adapted.model, adapter=bare))
    full = settings(base, tmp_path / "full", lora=type(finished.lora)())
    assert "set lora.rank= too" in refusal_of(full)
    with pytest.raises(ValueError, match="has median, which is none of mean, late"):
        DynamicsConfig("mean,median")


def refusal_of(config: SFTConfig) -> str:
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(config, dynamics=EVERY)
    return str(caught.value)


def test_dynamics_windows_cannot_change_in_a_run(finished):
    other = dataclasses.replace(finished, dynamics=DynamicsConfig("mean"))
    assert "dynamics.windows=mean" in refusal(other)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x1", "1x2"])
def test_dynamics_decide_alike_on_every_mesh(base, finished, adapted: LLM, mesh: str):
    """Rows over devices, or heads: the same blocks are left after the same calls."""
    exits = {"exit.mode": "code", "exit.threshold": (0.5,), "exit.patience": (1,)}
    config, prompts = DecodeConfig.of(CANVAS | exits), [[5, 6, 7], [9], [3, 3]]
    other = LLM.load(str(base), mesh, adapter=finished.output / "adapter")
    assert other.generate(prompts, config) == adapted.generate(prompts, config)


@pytest.mark.slow
def test_dynamics_are_no_part_of_a_memory_plan(adapted: LLM):
    """A plan knows no adapter, and leaves out what an exit keeps."""
    config = adapted.resolve(DecodeConfig.of(CANVAS | {"exit.mode": "code"}))
    plan = Planner(adapted.config, sharding.abstract_mesh("1x1"), 32, config).plan(1)
    assert plan.total > 0
