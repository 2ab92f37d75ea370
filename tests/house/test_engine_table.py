"""The engine's table and the compile times run whole at tiny shapes; figures need a GPU."""

import json
import runpy
from pathlib import Path

import pytest

from jdllm.runtime import cli

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
WORDS = [
    "model=random:tiny", "slots=4,1", "batches_at=4", "per_slot=2,2", "prompt=32", "completion=16",
    "block=8", "threads=1", "alone=2",
]  # fmt: skip


def rows_of(name: str, kind: str, words: list[str], path: Path) -> list[dict]:
    script = runpy.run_path(str(EXPERIMENTS / f"{name}.py"))
    script["main"](cli.parse(script[kind], [*words, f"output={path}"]))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_slots_are_measured_beside_batches(tmp_path: Path):
    found = rows_of("engine_table", "TableConfig", WORDS, tmp_path / "engine.jsonl")
    told = [(row["name"], row["slots"]) for row in found]
    assert told == [("warm", 4), ("warm", 4), ("warm", 1), ("traffic", 4), ("alone", 4),
                    ("traffic", 1)]  # fmt: skip
    four, alone, one = found[3:]
    assert four["engine"]["tokens"] == four["batches"]["tokens"]
    assert four["ratio"] > 0 and "batches" not in one and not four["engine"]["compile_seconds"]
    assert alone["same"] == alone["alone"] == 2


@pytest.mark.slow
def test_compile_times_are_told_by_setting(tmp_path: Path):
    words = ["models=tiny", "length=64", "gen_length=32", "settings=untuned,default"]
    found = rows_of("compile_time", "CompileConfig", words, tmp_path / "compile.jsonl")
    assert [row["setting"] for row in found] == ["untuned", "default"]
    assert all(row["compile_seconds"] > 0 and row["instructions"] > 100 for row in found)


def test_an_unknown_setting_is_refused(capsys: pytest.CaptureFixture[str]):
    script = runpy.run_path(str(EXPERIMENTS / "compile_time.py"))
    with pytest.raises(SystemExit):
        cli.parse(script["CompileConfig"], ["settings=fast"])
    assert "settings=fast is none of untuned" in capsys.readouterr().err
