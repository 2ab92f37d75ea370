"""plan=edit: its lines, the paired comparison, the oracle, the report, and EDIT's own folders."""

import csv
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdllm.decode import DecodeConfig
from jdllm.decode.aims import MAPS
from jdllm.evaluation import edit_folder, exit_sweep, exits, held_out, run, sweeps
from jdllm.evaluation.oracle import answers, settled
from jdllm.evaluation.paired import compare, mcnemar, percentile, weigh
from jdllm.evaluation.results import Sample, TaskResult
from jdllm.evaluation.speed import Speed
from jdllm.runtime import cli
from jdllm.store.dynamics import write_dynamics
from jdllm.viz.trace import Record
from tests.support.tiny_models import write_small

GOLDENS = Path(os.environ.get("JDLLM_GOLDENS", "nowhere")) / "graders"


def test_paired_verdicts_by_hand():
    full = [True] * 6 + [False] * 4
    rule = [True] * 4 + [False] * 2 + [True] + [False] * 3
    found = compare(rule, full)
    assert found.difference == pytest.approx(-0.1) and found.gained == 1
    assert found.lost == pytest.approx(2 / 6)
    assert found.stderr == pytest.approx(np.std([0] * 7 + [-1, -1, 1]) / np.sqrt(10))
    assert found.p_value == 1.0  # two against one
    assert compare(full, full)[:4] == (0.0, 0.0, 1.0, 0.0)


def test_mcnemars_test_is_a_fair_coin():
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(8, 1) == mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 512)


def test_percentiles_are_numpys():
    values = [5, 1, 9, 4, 4, 7]
    for percent in (0, 10, 50, 90, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_the_oracle_stops_where_the_verdict_stays():
    assert settled([False, True, False, True, True]) == 4
    assert settled([True, True]) == 1
    assert settled([True, False]) == 2  # wrong in the end: all calls


def test_the_oracle_fills_what_a_call_had_in_view():
    tokens = np.array([[7, 9, 9, 9], [7, 3, 9, 9], [7, 3, 4, 9]])
    looks = np.zeros((2, 2), np.float32)
    record = Record(tokens, np.array([[1, 2], [1, 2]]), np.array([[3, 5], [6, 4]]), looks, looks,
                    prompt_length=1, mask_id=9)  # fmt: skip
    assert [x.tolist() for x in answers(record, 3)] == [[3, 5, 9], [3, 4, 9]]


def test_edit_compares_every_map_under_both_schedules(tmp_path: Path):
    """All lines are settings that can be run; the schedule of a pair is the same."""
    write_dynamics(tmp_path, {"mean": {"layers.0.attention.q": np.ones((2, 1))}},
                   {"windows": ["mean"]})  # fmt: skip
    found = exits.entries("countdown", 256, tmp_path)
    assert {one.schedule for one in found} == set(exits.SCHEDULES)
    for schedule in exits.SCHEDULES:
        own = [one for one in found if one.schedule == schedule]
        assert [one.rule for one in own[:2]] == [exits.FULL, exits.LAST_MASK]
        maps = [one.map for one in own if one.rule == "code"]
        assert maps == ["mean", "weights", "shuffled", "gaussian"]  # windows that are there
        assert {one.decode.gaussian for one in own} == {own[0].decode.gaussian}
        assert all(one.decode.resolve().block_lengths == (64, 192) for one in own)
    code = next(one for one in found if one.rule == "code")
    assert code.decode.exit.threshold == (0.05, 0.55) and code.decode.exit.patience == (6, 12)
    bare = exits.entries("countdown", 256, None)
    assert not {"code", "paper"} & {one.rule for one in bare} and len(MAPS) == 7
    assert "are left out" in exits.described(None) and "late" in exits.described(tmp_path)


def test_edit_rules_are_chosen_by_pattern(tmp_path: Path):
    found = exits.entries("sudoku", 40, None, "prophet,step-*")
    assert {one.rule for one in found} == {
        "full", "last-mask", "prophet", *(f"step-{share:g}" for share in exits.FIXED),
    }  # fmt: skip
    with pytest.raises(ValueError, match="rules=code matches no rule.*adapter=FOLDER"):
        exits.entries("sudoku", 40, None, "code")
    with pytest.raises(ValueError, match="has no dynamics.npz"):
        exits.entries("sudoku", 40, tmp_path)


def test_edit_sweep_of_a_small_model(tmp_path: Path, monkeypatch, capsys):
    """Full decoding and leaving with the last mask agree in every text; all is kept and shown."""
    for module in (run, sweeps):
        monkeypatch.setattr(module, "enable_compilation_cache", lambda: None)
    model = write_small(tmp_path / "model", 32)
    words = ["plan=edit", f"model={model}", "task=sudoku", "lengths=16", "rules=step-0.375",
             "limit=2", f"output={tmp_path / 'out'}"]  # fmt: skip
    kept = []
    monkeypatch.setattr(exit_sweep, "Line", lambda *a: kept.append(Line(*a)) or kept[-1])
    sweeps.main(cli.parse(sweeps.SweepConfig, words))
    texts = defaultdict(set)
    for line in kept:
        if line.entry.rule in (exits.FULL, exits.LAST_MASK):
            texts[line.entry.schedule].add(tuple(s.completion for s in line.result.samples))
    assert [len(own) for own in texts.values()] == [1, 1]
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["rule"] for row in rows] == ["full", "last-mask", "step-0.375"] * 2 + ["oracle"] * 2
    full, last, early = rows[:3]
    assert float(full["steps"]) == 8 > float(last["steps"]) >= float(early["steps"])
    assert float(early["exited"]) == 100 and float(last["exited"]) == 0
    assert "McNemar" in capsys.readouterr().out and not early["fixed"]
    done = len((tmp_path / "out" / "finished.jsonl").read_text().splitlines())
    sweeps.main(cli.parse(sweeps.SweepConfig, words))  # nothing is left to do
    assert len((tmp_path / "out" / "finished.jsonl").read_text().splitlines()) == done


@pytest.mark.slow
def test_edit_sweep_chooses_thresholds_on_the_other_half(tmp_path: Path, monkeypatch):
    for module in (run, sweeps):
        monkeypatch.setattr(module, "enable_compilation_cache", lambda: None)
    model = write_small(tmp_path / "model", 32)
    words = ["plan=edit", f"model={model}", "task=sudoku", "lengths=16", "rules=sched", "limit=3",
             "scales=0.001,1000", f"output={tmp_path / 'out'}"]  # fmt: skip
    sweeps.main(cli.parse(sweeps.SweepConfig, words))
    rows, tried = (
        list(csv.DictReader((tmp_path / "out" / name).read_text().splitlines()))
        for name in ("table.csv", "tried.csv")
    )
    own = [row for row in rows if row["rule"] == "sched"]
    assert [(row["n"], row["scale"]) for row in own] == [("1", "0.001")] * 2  # it costs nothing
    assert [row["n"] for row in tried if row["rule"] == "sched"] == ["2"] * 4
    assert all(float(row["steps"]) == 1 and row["above"] == "0.0" for row in own)


Line = exit_sweep.Line


def test_a_mixture_of_two_ways_by_hand():
    rule = [True, True, False, True]
    low, high = [True, False, False, False], [True, True, False, False]
    found = weigh(rule, [(low, 0.75), (high, 0.25)])
    assert found.accuracy == pytest.approx(0.25 + 0.25 / 4)
    gaps = np.array([0, 0.75, 0, 1])
    assert found.difference == pytest.approx(gaps.mean())
    assert found.stderr == pytest.approx(gaps.std() / 2)
    assert found.p_value == compare(rule, low).p_value
    assert weigh(rule, [(low, 0.0), (high, 1.0)]).p_value == compare(rule, high).p_value


def test_edit_multiplies_the_threshold_of_each_rule(tmp_path: Path):
    write_dynamics(tmp_path, {"mean": {"layers.0.attention.q": np.ones((2, 1))}},
                   {"windows": ["mean"]})  # fmt: skip
    found = exits.entries("countdown", 256, tmp_path, "code,unchanged,klass,step-0.5", "mean",
                          "gaussian", (0.5, 2.0), 32)  # fmt: skip
    own = found
    assert [(one.rule, one.map, one.scale) for one in own] == [
        ("full", "", 1.0), ("last-mask", "", 1.0), ("code", "mean", 0.5), ("code", "mean", 2.0),
        ("step-0.5", "", 1.0), ("unchanged", "", 0.5), ("unchanged", "", 2.0),
        ("klass", "", 0.5), ("klass", "", 2.0),
    ]  # fmt: skip
    assert [one.decode.exit.threshold for one in own[2:4]] == [(0.025, 0.275), (0.1, 1.1)]
    assert [one.decode.exit.threshold for one in own[5:7]] == [(0.025,), (0.1,)]
    assert [one.decode.klass.kl for one in own[7:]] == [0.0075, 0.03]
    assert all(one.decode.resolve().block_length == 32 for one in own)
    with pytest.raises(ValueError, match="schedules=even matches no schedule; there are gaussian"):
        exits.entries("countdown", 256, tmp_path, schedules="even")
    with pytest.raises(ValueError, match="maps=late matches no map; there are mean, weights"):
        exits.entries("countdown", 256, tmp_path, "", "late")


def line_of(
    rule: str, verdicts: list[int], calls: list[list[int]], scale: float = 1.0, **settings: Any
) -> exit_sweep.Line:
    """A line of made-up samples; words with two underscores are settings with dots."""
    settings = {name.replace("__", "."): value for name, value in settings.items()}
    samples = [
        Sample("sudoku", i, 0, "", "", "", {"solved": float(ok)}, sum(own), 1, 0.0, calls=own)
        for i, (ok, own) in enumerate(zip(verdicts, calls, strict=True))
    ]
    result = TaskResult("sudoku", "solved", {"solved": 0.0}, {"solved": 0.0}, samples, Speed(), {})
    entry = exits.Entry(rule, "", "gaussian", DecodeConfig.of(settings), scale)
    return Line("sudoku", 16, entry, result)


def test_the_threshold_with_the_fewest_steps_within_the_slack_is_chosen():
    full = line_of("full", [1, 1, 1, 1], [[8]] * 4)
    loses = line_of("entropy", [1, 0, 1, 1], [[2]] * 4, scale=4.0)
    quick = line_of("entropy", [1, 1, 1, 1], [[5]] * 4, scale=2.0)
    slow = line_of("entropy", [1, 1, 1, 1], [[7]] * 4, scale=1.0)
    lines = [full, slow, quick, loses]
    assert held_out.chosen(lines, slack=1.0) == [0, 2]
    assert held_out.chosen(lines, slack=25.0) == [0, 3]
    bad = line_of("sched", [0, 0, 0, 0], [[1]] * 4), line_of("sched", [1, 0, 0, 0], [[3]] * 4)
    assert held_out.chosen([full, *bad], slack=1.0) == [0, 2]  # none is good: the most accurate


def test_fixed_steps_make_as_many_calls_as_the_rule():
    """Two neighbours around the mean, per block; a mixture of them has the mean itself."""
    assert held_out.whole([3.7, 4.2], 7) == [3, 4] and held_out.whole([3.7, 4.2], 8) == [4, 4]
    own: Any = {"exit__mode": "entropy", "exit__polish": (2,)}
    calls = [[4, 4], [4, 5], [3, 4], [4, 4]]  # 3.75 and 4.25, 8 together
    (one,) = held_out.matched(line_of("entropy", [1] * 4, calls, **own))
    assert one.rule == exits.MATCHED and one.decode.exit.mode == "step"
    assert one.decode.exit.threshold == (2.0, 2.0) and one.decode.exit.polish == (2,)
    calls[2] = [4, 5]
    line = line_of("entropy", [1, 1, 0, 1], calls, **own)
    low, high = held_out.matched(line)
    assert (low.decode.exit.threshold, high.decode.exit.threshold) == ((2.0, 2.0), (2.0, 3.0))
    fixed = [line_of(one.rule, ok, [[n]] * 4) for one, ok, n in
             ((low, [0] * 4, 8), (high, [1, 1, 0, 0], 9))]  # fmt: skip
    found = held_out.against(line, fixed)
    assert found and found.accuracy == pytest.approx(0.25)  # half of 0 and half of 1/2
    assert held_out.matched(fixed[0]) == () and held_out.against(line, []) is None


def test_a_line_is_halved():
    line = line_of("full", [1, 0, 1, 1, 1], [[1], [2], [3], [4], [5]])
    first, second = line.on(0), line.on(1)
    assert first.verdicts == [True, True, True] and second.verdicts == [False, True]
    assert second.steps == [2, 4] and second.result.metrics["solved"] == 0.5
    assert second.result.stderr["solved"] == pytest.approx(0.5) and line.on(None) is line


@pytest.mark.parametrize(
    "words",
    [["plan=bundled", "lengths=16"], ["plan=tune", "scales=1"], ["plan=edit", "scales=-1"],
     ["plan=edit", "scales=1,2", "limit=1"]],
)  # fmt: skip
def test_edit_settings_that_cannot_be(words: list[str]):
    with pytest.raises(SystemExit):
        cli.parse(sweeps.SweepConfig, words)


def write_run(folder: Path, name: str, length: int, rows: list[dict]) -> Path:
    """One of EDIT's generations files."""
    path = folder / f"{name}_generations.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"generations": rows, "gen_length": length}))
    return path


def test_edits_own_folders_are_counted(tmp_path: Path):
    rows = [
        {"question": "q", "generations": r"\boxed{3}", "ground_truth": 3.0},
        {"question": "q", "generations": r"\boxed{4}", "ground_truth": None},
    ]
    write_run(tmp_path / "a", "gsm8k_job_200_128_64_0", 128, rows)
    write_run(tmp_path / "a", "gsm8k_job_200_128_64_1", 128, rows[:1])
    puzzle, answer = "1000230000000000", "1423234131424231"
    sudoku = {"question": f"Solve: Sudoku puzzle: {puzzle}", "ground_truth": answer,
              "generations": f"<answer>{answer}</answer>"}  # fmt: skip
    write_run(tmp_path / "b", "sudoku_job_200_256_128_0", 256, [sudoku])
    (tmp_path / "a" / "gsm8k_job_early_exit_steps_device-0.csv").write_text(
        ",Block_1,Block_2,Sample_Avg\nSample_1,20,10,15\nSample_2,32,1000,32\nGlobal_Avg,26,10,18\n"
    )
    found = edit_folder.read(tmp_path)
    gsm8k, cells = found["gsm8k", 128], found["sudoku", 256]
    assert (gsm8k.correct, gsm8k.total, gsm8k.steps) == (2, 3, [[20, 10], [32]])
    assert gsm8k.mean_steps == 31 and (cells.correct, cells.total) == (13, 13)
    text = edit_folder.report(tmp_path)
    assert "2/3 answers" in text and "51.6" in text and "13/13 cells" in text
    with pytest.raises(ValueError, match="has no .*_generations.json"):
        edit_folder.read(tmp_path / "model")
    odd = write_run(tmp_path / "c", "chess_0", 9, rows)
    with pytest.raises(ValueError, match="must begin with one of gsm8k"):
        edit_folder.read(odd.parent)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "math_0_generations.json").write_text("{}")
    with pytest.raises(ValueError, match="needs gen_length and generations"):
        edit_folder.read(tmp_path / "d")


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="set JDLLM_GOLDENS: rows that are not committed")
@pytest.mark.parametrize("name", ["gsm8k", "math500", "countdown", "sudoku"])
def test_edits_verdicts_are_the_recorded_ones(name: str, tmp_path: Path):
    path = GOLDENS / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kind = name.removesuffix("500")
    for number, row in enumerate(rows):
        facts = {k: row[k] for k in ("question", "ground_truth")}
        facts["generations"] = row["generation"]
        folder = tmp_path / str(number)
        write_run(folder, f"{kind}_x_0", row["gen_length"], [facts])
        ((_, found),) = edit_folder.read(folder).items()
        right = row["correct_cells"] if name == "sudoku" else int(row["correct"])
        assert found.correct == right, (row["file"], row["index"])
