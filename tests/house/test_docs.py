"""README and docs tell the truth: commands parse, code runs, links and tables are real."""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from lm_eval._cli import HarnessCLI

from jdllm.checkup import DoctorConfig
from jdllm.convert.commands import ConvertConfig, ExportConfig, MergeConfig
from jdllm.convert.families import COMMANDS, FAMILIES
from jdllm.convert.plan import PlanConfig, with_model
from jdllm.evaluation.bench import BenchConfig
from jdllm.evaluation.config import EvalConfig
from jdllm.evaluation.grid import GridConfig
from jdllm.evaluation.sweeps import SweepConfig
from jdllm.evaluation.tuning import TuneConfig
from jdllm.generation import GenerateConfig
from jdllm.model.config import NAMED, count_parameters
from jdllm.runtime import cli
from jdllm.runtime.launch import LaunchConfig, split
from jdllm.server.config import ServeConfig
from jdllm.server.terminal import ChatConfig
from jdllm.store.dynamics import write_dynamics
from jdllm.train.objective import OBJECTIVES
from jdllm.training.config import SFTConfig
from jdllm.training.presets import table

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.append(ROOT / "jdllm" / "bundled" / "README.md")
CONFIGS = {
    "jdllm.bench": BenchConfig,
    "jdllm.bench grid": GridConfig,
    "jdllm.chat": ChatConfig,
    "jdllm.doctor": DoctorConfig,
    "jdllm.eval": EvalConfig,
    "jdllm.generate": GenerateConfig,
    "jdllm.serve": ServeConfig,
    "jdllm.sft": SFTConfig,
    "jdllm.sweep": SweepConfig,
    "jdllm.tune": TuneConfig,
    "jdllm.convert export": ExportConfig,
    "jdllm.convert merge": MergeConfig,
    "jdllm.convert plan": PlanConfig,
} | {f"jdllm.convert {family}": ConvertConfig for family in COMMANDS}


# What an example asks for that a CPU without a network does not have, and the word that says so
# between the last heading (or example) and this one. What asks for nothing is run: see below.
NEEDS = {
    r"(GSAI-ML|inclusionAI|Dream-org|apple|Qwen)/|plan\.yaml|preset=(llada|edit)"
    rf"|jdllm\.convert ({'|'.join(COMMANDS)})\b": "download",
    r"FOLDER|FILE|OUTPUT|(chats|prompt|book)\.(jsonl|txt)|my_tasks|models/mine"
    r"|runs/mine/": "of yours",
    r"mesh=(?!1x1)[0-9]+x": "devices",
    r"random:llada-8b|jdllm\.sft": "GPU",
    r"jdllm\.(serve|chat)\b": "end",
    r"base_url=|url=http": "server",
    r"executor=ray": "Ray",
}
Example = tuple[str, str, str]
"""What stands before an example, its language, and its text."""


def examples(page: Path) -> list[Example]:
    """The fenced blocks of a page with what is said about them."""
    parts = re.split(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    before = [re.split(r"^#.*$", text, flags=re.M)[-1] for text in parts[::3]]
    return list(zip(before, parts[1::3], parts[2::3], strict=False))


def lines_of(text: str) -> list[str]:
    """The commands of this package in a block, by either name."""
    found = re.findall(
        r"^(?:.*&& )?(?:python3? -m jdllm\.|jdllm )([^#&|\n]*)", text.replace("\\\n", " "), re.M
    )
    return [" ".join(f"jdllm.{line}".split()) for line in found]


def needs(text: str) -> set[str]:
    """What a command or a program asks for."""
    found = {word for pattern, word in NEEDS.items() if re.search(pattern, text)}
    # A plan loads nothing, whatever it names; the launcher makes virtual devices.
    given = {"jdllm.convert plan": found, "jdllm.launch": {"devices"}}
    return found.difference(*(words for start, words in given.items() if text.startswith(start)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_say_what_their_examples_need(page: Path):
    for before, language, text in examples(page):
        some = [text] if language == "python" else lines_of(text) * (language in ("", "sh"))
        for one in some:
            unsaid = {word for word in needs(one) if word not in before}
            assert not unsaid, f"{page.name} does not say that this needs {unsaid}: {one}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_can_be_imported(page: Path):
    """Every program is one, and the names that it imports are there."""
    for text in blocks(page, "python"):
        tree = ast.parse(textwrap.dedent(text))  # of quotes from functions, too
        tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        exec(compile(tree, page.name, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path):
    """Those that need nothing, in the order of the page: one may use what another has written.

    What imports nothing is a quote, and no program.
    """
    home = {"JDLLM_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    for _, language, text in examples(page):
        words = [shlex.split(line) for line in lines_of(text) if not needs(line)]
        runs = [["-m", *some] for some in words] if language in ("", "sh") else []
        program = language == "python" and "import " in text and not needs(text)
        runs += [["-c", text]] if program else []
        for some in runs:
            done = subprocess.run(
                [sys.executable, *some],
                cwd=tmp_path,
                env=dict(os.environ) | home,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0 and "Traceback" not in done.stderr, (some, done.stderr)


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a page whose fence names `language`."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text for name, text in fences if name == language]


def commands() -> list[str]:
    """Every `python -m jdllm...` command that a page shows in a fenced block."""
    text = "\n".join(block for page in PAGES for lang in ("", "sh") for block in blocks(page, lang))
    return sorted(set(lines_of(text)))


@pytest.fixture
def named_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the files that the pages' commands name, in the folder where they are parsed."""
    (plan,) = (text for page in PAGES for text in blocks(page, "yaml"))
    for name, text in {"plan.yaml": plan, "tuned.json": "{}", "FILE.jsonl": ""}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "FOLDER").mkdir()
    maps = {"mean": {"layers.0.attention.q": np.ones((2, 1))}}
    write_dynamics(tmp_path / "FOLDER", maps, {"windows": ["mean"]})
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


def test_the_quoted_loop_is_the_real_one():
    quotes = blocks(ROOT / "docs" / "design.md", "python")
    source = "".join((ROOT / "jdllm" / "decode" / f"{n}.py").read_text() for n in ("step", "loop"))
    assert len(quotes) == 3
    assert [quote for quote in quotes if quote not in source] == []


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


def test_presets_and_objectives_of_training_are_listed():
    assert table() in (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(
        r"^\| ([\w-]+) \|.*\| \(([\d.]+), ([\d.]+)\) \|",
        (ROOT / "docs" / "objectives.md").read_text(), re.M,
    )  # fmt: skip
    assert {name: (float(low), float(high)) for name, low, high in rows} == {
        name: (each.low, each.high) for name, each in OBJECTIVES.items()
    }


def test_the_table_is_the_measured_one():
    evaluate = runpy.run_path(str(ROOT / "experiments" / "bundled" / "evaluate.py"))
    readme = (ROOT / "README.md").read_text()
    results = json.loads(evaluate["RESULTS"].read_text())
    assert evaluate["with_table"](readme, results) == readme


def test_what_8_bits_cost_is_what_was_measured():
    script = runpy.run_path(str(ROOT / "experiments" / "weights_accuracy.py"))
    found = json.loads((ROOT / "experiments/results/weights_accuracy.json").read_text())
    page = (ROOT / "docs" / "convert.md").read_text()
    assert script["task_table"](found["tasks"]) in page
    assert script["golden_table"](found["goldens"]) in page


def test_what_fits_is_what_was_planned():
    script = runpy.run_path(str(ROOT / "experiments" / "fits.py"))
    found = json.loads((ROOT / "experiments/results/fits.json").read_text())
    assert script["table"](found["rows"]) in (ROOT / "docs" / "performance.md").read_text()
