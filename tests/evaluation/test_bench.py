"""The benchmark entry point: what it asks, grades, counts and writes."""

import json
from pathlib import Path

import pytest

from jdllm.evaluation import bench, grid
from jdllm.runtime import cli

ROWS = [
    {"question": "1 + 1?", "answer": "2", "choices": "", "source": "gsm8k"},
    {"question": "Which?", "answer": "1", "choices": '["a", "b"]', "source": "mmlu"},
    {"question": "Who?", "answer": "Baron of Holberg", "source": "longbench_hotpotqa"},
    {"question": "2 + 2?", "answer": "1,004", "source": "gsm8k"},
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "enable_compilation_cache", lambda: None)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_questions(dataset: Path):
    every = bench.read_questions(bench.BenchConfig(dataset=dataset))
    assert [q.source for q in every] == [row["source"] for row in ROWS]
    assert "0. a\n1. b" in every[1].prompt and "{0}" in every[1].prompt
    assert every[0].right("so it is {2}") and every[0].right("#### 2") and not every[0].right("3")
    assert every[2].right("The answer is baron of holberg.")
    assert every[3].right("{1004}") and every[3].right("7, then 1,004")
    math = bench.read_questions(
        bench.BenchConfig(dataset=dataset, source="gsm8k", skip_sample=1, num_samples=5)
    )
    assert [q.prompt.split("?")[0] for q in math] == ["2 + 2"]
    with pytest.raises(ValueError, match="no question of source=math500"):
        bench.read_questions(bench.BenchConfig(dataset=dataset, source="math500"))


def test_open_lengths_are_the_models_own():
    config = bench.BenchConfig()
    assert config.lengths(40) == {"max_tokens": 40, "block_length": 8, "denoising_steps": 8}
    assert config.lengths(128) == {"max_tokens": 128, "block_length": 32, "denoising_steps": 32}
    assert {way.gen_length for way in config.settings(40).values()} == {40}
    found = bench.read_questions(bench.BenchConfig(num_samples=3, seed=5))
    assert [question.source for question in found] == ["sudoku", "sudoku", "countdown"]


def test_a_broken_line_of_a_dataset_is_named(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROWS[0]) + "\n[]\n")
    with pytest.raises(ValueError, match="line 2 is no object with question"):
        bench.read_questions(bench.BenchConfig(dataset=tmp_path / "bad.jsonl"))


def test_blockinfers_keys_and_sums(capsys: pytest.CaptureFixture):
    words = ["num_samples=3", "max_tokens=64", "denoising_steps=4", "mesh=1x1", "ignore_eos=false"]
    bench.main(cli.parse(bench.BenchConfig, words))
    facts = json.loads(Path("benchmark_results.json").read_text())
    keys = {"total_time", "total_tokens", "throughput", "avg_latency", "num_prompts", "accuracy",
            "correct", "total"}  # fmt: skip
    ours, vanilla = facts["blockinfer"], facts["vanilla_llada"]
    for row in (ours, vanilla):
        assert keys < set(row) and row["num_prompts"] == row["total"] == 3
        assert row["throughput"] == pytest.approx(row["total_tokens"] / row["total_time"])
        assert row["accuracy"] == pytest.approx(100 * row["correct"] / 3)
        assert 0 < row["total_tokens"] < 3 * 64, "columns behind the end were counted"
    assert ours["calls"] <= 8 and vanilla["calls"] > ours["calls"]
    assert facts["comparison"] == {
        "throughput_speedup": ours["throughput"] / vanilla["throughput"],
        "time_speedup": vanilla["total_time"] / ours["total_time"],
        "accuracy_diff": ours["accuracy"] - vanilla["accuracy"],
    }
    assert "latency p50, s" in capsys.readouterr().out


@pytest.mark.slow
def test_grid_imposes_its_schedule():
    words = ["blocks=8,16", "batches=2", "caches=none,dual", "tokens_per_step=4", "repeats=1"]
    words += ["model=random:tiny", "gen_length=16", "mesh=1x1", "output=grid.jsonl"]
    for _ in range(2):
        grid.main(cli.parse(grid.GridConfig, words))
    rows = [json.loads(line) for line in Path("grid.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["cache"] for row in rows} == {"none", "dual"}
    assert {row["calls"] for row in rows} == {4}
    assert all(row["calls_per_second"] > 0 and row["model"] == "random:tiny" for row in rows)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["source=gsm8k"], "needs dataset="),
        (["max_tokens=100", "block_length=32"], "must divide"),
        (["denoising_steps=64"], "one block"),
        (["dataset=absent.jsonl"], "not a file"),
        (["cache=paged"], "cache=paged"),
        (["num_samples=0"], "num_samples=0 must be 1 or more"),
    ],
)
def test_mistakes_are_found_at_once(words: list[str], part: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        cli.parse(bench.BenchConfig, words)
    assert part in capsys.readouterr().err


def test_grid_mistakes(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        cli.parse(grid.GridConfig, ["batches=1,x"])
    assert "batches=1,x" in capsys.readouterr().err


@pytest.mark.slow
def test_a_profile_is_written_and_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["num_samples=1", "max_tokens=16", "skip_vanilla=true", "mesh=1x1", "profile=trace"]
    bench.main(cli.parse(bench.BenchConfig, words))
    facts = json.loads(Path("benchmark_results.json").read_text())["profile"]
    assert 0 < facts["busy"] <= 1 and 0 < len(facts["kernels"]) <= 10
    assert list(Path("trace").rglob("*.xplane.pb"))
    assert "device busy" in capsys.readouterr().out
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="profile=file is a file"):
        bench.BenchConfig(profile=Path("file"))
