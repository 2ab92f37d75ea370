"""The command `jdllm`: its list, what it starts, and what shells complete."""

import dataclasses
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Literal

import pytest

from jdllm.runtime import shell

ROOT = Path(__file__).parents[2]


def jdllm(*words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """What `jdllm WORDS` prints."""
    monkeypatch.setattr(sys, "argv", ["jdllm", *words])
    runpy.run_module("jdllm", run_name="__main__")
    return capsys.readouterr().out


def test_every_door_has_a_line(monkeypatch, capsys):
    doors = {p.stem for p in (ROOT / "jdllm").glob("*.py") if "\nif __name__ ==" in p.read_text()}
    listed = re.findall(r"^  (\w+)  ", jdllm(monkeypatch=monkeypatch, capsys=capsys), re.M)
    assert sorted(listed) == sorted(doors - {"__main__"} | {"convert", "completion"})
    assert jdllm("--help", monkeypatch=monkeypatch, capsys=capsys).count("\n") < 20


def test_the_list_imports_nothing():
    code = (
        "import runpy, sys; sys.argv = ['jdllm']; runpy.run_module('jdllm', run_name='__main__'); "
        "print({'jax', 'tyro', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_a_typo_names_the_nearest_command(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        jdllm("evl", monkeypatch=monkeypatch, capsys=capsys)
    assert stop.value.code == 2
    assert "no command 'evl'; did you mean eval?" in capsys.readouterr().err


def test_a_command_is_what_python_runs():
    """The same help, in which the examples are the door's own; an installed script is this main."""
    words = [["-m", "jdllm", "doctor", "--help"], ["-m", "jdllm.doctor", "--help"]]
    done = [
        subprocess.run([sys.executable, *w], capture_output=True, text=True, cwd=ROOT)
        for w in words
    ]
    assert done[0].stdout == done[1].stdout and "examples\n  python -m" in done[0].stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"jdllm": "jdllm.__main__:main"}


@dataclasses.dataclass(frozen=True)
class Inner:
    cache: Literal["none", "dual"] = "none"
    deep: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    """A command."""

    output: Path
    decode: Inner = Inner()


def completed(script: str, typed: str, breaks: str = "=:") -> list[str]:
    """What bash offers behind `typed`; `breaks` are characters at which readline cuts words."""
    driver = 'eval "$1"; COMP_WORDBREAKS=$3 COMP_LINE=$2 COMP_POINT=${#2}; _jdllm; '
    driver += 'echo "${COMPREPLY[*]}"'
    words = ["bash", "--norc", "-c", driver, "bash", script, typed, breaks]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


COMPLETED = {
    "jdllm ": "--help one many",
    "jdllm o": "one",
    "jdllm one ": "--help --help-all output= decode.cache= decode.deep=",
    "jdllm one output=x dec": "decode.cache= decode.deep=",
    "jdllm one decode.cache=": "none dual",
    "jdllm one decode.cache=d": "dual",
    "jdllm one decode.deep=t": "true",
    "jdllm one output=some": "",
    "jdllm many ": "--help inner",
    "jdllm many inner ou": "output=",
    "jdllm one --help-a": "--help-all",
    "jdllm two": "",
}


@pytest.mark.parametrize(("typed", "offered"), COMPLETED.items())
def test_bash_completes_commands_settings_and_choices(typed: str, offered: str):
    script = shell.script("bash", "jdllm", {"one": Config, "many": None, "many inner": Config})
    assert completed(script, typed) == offered.split()


ZSH = """
eval "$1"
compadd() {  # what the completion system's own does with words behind --
    for word in ${argv[$(( ${argv[(i)--]} + 1 )),-1]}; do
        [[ $word == "$current"* ]] && print -n -- "$word "
    done
}
compset() { current=${current#*=} }
_files() { }
words=("${(@s: :)2}") CURRENT=${#words} _jdllm
"""


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
@pytest.mark.parametrize(("typed", "offered"), COMPLETED.items())
def test_zsh_completes_the_same(typed: str, offered: str):
    script = shell.script("zsh", "jdllm", {"one": Config, "many": None, "many inner": Config})
    words = ["zsh", "-f", "-c", ZSH, "zsh", script, typed]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (offered.split(), "")


def test_bash_may_leave_words_whole():
    script = shell.script("bash", "jdllm", {"one": Config})
    assert completed(script, "jdllm one decode.cache=d", ":") == ["decode.cache=dual"]


def test_other_shells_are_refused():
    with pytest.raises(ValueError, match="no completion for fish; there is for bash and zsh"):
        shell.script("fish", "jdllm", {})


def test_the_script_knows_every_command(monkeypatch, capsys):
    script = jdllm("completion", "bash", monkeypatch=monkeypatch, capsys=capsys)
    for typed, offered in {
        "jdllm eval decode.cach": "decode.cache=",
        "jdllm convert expo": "export",
        "jdllm convert plan mem": "memory=",
        "jdllm bench grid bloc": "blocks=",
        "jdllm sft recipe.st": "recipe.steps=",
        "jdllm completion ": "--help bash zsh",
    }.items():
        assert completed(script, typed) == offered.split(), typed


def test_a_reader_that_has_gone_is_no_error():
    """`jdllm | head -1` ends without a traceback, as other programs do."""
    words = [sys.executable, "-m", "jdllm"]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout and run.stderr
    run.stdout.close()
    with run.stderr as said:
        assert said.read() == b""
    assert run.wait() == 141
