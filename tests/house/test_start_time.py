"""Two starts of a command: the second finds what the first compiled, and writes the same tokens."""

import json
import runpy
from pathlib import Path

import pytest

from jdllm.runtime import cli

SCRIPT = Path(__file__).parents[2] / "experiments" / "start_time.py"


@pytest.mark.slow
def test_the_second_start_reads_programs(tmp_path: Path):
    script, path = runpy.run_path(str(SCRIPT)), tmp_path / "start.json"
    words = [f"output={path}", "model=bundled", "block=8"]
    script["main"](cli.parse(script["StartConfig"], words))
    facts = json.loads(path.read_text())
    first, second = facts["first"], facts["second"]
    assert facts["same_tokens"] and first["programs_on_disk"] > 0
    assert second["programs_on_disk"] == first["programs_on_disk"], "it compiled anew"
    assert second["compilation"] < first["compilation"]
    for row in (first, second):
        assert 0 < row["without_weights"] < row["first_tokens"] < row["process"]


def test_a_start_that_fails_says_why(tmp_path: Path):
    script = runpy.run_path(str(SCRIPT))
    config = cli.parse(script["StartConfig"], ["output=x.json", "model=random:nothing"])
    with pytest.raises(RuntimeError, match="random:nothing"):
        script["start"](config, str(tmp_path))
