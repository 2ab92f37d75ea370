"""The memory plan of training: against a real step's program, for absent meshes, as a command."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jdllm.convert import commands
from jdllm.model import linear, lora, quantise
from jdllm.model.config import LLADA_8B, ModelConfig
from jdllm.model.lora import Adapter, LoraConfig
from jdllm.model.model import named
from jdllm.runtime import sharding
from jdllm.store import checkpoint
from jdllm.train import memory
from jdllm.train.memory import TrainPlan, Work, plan_step, plan_training, shown
from jdllm.train.objective import Batch, choose
from jdllm.train.optimiser import Recipe, make_optimizer
from jdllm.train.step import all_parameters, beside, create_state

SMALL = dataclasses.replace(
    LLADA_8B, layers=7, embed=128, heads=4, kv_heads=4, head_dim=32, mlp=384, vocab=4096,
    dtype="float32",
)  # fmt: skip


def real(config: ModelConfig, settings: LoraConfig, rows: int, columns: int, **more: Any):
    """The plan that a run would say before it starts."""
    mesh = sharding.parse_mesh("1x1")
    model = checkpoint.random_model(config, mesh)
    trained, frozen, join = model.params, dataclasses.replace(model, params=None), all_parameters
    if settings.rank:
        own = linear.modules(named(model))
        names = lora.find(own, settings.targets)
        trained = lora.initial(own, names, settings.rank, 1.0, jax.random.key(0), mesh)
        if settings.base == "int8":
            model = dataclasses.replace(model, params=quantise.quantise_params(model.params))
        frozen, join = dataclasses.replace(model, adapter=Adapter({})), beside
    optimizer = make_optimizer(Recipe())
    zeros = jnp.zeros((1, rows, columns), jnp.int32)
    batch = Batch(zeros, zeros == 0, zeros, zeros[..., 0])
    return plan_step(
        create_state(trained, optimizer, mesh), batch, jax.random.key(0), frozen=frozen,
        objective=choose("auto", config), optimizer=optimizer, join=join, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "remat", "layers"),
    [
        pytest.param(LoraConfig(rank=8), "none", 3, marks=pytest.mark.slow),
        pytest.param(LoraConfig(rank=8, base="int8"), "layers", 7, marks=pytest.mark.slow),
        pytest.param(LoraConfig(), "none", 7, marks=pytest.mark.slow),
        pytest.param(LoraConfig(), "layers", 7, marks=pytest.mark.slow),
    ],
)
def test_the_plan_is_what_the_real_step_needs(settings, remat, layers, monkeypatch):
    """The small case draws its line through fewer layers."""
    if layers == 3:
        monkeypatch.setattr(memory, "FEW", 1)
        monkeypatch.setattr(memory, "MORE", 2)
    grid, config = sharding.abstract_mesh("1x1"), dataclasses.replace(SMALL, layers=layers)
    work = Work(config, grid, choose("auto", config), settings, 2, 64, 1, "float32", remat)
    plan, found = plan_training(work), real(config, settings, 2, 64, remat=remat)
    for name in ("frozen", "trained", "gradients", "logits"):
        assert getattr(plan, name) == getattr(found, name), name
    assert plan.moments == pytest.approx(found.moments, abs=16)  # and two counts
    assert plan.total == pytest.approx(found.total, rel=0.1)


@pytest.mark.slow
def test_the_command_plans_training(capsys, monkeypatch):
    monkeypatch.setattr(commands, "enable_compilation_cache", lambda: None)  # keep the tests' own
    words = ["plan", "tiny", "train=true", "mesh=2x2", "batch=4", "length=32", "memory=0.05"]
    commands.main([*words, "lora.rank=4", "json=true"])
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["bytes"]) == [field.name for field in dataclasses.fields(TrainPlan)]
    # q: A [64, 4] whole, B [4, 4, 16] split in two; k and v have two heads
    assert facts["bytes"]["trained"] == 2 * 4 * (3 * 64 * 4 + 4 * (64 + 32 + 32) // 2)
    assert facts["fits"] and facts["work"] == "1 micro-batch(es), training LoRA of rank 4"
    plan = TrainPlan(1, 2, 3, 4, 5, 6)
    assert plan.total == 21 and shown(plan, None).splitlines()[-1].endswith("0.000")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.rank=4", "lora.targets=qq"], "'qq' matches no module"),
        (["mesh=1x3"], "cannot be split over the 3 devices"),
    ],
)
def test_bad_input_is_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(["plan", "tiny", "train=true", *words])
    assert ended.value.code == 1 and message in capsys.readouterr().err


def test_settings_of_training_belong_to_training(capsys):
    for words in (["remat=layers"], ["train=true", "accumulation=3"]):
        with pytest.raises(SystemExit) as ended:
            commands.main(["plan", "tiny", *words])
        assert ended.value.code == 2
    assert "accumulation=3 must divide batch=8" in capsys.readouterr().err
