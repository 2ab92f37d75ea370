"""What watches a run: loggers, held-out losses, samples, the curve. And presets."""

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdllm.load import BUNDLED
from jdllm.model.config import NAMED
from jdllm.runtime import cli, files, sharding
from jdllm.runtime.fields import nested
from jdllm.store import checkpoint
from jdllm.tokenizer import copy_tokenizer
from jdllm.train.objective import OBJECTIVES
from jdllm.train.optimiser import Recipe
from jdllm.training import metrics, run
from jdllm.training.config import SFTConfig
from jdllm.training.presets import NOTES, PRESETS, REFUSED

CONFIG = dataclasses.replace(
    NAMED["bundled"],
    layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=32, max_length=192, dtype="float32",
)  # fmt: skip


def write_model(folder: Path, **facts: Any) -> Path:
    """A converted folder with random weights and the bundled tokenizer."""
    with files.atomic_folder(folder) as partial:
        config = dataclasses.replace(CONFIG, **facts)
        checkpoint.save_model(partial, checkpoint.random_model(config, sharding.parse_mesh("1x1")))
        copy_tokenizer(BUNDLED, partial)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Ten questions, and some conversations of several turns."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows: list[Any] = [{"prompt": f"{k}+{k}", "response": str(2 * k)} for k in range(10)]
    turns = [("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4")]
    rows += [{"messages": [{"role": r, "content": c} for r, c in turns]}] * 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tiny: Path, output: Path, **changes: Any) -> SFTConfig:
    base: dict[str, Any] = dict(
        output=output, model=str(tiny), length=64, batch=4, log_every=1, save_every=2, mesh="1x1",
        recipe=Recipe(steps=4, learning_rate=1e-3),
    )  # fmt: skip
    return SFTConfig(**base | changes)


def lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def stopped(config: SFTConfig, step: int, monkeypatch) -> None:
    """Runs until the step of that number fails, as after a kill."""
    train_step = run.train.train_step

    def failing(state, *args, **kwargs):
        if state.step == step:
            raise RuntimeError("power cut")
        return train_step(state, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run.train, "train_step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            run.fine_tune(config)


@pytest.mark.slow
def test_all_that_watches_goes_on_after_a_kill(tiny, tmp_path, chats, monkeypatch):
    """A mixture of packed rows, held-out losses, samples and a logger: as if nothing happened."""
    calls: list[tuple[Any, ...]] = []
    wandb = types.SimpleNamespace(
        init=lambda **words: calls.append(("init", words["id"], words["resume"])),
        log=lambda values, step: calls.append(("log", step, sorted(values))),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    text = tmp_path / "book.txt"
    text.write_text("".join(map(str, range(100))))
    whole = settings(
        tiny, tmp_path / "whole", data=f"{chats}:3,{text}:1", packing=True, accumulation=2,
        eval_data=str(chats), eval_every=3, sample_prompt="1+1", sample_every=2, logger="wandb",
    )  # fmt: skip
    run.fine_tune(whole)
    assert [call[0] for call in calls] == ["init", *["log"] * 7, "finish"]
    assert calls[1] == ("log", 0, calls[1][2]) and "eval_nll_0.5" in calls[1][2]
    broken = dataclasses.replace(whole, output=tmp_path / "broken")
    calls.clear()
    stopped(broken, 3, monkeypatch)
    run.fine_tune(broken)
    begun = [call for call in calls if call[0] == "init"]
    assert len(begun) == 2 and begun[0][1] == begun[1][1] and begun[0][2] == "allow"
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(whole.output / name) == lines(broken.output / name)
    found = lines(whole.output / "metrics.jsonl")
    held_out = [row for row in found if "eval_nll" in row]
    assert [row["step"] for row in held_out] == [0, 3, 4]
    levels = [held_out[0][f"eval_nll_{level}"] for level in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert held_out[0]["eval_nll"] == pytest.approx(np.mean(levels))
    samples = lines(whole.output / "samples.jsonl")
    assert [row["step"] for row in samples] == [0, 2, 4]
    assert all(row["prompt"] == "1+1" for row in samples)
    assert (whole.output / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_goes_on_with_other_micro_batches(tiny, tmp_path, chats, monkeypatch):
    """To 1e-4 of each loss; not where micro-batches have divisors of their own."""
    whole = settings(tiny, tmp_path / "whole", data=str(chats))
    run.fine_tune(whole)
    broken = dataclasses.replace(whole, output=tmp_path / "broken")
    stopped(broken, 2, monkeypatch)
    run.fine_tune(dataclasses.replace(broken, accumulation=4))
    one, two = (lines(config.output / "metrics.jsonl") for config in (whole, broken))
    for name in ("loss", "nll", "gradient_norm"):
        np.testing.assert_allclose([a[name] for a in one], [b[name] for b in two], rtol=1e-4)
    micro = dataclasses.replace(whole, output=tmp_path / "micro", normalise="micro")
    stopped(micro, 2, monkeypatch)
    assert "accumulation=2 (there 1)" in refusal(dataclasses.replace(micro, accumulation=2))


@pytest.mark.parametrize(
    ("facts", "objective"),
    [
        ({"block_causal": 16}, "llada2"),
        pytest.param({"shift_logits": True}, "dream", marks=pytest.mark.slow),
    ],
)
def test_families_train_by_their_own_objective(tmp_path, chats, facts, objective):
    model = write_model(tmp_path / "model", **facts)
    config = settings(model, tmp_path / "run", data=str(chats), recipe=Recipe(steps=2))
    assert config.objective_of(checkpoint.read_config(model)) == OBJECTIVES[objective]
    run.fine_tune(config)
    found = lines(config.output / "metrics.jsonl")
    assert len(found) == 2 and all(np.isfinite(list(row.values())).all() for row in found)


def test_epochs_stand_for_steps(tiny, tmp_path, chats):
    config = settings(tiny, tmp_path / "run", data=str(chats), epochs=2, recipe=Recipe(steps=1))
    run.fine_tune(config)
    assert lines(config.output / "metrics.jsonl")[-1]["step"] == 2 * (13 // 4)
    run.fine_tune(config)  # the same command finds a finished run


@pytest.mark.slow
def test_grouped_batches_have_widths_of_their_own(tiny, tmp_path, chats):
    config = settings(tiny, tmp_path / "run", data=str(chats), group_by_length=True)
    run.fine_tune(config)
    tokens = {row["tokens"] for row in lines(config.output / "metrics.jsonl")}
    assert tokens < {4 * width for width in range(8, 65, 8)} and max(tokens) <= 256


def refusal(config: SFTConfig) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        run.fine_tune(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_changed_text_is_refused_by_name(tiny, tmp_path, chats, monkeypatch):
    own = tmp_path / "own.jsonl"
    own.write_text(chats.read_text())
    config = settings(tiny, tmp_path / "run", data=f"{chats},{own}")
    stopped(config, 2, monkeypatch)
    own.write_text(chats.read_text().replace('"8"', '"9"'))
    assert f"the text of {own} is not what it was;" in refusal(config)
    assert str(chats) not in refusal(config).split(";")[0]


def test_misfits_are_refused_in_one_sentence(tiny, tmp_path, chats):
    out = tmp_path / "run"
    own = tmp_path / "a.jsonl"
    own.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    assert "line 1: messages need an assistant turn" in refusal(settings(tiny, out, data=str(own)))
    message = refusal(settings(tiny, out, data=str(chats), length=8))
    assert "chats.jsonl: no example has room" in message and "within length=8" in message
    message = refusal(settings(tiny, out, data=str(chats), objective="llada2"))
    assert "objective=llada2 needs a model that attends block by block" in message
    message = refusal(settings(tiny, out, data=str(chats), padding="rainbow:700"))
    assert "padding=rainbow:700 needs 700 ids" in message
    message = refusal(settings(tiny, out, data=str(chats), eval_data=str(tmp_path / "no.txt")))
    assert "no.txt: there is no such file" in message


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["task=sudoku", "objective=draem"], "objective=draem is unknown; did you mean dream?"),
        (["task=sudoku", "loss.low=0.9", "loss.high=0.2"], "must rise within"),
        (["task=sudoku", "padding=bos"], "padding=bos must be eos, none or rainbow:K"),
        (["task=sudoku", "packing=true", "group_by_length=true"], "leave packing off"),
        (["task=sudoku", "epochs=0"], "epochs=0 must be at least 1"),
        (["data=a.jsonl:1,b.jsonl"], "give each a share, or none"),
        (["task=sudoku", "eval_data=a.csv"], "eval_data=a.csv must end in"),
        (["preset=edit-lada"], "did you mean edit-llada"),
    ],
)
def test_words_that_cannot_be_are_status_2(words, rule, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(SFTConfig, ["output=x", *words], prog="sft")
    assert caught.value.code == 2
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).replace("\u2502", " ").split())
    assert rule in text and "Traceback" not in text


# Loggers


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match=r"needs the package trackio: pip install"):
        metrics.Wandb("trackio", Path(), "run", {})


def test_tensorboard_writes_beside_the_file(tmp_path, monkeypatch):
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(Path(folder))

        def add_scalar(self, *values):
            calls.append(values)

        def close(self):
            calls.append("closed")

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    with metrics.logging("tensorboard", tmp_path, "abc", {}) as logger:
        made = metrics.Metrics(tmp_path / "metrics.jsonl", 1, 0, logger=logger)
        with made.file:
            made.write(3, 0.0, {"loss": 0.5})
    assert calls == [tmp_path / "tensorboard" / "abc", ("loss", 0.5, 3), "closed"]
    with metrics.logging("none", tmp_path, "abc", {}) as logger:
        assert logger is None


def test_the_rate_is_of_the_steps_between_two_lines(tmp_path):
    made = metrics.Metrics(tmp_path / "metrics.jsonl", 2, 0)
    with made.file:
        for step, now in ((2, 10.0), (4, 12.0)):
            made.pending = (step, now, {"loss": np.float32(1), "tokens": np.float32(300)})  # pyright: ignore[reportAttributeAccessIssue]
            made.flush()
        assert made.rate == 300 and made.shown()["tokens/s"] == "300"
        made.pause()  # a held-out loss, say
        made.pending = (6, 99.0, {"loss": np.float32(1), "tokens": np.float32(300)})  # pyright: ignore[reportAttributeAccessIssue]
        made.flush()
    assert made.rate == 300


# Presets


def known_settings() -> set[str]:
    return {p + f.name for p, kind in nested(SFTConfig) for f in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse(name):
    words = ["output=x", f"preset={name}"]
    words += ["data=own.jsonl"] * ("data" not in PRESETS[name])
    config = cli.parse(SFTConfig, words, prog="sft")
    assert config.preset == name and set(PRESETS[name]) <= known_settings()
    assert set(NOTES) == set(PRESETS)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_presets_say_why(name, capsys):
    assert name not in PRESETS
    with pytest.raises(SystemExit) as caught:
        cli.parse(SFTConfig, ["output=x", f"preset={name}"], prog="sft")
    assert caught.value.code == 2
    assert f"sft has no preset={name}: {REFUSED[name]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "base", "sees"),
    [
        ("a2d", "qwen2.5-0.5b", (None, False)),
        ("a2d-blocks", "qwen2.5-0.5b", (32, False)),
        ("fastdllm2", "qwen2.5-0.5b", (32, True)),
        ("d1-sdsft", "llada-8b", (None, False)),
    ],
)
def test_presets_fit_their_models(name, base, sees):
    words = ["output=x", f"preset={name}"]
    config = cli.parse(SFTConfig, words + ["data=own.jsonl"] * ("data" not in PRESETS[name]), "sft")
    model = config.adapt.applied(NAMED[base])
    assert (model.block_causal, model.shift_logits) == sees
    objective, fast = config.objective_of(model), name == "fastdllm2"
    block = 32 if fast else 1
    assert objective == dataclasses.replace(OBJECTIVES[config.objective], block=block)
    assert objective.complementary == fast


def test_the_edit_preset_is_its_recipe():
    config = cli.parse(SFTConfig, ["output=x", "preset=edit-llada"], prog="sft")
    assert config.objective_of(NAMED["llada-8b"]) == OBJECTIVES["llada"]
    assert (config.lora.rank, config.lora.scale_alpha, config.lora.dropout) == (128, 256, 0.05)
    assert config.normalise == "micro" and config.batch == config.accumulation == 8
    assert (config.length, config.epochs, config.recipe.optimizer) == (4096, 2, "adamw_hf")
    other = cli.parse(SFTConfig, ["output=x", "preset=edit-llada", "length=2048"], prog="sft")
    assert other == dataclasses.replace(config, length=2048)
