"""docs/edit.md lists every mode and map of decode.exit, with true numbers."""

import re
from pathlib import Path

from jdllm.decode.aims import MAPS
from jdllm.decode.presets import PRESETS
from jdllm.decode.rules import EXITS
from tests.unmask.test_gaussian import SPENT

PAGE = (Path(__file__).parents[2] / "docs" / "edit.md").read_text()


def rows(head: str) -> list[list[str]]:
    """The rows of the table whose first head this is."""
    lines = PAGE[PAGE.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_mode_is_told_with_its_numbers():
    told = {row[0]: row[2:] for row in rows("`exit.mode`")}
    assert set(told) == {"off", *EXITS}
    for name, (_, (threshold, patience, polish)) in EXITS.items():
        first = str(threshold[0]) if threshold else "none"
        assert told[name] == [first, str(patience[0]), str(polish[0])], name


def test_every_map_is_told():
    assert [row[0] for row in rows("`exit.map`")] == list(MAPS)


def test_the_cost_of_the_last_mask_is_the_computed_one():
    told = {row[0]: [int(cell) for cell in row[1:]] for row in rows("task")}
    assert told == {task: list(own.values()) for task, own in SPENT.items()}


def test_the_presets_are_there():
    named = set(re.findall(r"edit-[a-z0-9]+-\d+", PAGE))
    assert named and named <= set(PRESETS)
    assert sum(name.startswith("edit-") for name in PRESETS) == 12
