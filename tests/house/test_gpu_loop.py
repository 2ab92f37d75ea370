"""The timings of the decode loop run whole at tiny shapes; what they mean needs a GPU."""

import json
import runpy
from pathlib import Path

import pytest

from jdllm.runtime import cli

SCRIPT = Path(__file__).parents[2] / "experiments" / "gpu_loop.py"
WORDS = [
    "model=random:tiny", "block=8", "positions=64", "gen_length=32", "prompt=32", "batches=2",
    "schedules=4", "repeats=1", "copy_megabytes=1",
    "product_width=64",
]  # fmt: skip
KEYS = {
    "name", "device", "shapes", "ms_per_step", "forwards_per_second", "floor_ms", "versions",
    "command", "date", "peak_gb",
}  # fmt: skip


@pytest.mark.slow
def test_every_row_is_measured(tmp_path: Path):
    script = runpy.run_path(str(SCRIPT))
    path = tmp_path / "gpu.jsonl"
    path.write_text('{"name": "older"}\n')
    script["main"](cli.parse(script["LoopConfig"], [*WORDS, f"output={path}"]))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    caches = ["schedule vanilla", "schedule prefix", "schedule dual"]
    names = ["loop step", "full pass", "loop request", *caches]
    assert [row["name"] for row in rows] == ["older", *names]
    full = rows.pop(2)
    assert full["teraflops"] > 0 and full["share_of_product"] > 0
    assert all(set(row) >= KEYS for row in rows[1:])
    assert all(row["peak_gb"] > 0 and row["floor_ms"] > 0 for row in rows[1:])
    step, request, *schedules = rows[1:]
    assert step["shapes"]["rows"] == 2 and step["forwards"] == request["forwards"] == 32
    assert request["outside_share"] == 1 - request["bare_seconds"] / request["seconds"]
    assert [row["forwards"] for row in schedules] == [8, 8, 8]


def test_shapes_that_buckets_would_change_are_refused(capsys):
    script = runpy.run_path(str(SCRIPT))
    for words, reason in (("positions=1000", "multiple of 32"), ("positions=128", "no room")):
        with pytest.raises(SystemExit):
            cli.parse(script["LoopConfig"], [words])
        assert reason in capsys.readouterr().err


def test_the_page_shows_the_committed_rows():
    script, root = runpy.run_path(str(SCRIPT)), SCRIPT.parents[1]
    lines = (root / "experiments" / "results" / "gpu.jsonl").read_text().splitlines()
    page = (root / "docs" / "decoding.md").read_text()
    assert script["table"]([json.loads(line) for line in lines]) in page
