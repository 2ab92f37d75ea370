"""plan=edit: its lines, the paired comparison, the oracle, the report, and EDIT's own folders."""

import csv
import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from jdllm.decode.aims import MAPS
from jdllm.evaluation import edit_folder, exit_sweep, exits, run, sweeps
from jdllm.evaluation.oracle import answers, settled
from jdllm.evaluation.paired import compare, mcnemar, percentile
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
    assert "McNemar" in capsys.readouterr().out
    done = len((tmp_path / "out" / "finished.jsonl").read_text().splitlines())
    sweeps.main(cli.parse(sweeps.SweepConfig, words))  # nothing is left to do
    assert len((tmp_path / "out" / "finished.jsonl").read_text().splitlines()) == done


Line = exit_sweep.Line


def test_edit_lengths_and_rules_belong_to_its_plan():
    with pytest.raises(SystemExit):
        cli.parse(sweeps.SweepConfig, ["plan=bundled", "lengths=16"])


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
