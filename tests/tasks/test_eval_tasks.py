"""The evaluation command on tasks of every kind, with a small random model and made-up files."""

import dataclasses
import json
from pathlib import Path

import pytest

from jdllm.evaluation import run as evaluation
from jdllm.evaluation.config import EvalConfig
from jdllm.runtime import cli
from jdllm.score.scoring import Likelihood, certainty
from jdllm.tasks.graders import code
from jdllm.tasks.published_rows import PRESETS
from tests.support import tiny
from tests.support.tiny_models import write_small

WORDS = ["decode.gen_length=8", "decode.block_length=4", "mesh=1x1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("model"), 64, max_length=4096)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("data"), ["anatomy", "astronomy"])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JDLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(evaluation, "enable_compilation_cache", lambda: None)


def run(output: Path, *words: str) -> tuple[dict, list[dict]]:
    evaluation.main(cli.parse(EvalConfig, [f"output={output}", *words]))
    rows = (output / "samples.jsonl").read_text().splitlines()
    return json.loads((output / "results.json").read_text()), [json.loads(row) for row in rows]


def test_generated_scored_and_programmed_tasks_in_one_run(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    names = "gsm8k,mmlu_sample_likelihood,mbpp_instruct,countdown"
    words = [f"model={model}", f"data={data}", f"task={names}", "limit=1", "samples=2", *WORDS]
    words += ["confirm_run_unsafe_code=true", "shots=1", "decode.temperature=0.5"]
    results, rows = run(tmp_path / "out", *words)
    assert list(results["tasks"]) == names.split(",")
    assert set(results["tasks"]["gsm8k"]["metrics"]) == {
        "exact_match,strict-match", "exact_match,flexible-extract",
    }  # fmt: skip
    assert "pass@2,extracted" in results["tasks"]["mbpp_instruct"]["metrics"]
    assert results["tasks"]["mmlu_sample_likelihood"]["metrics"].keys() == {"acc"}
    assert [(r["task"], r["sample"]) for r in rows] == [
        ("gsm8k", 0), ("gsm8k", 1), ("mmlu_sample_likelihood", 0),
        ("mbpp_instruct", 0), ("mbpp_instruct", 1), ("countdown", 0), ("countdown", 1),
    ]  # fmt: skip
    prefixed = next(row["prompt"] for row in rows if row["task"] == "mbpp_instruct")
    assert prefixed.endswith("```python")  # the answer's beginning stays open
    out = capsys.readouterr().out
    assert "exact_match,flexible-extract " in out
    where = code.described()
    assert results["tasks"]["mbpp_instruct"]["sandbox"] == where
    assert f"mbpp_instruct: programs ran in {where}" in out
    assert "sandbox" not in results["tasks"]["gsm8k"]
    again, _ = run(tmp_path / "out", *words)
    assert again["tasks"]["gsm8k"]["metrics"] == results["tasks"]["gsm8k"]["metrics"]


def test_a_preset_is_printed_with_both_numbers_and_gives_way(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    published = PRESETS["d1-sudoku-128"].published
    words = ["preset=d1-sudoku-128", f"model={model}", f"data={data}", "mesh=1x1"]
    results, _ = run(
        tmp_path, *words, "decode.rule=quota", "decode.steps=2", "decode.gen_length=64"
    )
    decode = results["config"]["decode"]
    assert (decode["rule"], decode["steps"], decode["gen_length"]) == ("quota", 2, 64)
    out = "".join(capsys.readouterr())
    assert "measured   not yet" in out and f"published  {published:.2f} %" in out
    here = f"but here   model={model} decode.gen_length=64 decode.steps=2\n"
    assert out.count(here) == 2
    assert results["preset"]["published"] == published
    assert results["preset"]["departures"] == here.split()[2:]
    assert f"measured   {100 * results['tasks']['sudoku_d1']['metrics']['d1_cells']:.1f}" in out


def test_what_is_given_beside_a_preset_wins_be_it_the_default():
    words = ["preset=d1-sudoku-128", "task=sudoku", "chat=None", "decode.rule=threshold"]
    config = cli.parse(EvalConfig, [*words, "decode.steps=None"])
    assert (config.task, config.chat, config.decode.rule) == ("sudoku", None, "threshold")
    assert config.decode.steps is None and config.decode.gen_length == 128
    assert {"task=sudoku", "chat=None", "decode.steps=None"} < set(config.departures)
    named = cli.parse(
        EvalConfig, [*words[:2], "decode.preset=llada-1.5-mbpp"] + ["decode.steps=None"]
    )
    assert named.decode.gen_length == 512 and named.preset == "d1-sudoku-128"


def test_a_preset_fixes_how_likelihoods_are_estimated(
    model: Path, data: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
):
    row = dataclasses.replace(
        PRESETS["llada-base-mmlu"], likelihood={"mc_num": 4, "mc_batch": 2, "cfg_scale": 0.5},
        task="mmlu_sample_likelihood", shots=None,
    )  # fmt: skip
    monkeypatch.setitem(PRESETS, "row", row)
    monkeypatch.setitem(EvalConfig.presets, "row", row.settings)
    words = ["preset=row", f"model={model}", f"data={data}", "mesh=1x1", "limit=1"]
    results, (sample,) = run(tmp_path, *words, "likelihood.mc_num=2")
    used = results["config"]["likelihood"]
    assert (used["mc_num"], used["mc_batch"], used["cfg_scale"]) == (2, 2, 0.5)
    found = results["tasks"]["mmlu_sample_likelihood"]["likelihoods"]
    assert found.pop("seconds") > 0
    exact = {"n": 4, "stderr_mean": 0.0, "stderr_max": 0.0, "calls": 4}  # one token each
    assert found == exact and sample["nfe"] == 4 and sample["seconds"] > 0
    assert [choice["text"] for choice in sample["choices"]] == [" A", " B", " C", " D"]
    assert sample["answer"] == max(sample["choices"], key=lambda one: one["value"])["text"]
    out = "".join(capsys.readouterr())
    assert out.count(f"but here   model={model} limit=1 likelihood.mc_num=2\n") == 2
    assert "4 likelihoods in 4 model evaluations of a row and" in out
    assert "the standard error of an estimate is 0.000 nats" in out


def test_estimates_without_a_known_error_do_not_count_in_its_mean():
    scored = [Likelihood(-1.0, error, False, 2, 0.5) for error in (0.1, None, 0.3)]
    cost = {"calls": 6, "seconds": 1.5}
    assert certainty(scored) == {
        "n": 3, "stderr_mean": pytest.approx(0.2), "stderr_max": 0.3,
    } | cost  # fmt: skip
    cost = {"calls": 2, "seconds": 0.5}
    assert certainty(scored[1:2]) == {"n": 1, "stderr_mean": None, "stderr_max": None} | cost
    assert certainty([]) == {}


def test_programs_are_refused_before_the_model_is_loaded(data: Path):
    config = EvalConfig(task="humaneval", model="random:none", data=data)
    with pytest.raises(ValueError, match="confirm_run_unsafe_code=true"):
        evaluation.main(config)
