"""The script that measures one host's devices: its rows, its order, its tables."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from jdllm.model.config import NAMED
from jdllm.runtime import cli
from tests.support.scripts import loaded

TINY = [
    "model=tiny", "experts=tiny-experts", "lora=tiny", "prompt=32", "gen_length=32", "block=8",
    "repeats=1", "batch=2", "rows=1,2", "expert_rows=1", "steps=2", "batches=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def script() -> Any:
    with loaded("scaling") as module:
        yield module


def run(script: Any, folder: Path, *words: str) -> list[dict[str, Any]]:
    path = folder / "found" / "scaling.jsonl"
    script.main(cli.parse(script.ScalingConfig, [*TINY, f"output={path}", *words]))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_part_is_measured(script, tmp_path, capsys):
    """In the order that is asked for; a mesh that does not serve says so, and stops nothing."""
    rows = run(script, tmp_path, "meshes=1x1,2x1,1x2,1x3")
    dense = ["step", "step", "requests", "lora"]
    places = [(row["part"], row["mesh"]) for row in rows]
    assert places[:8] == [(part, mesh) for mesh in ("1x1", "2x1") for part in dense]
    assert places[8:12] == [("step", mesh) for mesh in ("1x2", "1x2", "1x3", "1x3")]
    assert places[12:16] == [("restore", mesh) for mesh in ("1x1", "2x1", "1x2", "1x3")]
    sparse = [("moe", "1x1"), ("moe", "1x2"), ("moe", "1x3"), ("engine", "1x1"), ("engine", "2x1")]
    assert places[16:] == sparse
    for row in rows:
        assert ("failed" in row) == (row["mesh"] == "1x3"), row
        assert row["devices"] == 8 and row["platform"] == "cpu" and row["host_peak_gb"] > 0
        assert "output=" not in row["command"] and not row["nvlink_multicast"]
    assert "cannot be split over the 3 devices" in rows[18]["failed"]
    assert rows[0]["ready"]["backend_compile_calls"] > 0 and rows[0]["ready"]["weights"] > 0
    requests = [row for row in rows if row["part"] == "requests"]
    assert [row["requests"] for row in requests] == [2, 4]
    assert all(row["compile_seconds"] == 0 for row in requests)  # step's program
    steps = [row for row in rows if row["part"] == "step" and "failed" not in row]
    assert {row["columns"] for row in steps} == {64} and {row["forwards"] for row in steps} == {
        2 * 8, 4 * 8
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("ms per block step", "seconds of restoring"))


def test_nothing_starts_late(script, tmp_path):
    """Every row that would have come is named, without a model being made."""
    rows = run(script, tmp_path, "meshes=1x1,2x1", "seconds=0")
    assert {row["not_run"] for row in rows} == {"seconds=0 were over"}
    assert len(rows) == 4 + 4 + 2 + 2 + 1  # dense twice, restores, experts at 1x1 and 2x1


def test_few_masks_differ_in_steps_alone(script):
    """The rest of each block is filled, and the prompt stays as it is."""
    parts = importlib.import_module("scaling_parts")
    config = cli.parse(script.ScalingConfig, TINY)
    llm = script.load((config, "2x1", "step"))
    case = parts.case_of(config, llm, 1)
    assert (case.rows, case.prompt, case.gen_length) == (2, 48, 16)
    assert parts.case_of(config, llm, 2).gen_length == 32  # that of requests
    request, _ = parts.prepare(llm, case)
    few = parts.with_few_masks(llm, case, request)
    masks, fewer = (x.tokens == llm.config.mask_id for x in (request, few))
    assert masks.sum() == 2 * 16 and fewer.sum() == 2 * 2 * parts.FEW
    assert (few.tokens[:, :48] == request.tokens[:, :48]).all() and not (fewer & ~masks).any()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("parts=steps", "is none of"), ("lora=qkv", "no case of tiny"), ("model=huge", "one of"),
        ("experts=tiny", "block-causal"), ("gen_length=40", "two blocks"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(script, capsys, words, reason):
    with pytest.raises(SystemExit):
        cli.parse(script.ScalingConfig, [*TINY, words])
    assert reason in capsys.readouterr().err


def test_meshes_follow_the_devices(script, monkeypatch):
    config = cli.parse(script.ScalingConfig, TINY)
    for count, meshes in (
        (1, ["1x1"]), (2, ["1x1", "2x1", "1x2"]), (4, ["1x1", "4x1", "1x4", "2x2"]),
    ):  # fmt: skip
        monkeypatch.setattr(script.jax, "device_count", lambda count=count: count)
        assert config.mesh_texts == meshes


def row(part: str, mesh: str, rows: int = 8, **found: Any) -> dict[str, Any]:
    """A row as the script writes it."""
    facts = {"device": "card", "devices": 2, "platform": "gpu", "versions": {"jax": "1"}}
    facts |= {"model": "llada-8b", "layers": 32, "columns": 1152, "block": 32, "command": "it"}
    facts |= {"date": "2026-11-26T00:00:00", "host_peak_gb": 2.5}
    return facts | {"part": part, "mesh": mesh, "rows": rows} | found


def test_tables_compare_with_one_device():
    """Rates with a rate, times with a replica's; a prediction beside; the last run counts."""
    rows = [
        row("step", "1x1", ms_per_step=9.0, tokens_per_second=100),
        row("step", "1x1", ms_per_step=8.0, tokens_per_second=100),
        row("step", "2x1", ms_per_step=10.0, tokens_per_second=160),
        row("step", "1x2", ms_per_step=5.0, tokens_per_second=160),
        row("requests", "1x1", requests=16, seconds=2.0, tokens_per_second=100),
        row("requests", "2x1", requests=32, seconds=2.0, tokens_per_second=190),
        row("lora", "2x1", failed="no memory"),
    ]
    with loaded("cost_model") as script:
        machine = script.Machine(3e12, 7e14, 1e-5, 2e-5, 2e11)
        found = script.scaling_tables.tables(rows, lambda x: script.step_milliseconds(machine, x))
        work = script.cost(NAMED["llada-8b"], script.Pass(16, 32, 1152, 32), 2, 1)
        guess = 1e3 * work.seconds(machine, 2, 1)
    one, two, split = found["run steps"].splitlines()[2:]
    assert "| 8.00 |" in one and "| 1.00 of 1 | 100 % |" in one
    assert f"| 10.00 | {guess:.2f} | {100 * (guess / 10 - 1):+.0f} % |" in two
    assert "| 1.60 of 2 | 80 % |" in two and "| 1.60 of 2 | 80 % |" in split
    assert "| 1.90 of 2 | 95 % |" in found["run requests"]
    assert "Not measured" in found["run training"]
    assert "| training | 1x1, 2x1, 4x1 | 2x1, 8 rows: no memory |" in found["run missing"]
    assert "| steps | 4x1, 2x2, 1x4 |" in found["run missing"]
    assert "| experts | 1x1, 1x2, 2x2, 1x4 |" in found["run missing"]
    assert found["run"].splitlines()[2:] == ["| 2 card | 2026-11-26 | jax 1 | `it` | 2.5 |"]


def test_a_page_shows_whole_models_on_gpus():
    rows = [
        row("step", "1x1"), row("step", "1x1", layers=4), row("step", "1x1", platform="cpu"),
        row("restore", "1x1", layers=4),
    ]  # fmt: skip
    with loaded("scaling_tables") as script:
        kept = script.shown(rows, {"llada-8b": 32})
        # A row with numbers is not forgotten for a later one that has none.
        again = script.latest([row("step", "1x1"), row("step", "1x1", failed="late")])
    assert kept == [rows[0], rows[3]]
    assert len(again) == 1 and "failed" not in again[0]
