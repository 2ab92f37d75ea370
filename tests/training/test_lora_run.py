"""Training LoRA's factors: the recorded steps of torch, runs that are killed, and refusals."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from jdllm import LLM
from jdllm.convert import adapters, commands
from jdllm.load import BUNDLED, load_model
from jdllm.model.config import NAMED
from jdllm.model.lora import Factors, LoraConfig
from jdllm.model.model import Model, forward, named
from jdllm.runtime import files, sharding
from jdllm.store import checkpoint
from jdllm.tokenizer import copy_tokenizer
from jdllm.train.memory import TrainPlan, held, shown
from jdllm.train.optimiser import Recipe
from jdllm.train.step import beside, create_state, train_step
from jdllm.training import run
from jdllm.training.config import SFTConfig
from jdllm.training.subject import load_subject
from tests.support.recordings import load

GOLDENS = Path(__file__).parents[1] / "goldens"
CONFIG = dataclasses.replace(
    NAMED["bundled"],
    layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=48, max_length=128, dtype="float32",
)  # fmt: skip
LORA = LoraConfig(rank=4, targets="q,v,down", dropout=0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A converted folder with random weights and the bundled tokenizer."""
    return write_base(tmp_path_factory.mktemp("models") / "tiny", seed=0)


def write_base(folder: Path, seed: int) -> Path:
    with files.atomic_folder(folder) as partial:
        model = checkpoint.random_model(CONFIG, sharding.parse_mesh("1x1"), seed)
        checkpoint.save_model(partial, model)
        copy_tokenizer(BUNDLED, partial)
    return folder


def settings(base: Path, output: Path, **changes: Any) -> SFTConfig:
    own: dict[str, Any] = dict(
        output=output, model=str(base), task="sudoku", examples=12, length=96, batch=4, lora=LORA,
        recipe=Recipe(steps=5, learning_rate=1e-2), mesh="1x1", save_every=2, log_every=1,
    )  # fmt: skip
    return SFTConfig(**own | changes)


def refusal(config: SFTConfig) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        run.fine_tune(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def saved(output: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((output / "adapter").iterdir())}


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> SFTConfig:
    """A run that nothing interrupted; tests must not change its folder."""
    config = settings(base, tmp_path_factory.mktemp("runs") / "whole")
    run.fine_tune(config)
    return config


# The recorded steps


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "peft" / "llada_qkv" / "train_steps.npz") as stored:
        return dict(stored)


def factors_at(recorded: dict[str, np.ndarray], kind: str, step: int) -> dict[str, Factors]:
    """Recorded arrays of factors, "" or their moments, in our layout."""
    found = {}
    for name in (key[len("A__") :] for key in recorded if key.startswith("A__")):
        layer, part = re.findall(r"blocks\.(\d+)\.([qkv])_proj", name)[0]
        a, b = (recorded[f"{side}{kind}__{name}"][step] for side in "AB")
        pair = jnp.asarray(a.T), jnp.asarray(b.T.reshape(4, 4, -1))
        found[f"layers.{layer}.attention.{part}"] = Factors(*pair, 2.0)
    return found


def near(got: Any, wanted: Any, atol: float) -> None:
    for name, factors in wanted.items():
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(factors), strict=True):
            np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4, err_msg=name)


def test_three_steps_equal_those_of_torch(recorded):
    """Loss, factors and both moments; weight decay acts on A and B, and nothing else moves."""
    model, optimizer = load(GOLDENS / "llada"), optax.adamw(1e-2, weight_decay=0.1)
    t, columns = recorded["t"][:, None], recorded["columns"]

    @jax.jit
    def step(factors: Any, moments: Any, model: Model) -> tuple[Any, Any, jax.Array]:
        def loss_of(factors: Any) -> jax.Array:
            joined = beside(factors, model)
            logits = forward(joined, recorded["noisy"], jnp.ones(recorded["noisy"].shape, bool))
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, recorded["tokens"])
            return jnp.sum(jnp.where(recorded["masked"], nll / t, 0)) / columns

        loss, gradient = jax.value_and_grad(loss_of)(factors)
        update, moments = optimizer.update(gradient, moments, factors)
        return optax.apply_updates(factors, update), moments, loss

    factors: Any = factors_at(recorded, "", 0)
    moments = optimizer.init(factors)
    for k in range(4):
        near(factors, factors_at(recorded, "", k), 2e-5)
        near(optax.tree_utils.tree_get(moments, "mu"), factors_at(recorded, "_exp_avg", k), 2e-5)
        near(optax.tree_utils.tree_get(moments, "nu"), factors_at(recorded, "_exp_avg_sq", k), 2e-6)
        factors, moments, loss = step(factors, moments, model)
        np.testing.assert_allclose(loss, recorded["loss"][k], atol=1e-4)
        if k == 0:
            first = optax.tree_utils.tree_get(moments, "mu")
            assert all(not np.any(part.a) and np.any(part.b) for part in first.values())


# Runs


def test_a_run_leaves_an_adapter_for_its_base(finished, base):
    assert not (finished.output / "model").exists()
    facts = json.loads((finished.output / "adapter" / adapters.CONFIG).read_text())
    assert (facts["r"], facts["lora_alpha"], facts["lora_dropout"]) == (4, 8, 0.1)
    assert facts["base_model_name_or_path"] == str(base)
    rows = lines(finished.output)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    llm = LLM.load(str(base), "1x1", adapter=finished.output / "adapter")
    assert llm.model.adapter and set(llm.model.adapter.factors) == {
        f"layers.0.{name}" for name in ("attention.q", "attention.v", "mlp.down")
    }
    assert all(np.any(factors.b) for factors in llm.model.adapter.factors.values())
    with pytest.raises(ValueError, match="is a training run; use it with model=BASE adapter="):
        LLM.load(str(finished.output), "1x1")
    with pytest.raises(ValueError, match="this run's adapter is"):
        LLM.load(str(base), "1x1", adapter=finished.output)
    with pytest.raises(ValueError, match="is a LoRA adapter"):
        LLM.load(str(finished.output / "adapter"), "1x1")


def test_a_checkpoint_holds_factors_their_moments_and_what_they_belong_to(finished):
    folder = finished.output / "checkpoints" / "5"
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder / "state").item_metadata
    sizes = [leaf.shape for leaf in jax.tree.leaves(tree) if len(leaf.shape) > 1]
    per_factor = {(32, 4), (4, 2, 16), (48, 4), (4, 32)}
    assert set(sizes) == per_factor and len(sizes) == 3 * 6
    facts = json.loads((folder / "run" / "metadata").read_text())
    assert set(facts) == {"run", "base", "rank", "alpha", "modules", "training_text"}
    assert (facts["rank"], facts["alpha"]) == (4, 8)


@pytest.mark.slow
def test_a_plan_is_said_before_the_start(base, tmp_path, capsys):
    """Parts are what the arrays hold; the total with XLA's scratch is what the program takes."""
    config = settings(base, tmp_path / "run", recipe=Recipe(steps=1), lora=LoraConfig(rank=4))
    run.fine_tune(config)
    said = capsys.readouterr().err
    assert said.index("GB on each device") < said.index("1/1")
    rows = [line.split() for line in said.splitlines() if re.match("  [a-z]", line)]
    assert [row[0] for row in rows] == [
        "frozen", "trained", "moments", "gradients", "logits", "activations", "total",
    ]  # fmt: skip
    subject = load_subject(config, sharding.parse_mesh("1x1"))
    sizes = [sum(x.nbytes for x in jax.tree.leaves(t)) for t in (subject.frozen, subject.trained)]
    assert sizes[1] == 3 * 4 * (32 + 32) * 4  # q, k, v; A and B; rank 4
    state = create_state(subject.trained, optax.adam(1.0), sharding.parse_mesh("1x1"))
    found = [held(subject.frozen.params), held(state.trained), held(state.moments)]
    assert found == [*sizes, 2 * sizes[1] + 4]
    plan = TrainPlan(2_000_000_000, 0, 0, 0, 0, 1_000_000)
    assert shown(plan, 2_001_000_000).endswith("2.001  fits in 2.001")
    assert shown(plan, 2_000_000_000).endswith("2.001  does not fit in 2.000")


def test_any_checkpoint_is_exported_as_an_adapter(finished, tmp_path, capsys):
    for step, words in ((5, []), (4, ["step=4"])):
        output = tmp_path / str(step)
        commands.main(["export", f"source={finished.output}", f"output={output}", *words])
        found = {p.name: p.read_bytes() for p in sorted(output.iterdir())}
        assert (found == saved(finished.output)) == (step == 5)
        assert len(adapters.read_factors(output, CONFIG)) == 3
    with pytest.raises(SystemExit):
        commands.main(["export", f"source={finished.output}", f"output={tmp_path / 'x'}", "step=3"])
    assert "step=3 is not among the checkpoints" in capsys.readouterr().err


class Killed(Exception):
    pass


def dies_at(step: int):
    """train_step, but for one call."""
    calls = iter(range(1, 100))

    def stepped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == step:
            raise Killed
        return train_step(*args, **kwargs)

    return stepped


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(finished, base, tmp_path, monkeypatch):
    """Killed after step 3, and a save of step 4 was torn: factors and metrics are the same."""
    config = dataclasses.replace(finished, output=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run.train, "train_step", dies_at(4))
        with pytest.raises(Killed):
            run.fine_tune(config)
    (torn := config.output / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    (torn / "state").mkdir()
    first = json.loads((config.output / "checkpoints" / "2" / "run" / "metadata").read_text())
    run.fine_tune(config)
    assert lines(config.output) == lines(finished.output)
    assert saved(config.output) == saved(finished.output)
    last = json.loads((config.output / "checkpoints" / "5" / "run" / "metadata").read_text())
    assert first == last  # the name of the run, too


def settings_words(base: Path) -> list[str]:
    return [
        f"model={base}", "task=sudoku", "examples=12", "length=96", "batch=4", "recipe.steps=12",
        "recipe.learning_rate=1e-2", "save_every=2", "log_every=1", "lora.rank=4",
        "lora.dropout=0.1", "lora.base=int8",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    cache = str(jax.config.jax_compilation_cache_dir)
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": root}


@pytest.mark.slow
def test_kills_in_the_middle_of_a_save(base, tmp_path):
    """kill -9 whenever a checkpoint is being written: the run still ends in the same bits."""
    words = [sys.executable, "-m", "jdllm.sft", *settings_words(base), "mesh=1x1"]

    def start(output: Path) -> subprocess.Popen[bytes]:
        quiet = subprocess.DEVNULL
        return subprocess.Popen(
            [*words, f"output={output}"], env=environment(), stdout=quiet, stderr=quiet
        )

    whole, output, torn = tmp_path / "whole", tmp_path / "run", 0
    assert start(whole).wait(300) == 0
    for _ in range(4):
        process = start(output)
        partial = set[Path]()
        while process.poll() is None and not partial:
            time.sleep(0.0005)
            partial = set((output / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        process.send_signal(signal.SIGKILL)
        process.wait()
        torn += any(path.exists() for path in partial)
    assert torn > 0
    assert start(output).wait(300) == 0
    assert lines(output) == lines(whole)
    assert saved(output) == saved(whole)


@pytest.mark.slow
def test_a_changed_run_is_refused_by_name(finished, base, tmp_path):
    def changed(**settings: Any) -> str:
        lora = dataclasses.replace(LORA, **settings)
        return refusal(dataclasses.replace(finished, lora=lora))

    assert "lora.targets=q (there q,v,down)" in changed(targets="q")
    assert "lora.rank=8 (there 4)" in changed(rank=8)
    config = dataclasses.replace(finished, output=tmp_path / "run", model=str(tmp_path / "base"))
    write_base(tmp_path / "base", seed=0)
    run.fine_tune(config)
    (config.output / "adapter").rename(tmp_path / "away")
    (tmp_path / "base").rename(tmp_path / "other")
    write_base(tmp_path / "base", seed=1)
    assert re.search(r"was trained with base=\w+, and now it is \w+; resume", refusal(config))


def test_wrong_settings_are_refused_before_anything_is_written(base, tmp_path):
    def asked(**own: Any) -> str:
        return refusal(settings(base, tmp_path / "run", lora=LoraConfig(**own)))

    assert "'qq' matches no module of this model" in asked(rank=4, targets="qq")
    assert "lora.rank=33 exceeds the width of layers.0.attention.q, which is 32" in asked(rank=33)
    message = refusal(settings(base, tmp_path / "run", mesh="1x4"))
    assert "of size 2 cannot be split over the 4 devices" in message
    with pytest.raises(ValueError, match="first add it to its base"):
        settings(base, tmp_path / "run", lora=LoraConfig(), adapter=tmp_path)
    assert not (tmp_path / "run" / "config.json").exists()


def test_training_goes_on_from_an_adapter(finished, base, tmp_path):
    adapter = finished.output / "adapter"
    mesh = sharding.parse_mesh("1x1")
    subject = load_subject(settings(base, tmp_path / "run", adapter=adapter), mesh)
    stored = adapters.read_factors(adapter, CONFIG)
    near(subject.trained, stored, 0.0)
    other = settings(base, tmp_path / "run", adapter=adapter, lora=LoraConfig(rank=4))
    with pytest.raises(ValueError, match="has 3 modules of rank .4., but lora.targets"):
        load_subject(other, mesh)
    other = dataclasses.replace(other, lora=dataclasses.replace(LORA, alpha=1.0))
    with pytest.raises(ValueError, match="scales its factors by 2.0, but lora.alpha gives 0.25"):
        load_subject(other, mesh)


def test_an_int8_base_trains_and_stays_as_it_is(base, tmp_path):
    config = settings(base, tmp_path / "run", lora=dataclasses.replace(LORA, base="int8"))
    subject = load_subject(config, sharding.parse_mesh("1x1"))
    kinds = {name: type(leaf.get_value()).__name__ for name, leaf in named(subject.frozen).items()}
    assert kinds["layers.0.attention.qkv"] == "Quantised" and kinds["embedding"] != "Quantised"
    run.fine_tune(config)
    losses = [row["loss"] for row in lines(config.output)]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        ("1x2", 2),
        pytest.param("2x1", 1, marks=pytest.mark.slow),
        pytest.param("2x2", 1, marks=pytest.mark.slow),
        pytest.param("1x1", 4, marks=pytest.mark.slow),
    ],
)
def test_the_curve_is_the_same_on_every_machine(finished, tmp_path, mesh, accumulation):
    """Dropout belongs to the examples, as their noise does, wherever and with whom they run."""
    config = dataclasses.replace(
        finished, output=tmp_path / "run", mesh=mesh, accumulation=accumulation, remat="layers"
    )
    run.fine_tune(config)
    one, many = ([row["loss"] for row in lines(c.output)] for c in (finished, config))
    np.testing.assert_allclose(one, many, rtol=2e-5)


@pytest.mark.slow
def test_two_processes_train_the_same_factors(base, tmp_path):
    """Factors that are split over processes are gathered into one adapter."""
    words = settings_words(base)
    for name, mesh, launcher in (
        ("one", "1x1", []),
        ("two", "1x2", ["-m", "jdllm.launch", "processes=2", "devices=1"]),
    ):
        module = ["jdllm.sft"] if launcher else ["-m", "jdllm.sft"]
        command = [sys.executable, *launcher, *module, *words, f"mesh={mesh}"]
        own = environment() | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
        done = subprocess.run(
            [*command, f"output={tmp_path / name}"], env=own, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / n / "adapter" / adapters.WEIGHTS) for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, atol=2e-5)


def test_a_model_folder_still_loads(base):
    """The hint for adapters must not touch whole models."""
    assert load_model(str(base), sharding.parse_mesh("1x1")).adapter is None
