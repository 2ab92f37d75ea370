"""README and docs tell the truth: commands parse, code runs, links and tables are real."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval._cli import HarnessCLI

from jdllm.convert.__main__ import COMMANDS, ConvertConfig, ExportConfig, PlanConfig, with_model
from jdllm.convert.families import FAMILIES
from jdllm.doctor import DoctorConfig
from jdllm.evaluation.bench import BenchConfig
from jdllm.evaluation.config import EvalConfig
from jdllm.evaluation.grid import GridConfig
from jdllm.evaluation.sweeps import SweepConfig
from jdllm.evaluation.tuning import TuneConfig
from jdllm.generate import GenerateConfig
from jdllm.launch import LaunchConfig, split
from jdllm.model.config import NAMED, count_parameters
from jdllm.runtime import cli
from jdllm.sft import SFTConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.append(ROOT / "jdllm" / "bundled" / "README.md")
CONFIGS = {
    "jdllm.bench": BenchConfig,
    "jdllm.bench grid": GridConfig,
    "jdllm.doctor": DoctorConfig,
    "jdllm.eval": EvalConfig,
    "jdllm.generate": GenerateConfig,
    "jdllm.sft": SFTConfig,
    "jdllm.sweep": SweepConfig,
    "jdllm.tune": TuneConfig,
    "jdllm.convert export": ExportConfig,
    "jdllm.convert plan": PlanConfig,
} | {f"jdllm.convert {family}": ConvertConfig for family in COMMANDS}


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a page whose fence names `language`."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text for name, text in fences if name == language]


def commands() -> list[str]:
    """Every `python -m jdllm...` command that a page shows in a fenced block."""
    text = "\n".join(block for page in PAGES for lang in ("", "sh") for block in blocks(page, lang))
    text = text.replace("\\\n", " ")
    found = re.findall(r"python3? -m (jdllm\.[^#&|\n]*)", text)
    return sorted({command.strip() for command in found})


@pytest.fixture
def named_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the pages' commands name, in the folder where they are parsed."""
    (plan,) = (text for page in PAGES for text in blocks(page, "yaml"))
    for name, text in {"plan.yaml": plan, "tuned.json": "{}", "FILE.jsonl": ""}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command: str, named_files, monkeypatch: pytest.MonkeyPatch):
    words = shlex.split(command)
    name = words.pop(0)
    if name == "jdllm.harness":  # lm-eval's own command line
        monkeypatch.setattr(sys, "argv", [name, *words])
        assert HarnessCLI().parse_args().model == "jdllm"
        return
    if name == "jdllm.launch":
        own, words = split(words)
        assert isinstance(cli.parse(LaunchConfig, own, name), LaunchConfig)
        name = words.pop(0)
    if words and f"{name} {words[0]}" in CONFIGS:
        name = f"{name} {words.pop(0)}"
    if name == "jdllm.convert plan":
        words = with_model(words)
    config = CONFIGS[name]
    default = ConvertConfig(source="x") if config is ConvertConfig else None
    parsed = cli.parse(config, words, name, default)
    assert isinstance(parsed, config)


def test_there_are_commands_for_every_entry_point():
    shown = " ".join(commands())
    assert all(name in shown for name in CONFIGS)


def test_the_first_command_solves_puzzles(tmp_path):
    """What the README's first screen promises, with its own words (and a folder to look into)."""
    line = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if "jdllm.eval" in line
    )
    words = shlex.split(line.partition("#")[0])
    words = words[words.index("&&") + 1 :]
    assert words == ["python", "-m", "jdllm.eval"]
    environment = dict(os.environ, JDLLM_HOME=str(tmp_path / "home"), XLA_FLAGS="")
    run = subprocess.run(
        [sys.executable, *words[1:], f"output={tmp_path / 'out'}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tasks"]["sudoku"]["n"] == 100
    assert results["tasks"]["sudoku"]["metrics"]["solved"] >= 0.9
    assert "one worked example" in run.stdout
    assert "Traceback" not in run.stderr and "Warning" not in run.stderr


def test_the_python_example_runs():
    (code,) = blocks(ROOT / "README.md", "python")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert not missing


def test_the_table_of_families_is_complete_and_true():
    """Every family, the id that it converts by default, and the size of its first named shape."""
    rows = re.findall(r"^\| .*\(`(\w+)`\) \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    assert [family for family, _ in rows] == list(FAMILIES)
    for family, row in rows:
        ids, parameters, memory = (cell.strip() for cell in row.split("|")[:3])
        assert all(source in ids for command, source in COMMANDS.values() if command == family)
        count = next(count_parameters(c) for c in NAMED.values() if c.family == family)
        assert float(parameters.removesuffix(" B")) == round(count / 1e9, 1)
        assert int(memory.removesuffix(" GB")) == round(2 * count / 1e9)


def test_the_table_is_the_measured_one():
    evaluate = runpy.run_path(str(ROOT / "experiments" / "bundled" / "evaluate.py"))
    readme = (ROOT / "README.md").read_text()
    results = json.loads(evaluate["RESULTS"].read_text())
    assert evaluate["with_table"](readme, results) == readme
