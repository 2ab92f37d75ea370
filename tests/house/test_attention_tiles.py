"""The timings of attention run at tiny shapes; what they mean needs a GPU."""

import json
import runpy
from pathlib import Path

import pytest

from jdllm.runtime import cli

SCRIPT = Path(__file__).parents[2] / "experiments" / "attention_tiles.py"
WORDS = [
    "models=llada2-mini", "rows=2", "queries=4", "keys=64", "megabytes=1", "repeats=1",
    "names=reference,split", "tune=True",
]  # fmt: skip


def test_every_way_has_a_row_or_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script, path = runpy.run_path(str(SCRIPT)), tmp_path / "tiles.json"
    monkeypatch.setitem(script["rows"].__globals__, "SPLIT", script["SPLIT"][:1])
    script["main"](cli.parse(script["TilesConfig"], [*WORDS, f"output={path}"]))
    reference, *split = json.loads(path.read_text())["rows"]
    assert reference["microseconds"] > 0 and 0 < reference["relative_error"] < 0.01
    assert [row["tiles"].get("whole") for row in split] == [None, False, True]
    assert all("failed" in row for row in split)  # there is no GPU
    with pytest.raises(ValueError, match="models=gpt must be among llada-8b"):
        script["TilesConfig"](path, models="gpt")
    with pytest.raises(ValueError, match="keys=33 must be a multiple of a page, 32"):
        script["TilesConfig"](path, keys=(33,))
