"""docs/decoding.md lists every option, rule, cache, stop, parity and preset, with true values."""

import json
import re
import runpy
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from jdllm.decode import DecodeConfig
from jdllm.decode.presets import PRESETS
from jdllm.generation import GenerateConfig
from jdllm.parity import COPIES
from jdllm.runtime import cli
from jdllm.runtime.fields import leaves, nested

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "decoding.md").read_text()
GROUPS = {prefix.removesuffix(".") for prefix, _ in nested(DecodeConfig)}
HINTS = {
    prefix + name: hint
    for prefix, kind in nested(DecodeConfig)
    for name, hint in get_type_hints(kind).items()
    if prefix + name not in GROUPS
}


def section(title: str) -> list[list[str]]:
    """Rows of the tables under a heading, heads left out, cells without their backticks."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    heads = {i - 1 for i, row in enumerate(rows) if set(row[0]) <= set("-|")}
    kept = [row for i, row in enumerate(rows) if i not in heads and i - 1 not in heads]
    return [[cell.strip().strip("`") for cell in row] for row in kept]


def written(value: Any) -> str:
    """As the page writes a value."""
    if value in (None, ()):
        return "none" if value == () else "open"
    return str(value).lower() if isinstance(value, bool) else str(value)


def choices(name: str) -> set[str]:
    """The values that a field may be set to."""
    found = [get_args(kind) or (kind,) for kind in (get_args(HINTS[name]) or (HINTS[name],))]
    return {value for values in found for value in values if isinstance(value, str)}


def test_the_options_are_the_fields_with_their_defaults():
    told = [(name, default) for name, default, *_ in section("Options")]
    assert told == [(name, written(value)) for name, value in leaves(DecodeConfig()).items()]


def test_every_option_says_what_it_means_and_where_it_is_from():
    assert all(len(row) == 4 and all(row) for row in section("Options"))
    assert all(len(row) == 4 and all(row) for row in section("Quirks"))


@pytest.mark.parametrize(
    ("title", "field"), [("Rules", "rule"), ("Caches", "cache"), ("Stops", "stop")]
)
def test_every_choice_has_its_row(title: str, field: str):
    names = [row[0] for row in section(title)]
    assert set(names) == choices(field) and len(names) == len(set(names))


def test_every_parity_is_told():
    told = set(re.findall(r"parity=(\w+)", " ".join(row[3] for row in section("Quirks"))))
    assert told | {"fast_dream"} == set(COPIES) == choices("parity") - {"none"}
    assert any("fast_dream" in row[3] for row in section("Quirks"))


def test_the_presets_are_the_table():
    told = {row[0]: row[1] for row in section("Presets")}
    assert told == {
        name: ", ".join(f"{key}={written(value)}" for key, value in settings.items())
        for name, settings in PRESETS.items()
    }


def test_what_other_systems_call_it_here_exists():
    """Names and values of the right column are options and their choices."""
    table = PAGE.partition("\n## Coming from another system\n")[2].partition("\n## ")[0]
    spans = re.findall(r"`([^`]+)`", "".join(re.findall(r"\|([^|]+)\|$", table, re.M)))
    assert len(spans) > 40
    for word in " ".join(spans).split():
        name, _, value = word.partition("=")
        assert name in HINTS, word
        assert not value or not choices(name) or value in choices(name), word


def test_the_settings_in_the_text_parse():
    """Spans of decode.* words between backticks, as a user would copy them."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]*)`", PAGE)]
    spans = [s for s in spans if s.startswith("decode.") and "NAME" not in s and "=" in s]
    spans = [s for s in spans if not s.endswith("=")]
    assert len(spans) >= 2
    for span in spans:
        assert cli.parse(GenerateConfig, ["prompt=x", *span.split()], "prog").decode


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "experiments" / "decoding_rules.py"))


def test_the_rules_table_is_the_measured_one(script: dict[str, Any]):
    results = json.loads((script["FOLDER"] / "decoding_rules.json").read_text())
    assert (script["FOLDER"] / "decoding_rules.md").read_text() == script["table"](results)
    measured = {(row["rule"], json.dumps(row["settings"])) for row in results["rows"]}
    assert measured == {
        (sweep.name, json.dumps({**sweep.fixed, **varied}))
        for sweep in script["SWEEPS"]
        for varied in sweep.varied
    }


def test_the_rules_script_measures_and_continues(script: dict[str, Any], tmp_path: Path, capsys):
    words = [f"output={tmp_path}", "limit=2", "rules=Dream's origin"]
    script["main"](cli.parse(script["RulesConfig"], words))
    stored = (tmp_path / "decoding_rules.json").read_text()
    rows = json.loads(stored)["rows"]
    assert [row["varied"] for row in rows] == [{"steps": 5}]
    assert rows[0]["countdown"]["n"] == 2 and 1 <= rows[0]["sudoku"]["nfe"] <= 5
    assert (tmp_path / "decoding_rules.png").stat().st_size > 10_000
    script["main"](cli.parse(script["RulesConfig"], words))  # nothing is left to do
    assert json.loads((tmp_path / "decoding_rules.json").read_text())["rows"] == rows
    assert "| Dream's origin | steps 5 |" in capsys.readouterr().out


def test_intervals_are_wilsons(script: dict[str, Any]):
    low, high = script["interval"](0.5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)
    low, high = script["interval"](1.0, 50)  # nothing was wrong, yet the interval has a width
    assert round(low, 3) == 0.929 and high == pytest.approx(1)
