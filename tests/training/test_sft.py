"""python -m jdllm.sft end to end on a tiny model: inputs, outputs, refusals, and kills.

Killed and uninterrupted runs are subprocesses under the same environment, and must agree in every
bit: the loss curve as text, and the final weights.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jdllm.load import BUNDLED, load_model
from jdllm.model.config import NAMED
from jdllm.runtime import cli, files, sharding, signals
from jdllm.runtime.launch import free_port
from jdllm.store import checkpoint
from jdllm.tokenizer import copy_tokenizer, load_tokenizer
from jdllm.train.optimiser import Recipe
from jdllm.training import prepare, run
from jdllm.training.config import SFTConfig
from jdllm.training.metrics import Metrics

CONFIG = dataclasses.replace(
    NAMED["bundled"],
    layers=1, embed=64, heads=2, kv_heads=2, head_dim=32, mlp=96, max_length=128, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A converted folder with random weights and the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with files.atomic_folder(folder) as partial:
        model = checkpoint.random_model(CONFIG, sharding.parse_mesh("1x1"))
        checkpoint.save_model(partial, model)
        copy_tokenizer(BUNDLED, partial)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [{"prompt": f"{k}+{k}", "response": str(2 * k)} for k in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tiny: Path, output: Path, **changes) -> SFTConfig:
    base: dict[str, Any] = dict(
        output=output, model=str(tiny), task=None if "data" in changes else "sudoku", examples=20,
        length=96, batch=4, recipe=Recipe(steps=4, learning_rate=1e-3), mesh="1x1", save_every=3,
        log_every=1,
    )  # fmt: skip
    return SFTConfig(**base | changes)


def lines(output: Path) -> list[dict]:
    """metrics.jsonl without the times."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def refusal(config: SFTConfig) -> str:
    """The one sentence that `config` is refused with."""
    with pytest.raises((ValueError, OSError)) as caught:
        run.fine_tune(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Runs


@pytest.mark.parametrize("kind", ["jsonl", "txt", "task"])
def test_a_run_leaves_metrics_checkpoints_and_a_model(tiny, tmp_path, chats, kind, capsys):
    text = tmp_path / "book.txt"
    text.write_text("".join(map(str, range(400))))
    source = {"jsonl": {"data": str(chats)}, "txt": {"data": str(text)}, "task": {}}[kind]
    config = settings(tiny, tmp_path / "run", **source)
    run.fine_tune(config)
    rows = lines(config.output)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(set(row) == {"step", "loss", "nll", "gradient_norm", "tokens"} for row in rows)
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    saved = sorted(int(p.name) for p in (config.output / "checkpoints").iterdir())
    assert saved == [3, 4]
    params = load_model(str(config.output / "model"), sharding.parse_mesh("1x1"))
    assert dataclasses.replace(params.config, dtype="float32") == CONFIG
    assert checkpoint.read_config(config.output / "model").dtype == "bfloat16"
    start = load_model(str(tiny), sharding.parse_mesh("1x1"))
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True)
    assert all((a.astype("float32") != b).any() for a, b in pairs if a.ndim > 1)
    assert load_tokenizer(config.output / "model") is not None
    captured = capsys.readouterr()
    assert "examples" in captured.err and f"wrote {config.output / 'model'}" in captured.err
    assert "4/4" in captured.err  # the bar


def test_a_finished_run_is_left_alone(tiny, tmp_path, capsys):
    config = settings(tiny, tmp_path / "run")
    run.fine_tune(config)

    def files() -> dict[Path, int]:
        found = (p for p in config.output.rglob("*") if p.is_file() and p.name != "lock")
        return {p: p.stat().st_mtime_ns for p in found}

    before = files()
    run.fine_tune(config)
    assert "this run is finished, nothing to do" in capsys.readouterr().err
    assert files() == before
    longer = dataclasses.replace(config.recipe, steps=5)
    message = refusal(dataclasses.replace(config, recipe=longer))
    assert "recipe.steps=5 (there 4)" in message and "name another output" in message
    assert "length=90 (there 96)" in refusal(dataclasses.replace(config, length=90))
    run.fine_tune(dataclasses.replace(config, save_every=50, log_every=7))  # these two may change


def test_a_run_whose_model_was_not_written_writes_it(tiny, tmp_path, capsys):
    config = settings(tiny, tmp_path / "run")
    run.fine_tune(config)
    (config.output / "model").rename(tmp_path / "first")
    rows = lines(config.output)
    run.fine_tune(config)
    assert "resumed at step 4" in capsys.readouterr().err
    assert lines(config.output) == rows
    same_weights(tmp_path / "first", config.output / "model")


def same_weights(first: Path, second: Path) -> None:
    mesh = sharding.parse_mesh("1x1")
    pair = [load_model(str(folder), mesh) for folder in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, *pair)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "accumulation"), [("2x2", 2), ("2x1", 1), ("1x2", 4)])
def test_a_mesh_trains_alike(tiny, tmp_path, mesh, accumulation):
    """Devices and micro-batches make no difference but of rounding: to 1e-4 of each loss."""
    alone = settings(tiny, tmp_path / "one", response_length=32)
    spread = dataclasses.replace(
        alone, output=tmp_path / "many", mesh=mesh, accumulation=accumulation
    )
    for config in (alone, spread):
        run.fine_tune(config)
    one, many = (np.array([row["loss"] for row in lines(c.output)]) for c in (alone, spread))
    np.testing.assert_allclose(one, many, rtol=1e-4)


# Metrics


def test_metrics_are_repaired_and_cut_back(tmp_path):
    """A torn last line goes, and so do lines after the checkpoint, which will be written again."""
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": k, "time": 0.0, "loss": k / 3}) for k in range(1, 6)]
    path.write_text("\n".join(whole) + '\n{"step": 6, "time": 0.0, "lo')
    metrics = Metrics(path, every=1, start=10)
    with metrics.file:
        assert path.read_text().splitlines() == whole
        metrics.add(6, {"loss": jnp.float32(jnp.nan)})
        assert path.read_text().splitlines() == whole  # one line late
        metrics.flush()
        metrics.flush()
    assert json.loads(path.read_text().splitlines()[-1])["loss"] is None
    assert len(path.read_text().splitlines()) == 6
    Metrics(path, every=1, start=3).file.close()
    assert path.read_text().splitlines() == whole[:3]


def test_metrics_are_on_disk_before_their_checkpoint(tiny, tmp_path, monkeypatch):
    """A run resumes after the checkpoint, so a line that is still in memory then would be lost."""
    config = settings(tiny, tmp_path / "run", log_every=2)
    save, seen = ocp.CheckpointManager.save, {}

    def watched(self, step, *args, **kwargs):
        seen[step] = [row["step"] for row in lines(config.output)]
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", watched)
    run.fine_tune(config)
    assert seen == {3: [2], 4: [2, 4]}


# Refusals


def test_inputs_are_refused_in_one_sentence(tiny, tmp_path, chats):
    out = tmp_path / "run"
    assert "there is no such file" in refusal(settings(tiny, out, data=str(tmp_path / "no.jsonl")))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text() + '{"prompt": "a"\n')
    assert "line 31: not valid JSON" in refusal(settings(tiny, out, data=str(bad)))
    message = refusal(settings(tmp_path / "nothing", out))
    assert "nothing is neither a folder nor a Hugging Face id" in message
    assert "there is no such shape" in refusal(
        settings(tiny, out, model="random:nope", tokenizer="bundled")
    )
    assert "add tokenizer=bundled" in refusal(settings(tiny, out, model="random:bundled"))
    assert "exceeds the model's 128" in refusal(settings(tiny, out, length=129))
    message = refusal(settings(tiny, out, mesh="4x1", accumulation=2))
    assert "2 rows (batch / accumulation) cannot be split over 4 devices" in message
    assert "needs 9000 devices" in refusal(settings(tiny, out, mesh="9000x1"))
    assert not (out / "config.json").exists()  # none of them blocks the right command
    (out / "config.json").write_text(CONFIG.to_json())
    assert "is not of a training run" in refusal(settings(tiny, out))


def test_a_refusal_is_status_1_without_traceback(tmp_path, monkeypatch, capsys):
    words = [f"output={tmp_path}", f"model={tmp_path / 'nothing'}", "task=sudoku", "mesh=1x1"]
    monkeypatch.setattr(sys, "argv", ["sft", *words])
    with pytest.raises(SystemExit) as caught:
        cli.run(run.fine_tune, SFTConfig, "sft")
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ") and "Traceback" not in said


def test_a_forced_kernel_reaches_the_run(tiny, tmp_path, capsys):
    """An unknown one is refused when it is parsed, one that does not serve when it is asked."""
    words = [f"output={tmp_path}", f"model={tiny}", "task=sudoku", "mesh=1x1", "examples=4"]
    words += ["length=64", "batch=2", "recipe.steps=1"]
    with pytest.raises(SystemExit) as caught:
        cli.parse(SFTConfig, [*words, "kernel=nonsense"], prog="sft")
    assert caught.value.code == 2 and "kernel=nonsense must be auto" in capsys.readouterr().err
    with pytest.raises(ValueError, match="kernel=attention:xla does not serve attention"):
        run.fine_tune(cli.parse(SFTConfig, [*words, "kernel=attention:xla"], prog="sft"))


def test_other_training_text_is_refused(tiny, tmp_path, chats):
    """The same file name with other content must not continue a run."""
    path = tmp_path / "a.jsonl"
    path.write_text(chats.read_text())
    stamp = path.stat()
    config = settings(tiny, tmp_path / "run", data=str(path))
    run.fine_tune(config)
    (config.output / "model").rename(tmp_path / "away")
    path.write_text(chats.read_text().replace('"4"', '"5"'))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert f"the text of {path} is not what it was" in refusal(config)


def test_cache_follows_content_tokenizer_and_length(tiny, tmp_path, chats):
    path, folder = tmp_path / "a.jsonl", tmp_path / "tokenizer"
    path.write_text(chats.read_text())
    folder.mkdir()
    copy_tokenizer(BUNDLED, folder)
    config = settings(tiny, tmp_path / "run", data=str(path))
    cache = config.output / "cache"

    def count(config=config, model=CONFIG) -> int:
        prepare.load_texts(config, model, folder, config.sources)
        return len(list(cache.iterdir()))

    assert count() == count() == 1
    path.touch()
    assert count() == 1
    assert count(dataclasses.replace(config, length=80)) == 2
    assert count(dataclasses.replace(config, response_length=8)) == 3
    path.write_text(path.read_text() + "\n")
    assert count() == 4
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    facts["chat_template"] = "{{ messages[0]['content'] }}="
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    assert count() == 5
    assert count(model=dataclasses.replace(CONFIG, stop_ids=(1,))) == 6


def test_two_runs_do_not_share_an_output(tiny, tmp_path):
    config = settings(tiny, tmp_path / "run")
    with files.alone(config.output):
        assert "another run is writing to" in refusal(config)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ([], "exactly one source"),
        (["task=sudoku", "data=a.txt"], "exactly one source"),
        (["task=sudokuu"], "did you mean"),
        (["task=sudoku", "batch=8", "accumulation=3"], "accumulation=3 must divide batch=8"),
        (["task=sudoku", "accumulation=0"], "accumulation=0 must be at least 1"),
        (["task=sudoku", "log_every=0"], "log_every=0 must be at least 1"),
        (["task=sudoku", "response_length=0"], "response_length=0 must be at least 1"),
        (["task=sudoku", "seed=-1"], "seed=-1"),
        (["task=sudoku", "save_dtype=int8"], "save_dtype=int8 must be one of"),
        (["task=sudoku", "dtype=int8"], "dtype=int8 must be one of"),
        (["task=sudoku", "recipe.schedule=flat"], "schedule=flat must be one of"),
    ],
)
def test_words_that_cannot_be_are_status_2(words, rule, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(SFTConfig, ["output=x", *words], prog="sft")
    assert caught.value.code == 2
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).replace("\u2502", " ").split())
    assert rule in text and "Traceback" not in text


# Kills


def test_an_interrupt_says_how_to_go_on(tiny, tmp_path, monkeypatch, capsys):
    """SIGTERM in the third step, then in the last: each is saved, and the curve is what it was."""
    whole = settings(tiny, tmp_path / "whole")
    run.fine_tune(whole)
    config = dataclasses.replace(whole, output=tmp_path / "run")
    step = run.train.train_step

    def interrupted(state, *args, **kwargs):
        if state.step == interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *args, **kwargs)

    assert "goes on from the last checkpoint" in config.going_on
    with monkeypatch.context() as patch:
        patch.setattr(run.train, "train_step", interrupted)
        for interrupt in (2, 3):
            with pytest.raises(signals.Interrupted, match="SIGTERM"):
                run.fine_tune(config)
            assert "saving after this step" in capsys.readouterr().err
            assert [row["step"] for row in lines(config.output)] == [*range(1, interrupt + 2)]
            assert not (config.output / "model").exists()
    run.fine_tune(config)
    assert "resumed at step 4" in capsys.readouterr().err
    assert lines(config.output) == lines(whole.output)
    same_weights(config.output / "model", whole.output / "model")


STEPS = 60


def command(tiny: Path, output: Path) -> list[str]:
    return [
        sys.executable, "-m", "jdllm.sft", f"output={output}", f"model={tiny}", "task=sudoku",
        "examples=30", "length=96", "batch=4", "accumulation=2", f"recipe.steps={STEPS}",
        "recipe.learning_rate=1e-3", "recipe.warmup=5", "recipe.schedule=cosine", "mesh=1x1",
        "save_every=7", "log_every=1",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    cache = str(jax.config.jax_compilation_cache_dir)
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": root}


def finish(words: list[str]) -> str:
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def start_and_kill(words: list[str], output: Path, lines_seen: int, delay: float) -> bool:
    """Kills the run `delay` seconds after metrics.jsonl has that many lines; False if it was over.

    A resumed run replaces the file when it starts to train; the old one does not count.
    """
    path, deadline = output / "metrics.jsonl", time.monotonic() + 120
    old = path.stat().st_ino if path.exists() else None
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and time.monotonic() < deadline:
        fresh = path.exists() and path.stat().st_ino != old
        if fresh and path.read_bytes().count(b"\n") >= lines_seen:
            time.sleep(delay)
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    finish(command(tiny, output))
    assert [row["step"] for row in lines(output)] == list(range(1, STEPS + 1))
    return output


def same_run(output: Path, uninterrupted: Path) -> None:
    """Every metric of every line and every weight agree in every bit; nothing partial is left.

    A kill while Orbax removes an old checkpoint may leave that one behind.
    """
    assert lines(output) == lines(uninterrupted)
    same_weights(output / "model", uninterrupted / "model")
    assert not list(output.rglob("*partial*"))
    saved = sorted(int(p.name) for p in (output / "checkpoints").iterdir())
    assert saved[-2:] == [STEPS - STEPS % 7, STEPS]


def test_a_killed_run_repeats_itself_bit_for_bit(tiny, tmp_path, uninterrupted):
    output = tmp_path / "run"
    words = command(tiny, output)
    assert start_and_kill(words, output, 24, 0.0)
    assert not (output / "model").exists()
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "ti')  # a line that the kill tore
    assert "resumed at step" in finish(words)
    same_run(output, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_several_kills_at_random_moments(tiny, tmp_path, uninterrupted, seed):
    """From before the first line to after the last, wherever that falls."""
    output, rng = tmp_path / "run", random.Random(seed)
    words = command(tiny, output)
    for _ in range(5):
        if not start_and_kill(words, output, rng.randrange(STEPS), rng.uniform(0, 0.4)):
            break
    finish(words)
    same_run(output, uninterrupted)


@pytest.mark.slow
def test_kills_around_a_save(tiny, tmp_path, uninterrupted):
    """Right at a save step, later by a few milliseconds each time, and while model/ is written."""
    output = tmp_path / "run"
    words = command(tiny, output)
    for attempt, delay in enumerate((0.0, 0.005, 0.01, 0.02, 0.04, 0.08), 1):
        if not start_and_kill(words, output, 7 * attempt, delay):
            break
    start_and_kill(words, output, STEPS, 0.05)
    finish(words)
    same_run(output, uninterrupted)


# Several processes

DIES = """
import os, signal, time
from pathlib import Path
import jax
from jdllm.runtime import cli
from jdllm.training import run
from jdllm.training.config import SFTConfig

step = run.train.train_step

def dying(state, *args, **kwargs):
    if jax.process_index() == int(os.environ["VICTIM"]) and state.step == int(os.environ["STEP"]):
        time.sleep(float(os.environ["DELAY"]))
        Path(__file__).with_name("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(state, *args, **kwargs)

run.train.train_step = dying
cli.run(run.fine_tune, SFTConfig, "dies")
"""


def spread_words(tiny: Path, output: Path, mesh: str) -> list[str]:
    """24 steps, float32 weights in the end."""
    return [
        f"output={output}", f"model={tiny}", "task=sudoku", "examples=30", "length=96", "batch=8",
        "accumulation=2", "recipe.steps=24", "recipe.learning_rate=1e-3", f"mesh={mesh}",
        "save_every=5", "log_every=1", "save_dtype=float32",
    ]  # fmt: skip


def several(
    devices: int, folder: Path, victim: int = 9, step: int = 12, delay: float = 0.0
) -> dict[str, str]:
    """The environment of processes that see so many devices each; of the module `dies` one dies."""
    (folder / "dies.py").write_text(DIES)
    return environment() | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # without the devices of these tests
        "PYTHONPATH": os.pathsep.join([str(folder), environment()["PYTHONPATH"]]),
        "VICTIM": str(victim), "STEP": str(step), "DELAY": str(delay),
    }  # fmt: skip


def launch(
    words: list[str], devices: int, folder: Path, module: str = "jdllm.sft", **loss: Any
) -> subprocess.CompletedProcess[str]:
    """Two processes of so many devices each."""
    own = ["-m", "jdllm.launch", "processes=2", f"devices={devices}"]
    return subprocess.run(
        [sys.executable, *own, module, *words],
        env=several(devices, folder, **loss), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def seconds_since_loss(folder: Path) -> float:
    return time.time() - (folder / "died").stat().st_mtime


def close_run(output: Path, expected: Path) -> None:
    """Losses to 1e-5 of each, weights to 1e-4 (an update changes them by up to 1e-3)."""
    steps, others = lines(output), lines(expected)
    assert [row["step"] for row in steps] == [row["step"] for row in others] != []
    for name in ("loss", "nll", "gradient_norm"):
        ours, theirs = ([row[name] for row in rows] for rows in (steps, others))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    mesh = sharding.parse_mesh("1x1")
    pair = [load_model(str(folder / "model"), mesh) for folder in (output, expected)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *pair)
    assert not list(output.rglob("*partial*"))


@pytest.mark.slow
def test_two_processes_train_as_one_and_survive_a_loss(tiny, tmp_path):
    """Process 1 is killed in the middle and named; the same command comes to the same end."""
    words = spread_words(tiny, tmp_path / "two", "2x2")
    lost = launch(words, 2, tmp_path, "dies", victim=1)
    assert seconds_since_loss(tmp_path) < 60
    assert lost.returncode == 128 + signal.SIGKILL, lost.stderr
    assert "process 1 of 2 was lost (signal 9); ended the others" in lost.stderr
    assert "2 processes x 2 devices, mesh data=2 x model=2" in lost.stderr
    assert not (tmp_path / "two" / "model").exists()
    again = launch(words, 2, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resumed at step" in again.stderr and again.stderr.count("wrote") == 1
    run.fine_tune(cli.parse(SFTConfig, spread_words(tiny, tmp_path / "one", "2x2"), prog="sft"))
    close_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["4x2", "1x8"])
def test_processes_change_places_with_one(tiny, tmp_path, mesh):
    """2 x 4 devices lose process 0; one process with 8 goes on, or two again: the same end."""
    if mesh == "1x8":
        wide = dataclasses.replace(CONFIG, heads=8, kv_heads=8, head_dim=8)
        tiny = tmp_path / "wide"
        with files.atomic_folder(tiny) as partial:
            model = checkpoint.random_model(wide, sharding.parse_mesh("1x1"))
            checkpoint.save_model(partial, model)
            copy_tokenizer(BUNDLED, partial)
    words = {name: spread_words(tiny, tmp_path / name, mesh) for name in ("one", "two")}
    lost = launch(words["two"], 4, tmp_path, "dies", victim=0)
    assert "process 0 of 2 was lost (signal 9)" in lost.stderr
    assert "2 processes x 4 devices" in lost.stderr
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    env = several(8, tmp_path)
    one = [sys.executable, "-m", "jdllm.sft", *words["one"]]
    done = subprocess.run(one, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1 process x 8 devices" in done.stderr and "resumed at step" in done.stderr
    again = launch(words["two"], 4, tmp_path)
    assert again.returncode == 0, again.stderr
    run.fine_tune(cli.parse(SFTConfig, spread_words(tiny, tmp_path / "whole", mesh), prog="sft"))
    for name in ("one", "two"):
        close_run(tmp_path / name, tmp_path / "whole")


@pytest.mark.slow
def test_without_the_launcher_jax_ends_those_that_are_left(tiny, tmp_path):
    """Its own abort, within a minute of the loss; it says which process stopped."""
    words, port = spread_words(tiny, tmp_path / "two", "2x2"), free_port()
    started = []
    for process in (0, 1):
        place = {
            "JDLLM_COORDINATOR": f"localhost:{port}",
            "JDLLM_NUM_PROCESSES": "2",
            "JDLLM_PROCESS_ID": str(process),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "dies", *words],
                env=several(2, tmp_path, victim=1) | place,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    said = started[0].communicate(timeout=300)[1]
    assert started[1].wait(10) == -signal.SIGKILL
    started[1].communicate()
    assert seconds_since_loss(tmp_path) < 60
    assert started[0].returncode != 0
    assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2])
def test_a_loss_during_a_save(tiny, tmp_path, delay):
    """Killed so many seconds into the save of step 10: that checkpoint is complete or not there."""
    words = spread_words(tiny, tmp_path / "two", "2x2")
    lost = launch(words, 2, tmp_path, "dies", victim=1, step=10, delay=delay)
    assert "process 1 of 2 was lost (signal 9)" in lost.stderr
    again = launch(words, 2, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resumed at step 5\n" in again.stderr or "resumed at step 10\n" in again.stderr
    run.fine_tune(cli.parse(SFTConfig, spread_words(tiny, tmp_path / "one", "2x2"), prog="sft"))
    close_run(tmp_path / "two", tmp_path / "one")
