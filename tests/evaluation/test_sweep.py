"""Sweeps and tuning: plans, fronts and areas, resuming, the report, settings in files."""

import csv
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from jdllm.decode import Credit, DecodeConfig, Edit
from jdllm.evaluation import estimate, report, run, sweeps, tuning
from jdllm.evaluation.config import EvalConfig
from jdllm.evaluation.pareto import aup, front
from jdllm.evaluation.plans import BUILT_IN, read_plan
from jdllm.evaluation.report import mark_front
from jdllm.evaluation.settings import label, read_decode, write_decode
from jdllm.llm import LLM
from jdllm.load import BUNDLED
from jdllm.model.config import NAMED
from jdllm.runtime import cli, sharding
from jdllm.store.checkpoint import random_model, save_model
from jdllm.tokenizer import copy_tokenizer
from tests.support import tiny

PLAN = """
models: [bundled]
tasks: [sudoku, countdown]
settings:
  - {rule: quota, steps: 10, cache: none}
grid:
  threshold: [0.9, 0.5]
  cache: [dual]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for module in (run, sweeps, tuning):
        monkeypatch.setattr(module, "enable_compilation_cache", lambda: None)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


def test_front_against_brute_force():
    spots = [
        (1.0, 80.0),
        (2.0, 80.0),
        (2.0, 79.0),
        (3.0, 70.0),
        (4.0, 75.0),
        (4.0, 75.0),
        (5.0, 9.0),
    ]

    def beaten(a: tuple, b: tuple) -> bool:
        return a != b and b[0] >= a[0] and b[1] >= a[1]

    wanted = {a for a in spots if not any(beaten(a, b) for b in spots)}
    found = [spots[i] for i in front(spots)]
    assert found == sorted(wanted) and front([]) == []
    rows = [{"task": "t", "model": "m", "tokens_per_forward": r, "accuracy": y} for r, y in spots]
    assert [bool(row["front"]) for row in mark_front(rows)] == [spot in wanted for spot in spots]


def test_aup_by_hand():
    assert aup([(1.0, 70.0)], 70.0) == 70
    assert aup([(3.0, 70.0), (1.0, 70.0)], 70.0) == pytest.approx(210)
    weight = math.exp(-3 * (1 - 68 / 80))
    wanted = 70 + 2 * (68 * weight + 70 * math.exp(-3 * (1 - 70 / 80))) / 2
    assert aup([(1.0, 70.0), (3.0, 68.0), (9.0, 64.9)], 80.0) == pytest.approx(wanted)
    assert aup([], 70.0) == aup([(1.0, 0.0)], 0.0) == 0


def test_error_bars_of_certain_accuracies_reach_somewhere():
    row = {"accuracy": 100.0, "stderr": 0.0, "n": 99}
    assert report.bar(row) == (pytest.approx(1.0), 0.0)  # z^2 / (n + z^2), z = 1
    assert report.bar(row | {"accuracy": 0.0}) == (0.0, pytest.approx(1.0))
    assert report.bar(row | {"accuracy": 50.0, "stderr": 5.0}) == (5.0, 5.0)
    assert report.bar(row | {"accuracy": 50.0, "stderr": None}) == (0.0, 0.0)


def test_a_dry_run_of_a_sweep_runs_nothing(plan: Path, monkeypatch, capsys):
    monkeypatch.setattr(LLM, "load", lambda *a: 1 / 0)
    monkeypatch.setattr(estimate, "memory", lambda config, model, work: f"{work.columns} columns")
    words = [f"plan={plan}", "limit=2", "mesh=1x1", "output=out", "dry_run=true"]
    sweeps.main(cli.parse(sweeps.SweepConfig, words))
    out = capsys.readouterr().out
    assert not Path("out").exists() and "columns" in out
    rows = [line for line in out.splitlines() if line.startswith(("sudoku", "countdown"))]
    assert len(rows) == 6 and "rule=quota steps=10 cache=none" in rows[0]
    assert all(row.split()[-3:-1] == ["2", "2"] for row in rows)


def test_built_in_plans():
    dllmexp = read_plan("dllmexp")
    runs = list(itertools.product(dllmexp.models, dllmexp.tasks, dllmexp.settings))
    assert len(runs) == 48
    assert [one.steps for one in dllmexp.settings] == [512, 256, 8 * 22]
    assert {(one.gen_length, one.block_length) for one in dllmexp.settings} == {(512, 64)}
    assert len(read_plan("bundled").settings) == 12
    for name in BUILT_IN:
        for one in read_plan(name).settings:
            one.resolve()  # lengths divide


def test_dllmexp_runs_as_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every task loads offline; what is missing is said before a model is loaded."""
    data = tiny.write(tmp_path / "data", [])
    words = ["plan=dllmexp", f"data={data}", "limit=1", "mesh=1x1"]
    loads: list[tuple] = []

    def load(*arguments):
        loads.append(arguments)
        raise InterruptedError

    monkeypatch.setattr(LLM, "load", load)
    with pytest.raises(ValueError, match="task humaneval .* pass confirm_run_unsafe_code=true"):
        sweeps.main(cli.parse(sweeps.SweepConfig, words))
    assert not loads
    config = cli.parse(sweeps.SweepConfig, [*words, "confirm_run_unsafe_code=true"])
    assert len(config.runs()) == 48 and all(r.confirm_run_unsafe_code for r in config.runs())
    with pytest.raises(InterruptedError):
        sweeps.main(config)
    assert [model for model, *_ in loads] == ["Dream-org/Dream-v0-Instruct-7B"]


@pytest.mark.slow
def test_dllmexp_to_its_end(tmp_path: Path):
    """All of its tasks and settings on a small random model."""
    data, model = tiny.write(tmp_path / "data", []), tmp_path / "model"
    config = dataclasses.replace(
        NAMED["bundled"],
        layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=32, dtype="float32",
        max_length=4096,
    )  # fmt: skip
    save_model(model, random_model(config, sharding.parse_mesh("1x1")))
    copy_tokenizer(BUNDLED, model)
    words = [f"data={data}", f"model={model}", "limit=1", "mesh=1x1", "output=out"]
    words += ["plan=dllmexp", "confirm_run_unsafe_code=true"]
    sweeps.main(cli.parse(sweeps.SweepConfig, words))
    with open("out/table.csv") as file:
        rows = list(csv.DictReader(file))
    calls = np.array([float(row["nfe"]) for row in rows]).reshape(4, 3)  # tasks, settings
    # Random weights end some answers early; no setting makes more calls than its steps.
    assert calls.max(axis=0).tolist() == [512, 256, 176] and (calls > 0).all()


@pytest.mark.parametrize(
    ("config", "asking"),
    [
        (EvalConfig, ["decode.preset=apd"]),
        (sweeps.SweepConfig, ["plan=plan.json"]),
        (tuning.TuneConfig, ["plan=plan.json"]),
    ],
)
def test_a_verifier_and_its_rule_come_together(config: type, asking: list[str], capsys):
    settings = [{"rule": "verify", "block_length": 0}, {"rule": "quota"}]
    Path("plan.json").write_text(json.dumps({"tasks": ["sudoku"], "settings": settings}))
    for words, part in ((asking, "verifier=FOLDER"), (["verifier=judge"], "rule=verify alone")):
        with pytest.raises(SystemExit):
            cli.parse(config, words)
        assert part in capsys.readouterr().err
    assert cli.parse(config, [*asking, "verifier=judge"]).verifier == "judge"


def test_a_sweep_asks_the_verifier_where_its_rule_does(monkeypatch: pytest.MonkeyPatch):
    settings = [{"rule": "quota"}, {"rule": "verify", "block_length": 0}]
    Path("plan.json").write_text(json.dumps({"tasks": ["sudoku"], "settings": settings}))
    config = cli.parse(sweeps.SweepConfig, ["plan=plan.json", "verifier=judge", "limit=1"])
    assert [run.verifier for run in config.runs()] == [None, "judge"]
    loads: list[tuple] = []
    monkeypatch.setattr(LLM, "load", lambda *a: loads.append(a) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sweeps.main(config)
    assert loads == [("bundled", "auto", "auto", 0, "judge", (), "auto", None)]


def test_a_plan_file(plan: Path):
    found = read_plan(str(plan))
    assert found.tasks == ("sudoku", "countdown")
    assert found.settings == (
        DecodeConfig(rule="quota", steps=10, cache="none"),
        DecodeConfig(threshold=0.9, cache="dual"),
        DecodeConfig(threshold=0.5, cache="dual"),
    )
    other = plan.with_suffix(".json")
    other.write_text(json.dumps({"tasks": ["sudoku"], "settings": [{}]}))
    assert read_plan(str(other)).models == ("bundled",)
    plan.write_text(
        "tasks: [sudoku]\nsettings: [{edit: {threshold: 0, passes: 3}, block_lengths: [4, 8]}]\n"
        "grid: {credit.alpha: [0.5, 0.7], edge: [slack]}\n"
    )
    assert read_plan(str(plan)).settings == (
        DecodeConfig(edit=Edit(0, 3), block_lengths=(4, 8)),
        DecodeConfig(credit=Credit(0.5), edge="slack"),
        DecodeConfig(credit=Credit(0.7), edge="slack"),
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("tasks: [sudoku]", "at least one of each"),
        ("tasks: [sudoku]\nsettings: [{treshold: 1}]", "threshold"),
        ("tasks: [sudoku]\nsettings: [{edit: {treshold: 1}}]", "try edit.threshold"),
        (
            "tasks: [sudoku]\nsettings: [{edit_threshold: 0}]",
            "edit_threshold is edit.threshold now",
        ),
        ("tasks: [sudoku]\nsettings: [{}, {}]", "twice"),
        ("tasks: [sudokku]\nsettings: [{}]", "did you mean sudoku"),
        ("tasks: [sudoku]\nsettings: [{threshold: 2}]", "threshold=2"),
        ("task: [sudoku]", "must be an object with"),
        ("tasks: [", "cannot be read"),
    ],
)
def test_plan_mistakes_are_found_at_once(text: str, part: str, tmp_path: Path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit):
        cli.parse(sweeps.SweepConfig, ["plan=bad.yaml"])
    assert part in capsys.readouterr().err
    with pytest.raises(ValueError, match="neither a file nor one of bundled"):
        read_plan("absent")


def test_a_sweep_its_report_and_going_on(plan: Path, tmp_path: Path, monkeypatch, capsys):
    words = [f"plan={plan}", "limit=2", "mesh=1x1", "output=out"]
    loads, generated = [], []
    load, stream = LLM.load, LLM.stream

    def counted(self, prompts, *rest, **named):
        generated.append(len(prompts))
        if len(generated) == 4 and len(loads) == 1:
            raise KeyboardInterrupt
        return stream(self, prompts, *rest, **named)

    monkeypatch.setattr(LLM, "load", lambda *a: loads.append(a) or load(*a))
    monkeypatch.setattr(LLM, "stream", counted)
    config = cli.parse(sweeps.SweepConfig, words)
    with pytest.raises(KeyboardInterrupt):
        sweeps.main(config)
    assert not Path("out/table.md").exists()
    sweeps.main(config)
    assert len(loads) == 2 and sum(generated) == 2 * 4 + 2 * 3 - 2 + 2  # the interrupted one twice
    with open("out/table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["setting"]) for row in rows] == [
        (task, label(one))
        for task in ("sudoku", "countdown")
        for one in read_plan(str(plan)).settings
    ]
    assert all(row["n"] == "2" and 0 <= float(row["accuracy"]) <= 100 for row in rows)
    table = Path("out/table.md").read_text()
    assert (
        table.count("| bundled |") == 6 + 2 and "AUP" in table and table in capsys.readouterr().out
    )
    page = Path("out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and page.count("<tr") >= 6
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must stand alone"
    assert f"python -m jdllm.sweep mesh=1x1 limit=2 plan={plan} output=out" in page
    for name in ("sudoku.png", "countdown.png"):
        assert Path("out", name).read_bytes().startswith(b"\x89PNG")
    before = Path("out/finished.jsonl").read_bytes()
    generated.clear()
    sweeps.main(config)
    assert sum(generated) == 0 and Path("out/finished.jsonl").read_bytes() == before


def test_the_pick_keeps_within_the_bound():
    rows = [
        {"accuracy": a, "tokens_per_second": t, "tokens_per_forward": f}
        for a, t, f in ((80.0, 10, 1), (79.5, 50, 2), (79.4, 90, 9), (81.0, 40, 5))
    ]
    assert tuning.pick(rows, 0.5, "tokens_per_second") == 1
    assert tuning.pick(rows, 0.5, "tokens_per_forward") == 3
    assert tuning.pick(rows, 0.6, "tokens_per_second") == 2
    assert tuning.pick(rows[:1], 0.0, "tokens_per_second") == 0


def test_tuned_settings_are_read_back(plan: Path, capsys: pytest.CaptureFixture):
    words = [f"plan={plan}", "limit=2", "mesh=1x1", "task=countdown", "max_drop=100"]
    tuning.main(cli.parse(tuning.TuneConfig, [*words, "by=tokens_per_forward"]))
    facts = json.loads(Path("tuned/table.json").read_text())
    chosen = read_decode(Path("tuned.json"))
    best = max(facts["rows"], key=lambda row: row["tokens_per_forward"])
    assert facts["rows"][facts["chosen"]]["tokens_per_forward"] == best["tokens_per_forward"]
    assert (chosen.gen_length, chosen.block_length) == (40, 40) and chosen.rule == "threshold"
    assert "wrote tuned.json" in capsys.readouterr().err
    config = cli.parse(EvalConfig, ["decode_file=tuned.json"])
    assert config.settings == chosen
    changed = cli.parse(EvalConfig, ["decode_file=tuned.json", "decode.threshold=0.3"])
    assert changed.settings.threshold == 0.3 and changed.settings.gen_length == 40
    seeds = {run.seed for run in cli.parse(tuning.TuneConfig, words).runs()}
    assert seeds == {tuning.VALIDATION_SEED}, "not the documents that eval draws"


@pytest.mark.parametrize(
    ("text", "part"), [(None, "cannot be read"), ("{", "not JSON"), ('{"a": 1}', "no decode")]
)
def test_broken_decode_files(text: str | None, part: str, capsys: pytest.CaptureFixture):
    if text is not None:
        Path("given.json").write_text(text)
    with pytest.raises(SystemExit):
        cli.parse(EvalConfig, ["decode_file=given.json"])
    assert part in capsys.readouterr().err


def test_settings_survive_a_file(tmp_path: Path):
    config = DecodeConfig(rule="quota", steps=8, temperature=0.5, gen_length=16, cache="prefix")
    write_decode(tmp_path / "one.json", config)
    assert read_decode(tmp_path / "one.json") == config
    assert label(config) == "rule=quota steps=8 cache=prefix temperature=0.5"
    nested = DecodeConfig.named("llada2.1-speed", block_length=8)
    write_decode(tmp_path / "two.json", nested)
    assert read_decode(tmp_path / "two.json") == nested
    more = read_decode(tmp_path / "two.json", DecodeConfig(edit=Edit(passes=3, threshold=0.5)))
    assert more.edit == Edit(0.5, 3) and more.threshold == nested.threshold
    assert label(DecodeConfig(edit=Edit(0.0))) == "edit.threshold=0.0"


def test_without_a_plot_library_tables_are_written(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    row = dict.fromkeys(report.COLUMNS, 1.0) | {"task": "t", "model": "m", "setting": "s"}
    names = report.write_report(tmp_path, [row], {"command": "c"})
    assert sorted(names) == ["report.html", "table.csv", "table.md"]
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    loads: list[tuple] = []
    monkeypatch.setattr(LLM, "load", lambda *a: loads.append(a) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it starts
        sweeps.main(sweeps.SweepConfig(limit=1))
    assert loads
