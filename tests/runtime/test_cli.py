"""The command-line grammar."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

import jax
import pytest

from jdllm.convert.commands import ConvertConfig
from jdllm.evaluation.config import EvalConfig
from jdllm.evaluation.sweeps import SweepConfig
from jdllm.generation import GenerateConfig
from jdllm.runtime import cli, fields, hints, mistakes, signals
from jdllm.training.config import SFTConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    threshold: float = 0.9


@dataclasses.dataclass(frozen=True)
class Config:
    """A command."""

    name: str = "x"
    """What it is called."""
    flag: bool = False
    inner: Inner = Inner()
    count: int | None = None

    def __post_init__(self):
        if self.count == 0:
            raise ValueError("count=0 makes no sense: ask for at least 1")


@pytest.mark.parametrize(
    "words",
    [
        ["name=a=b", "flag=true", "inner.threshold=0.5", "count=3"],
        ["--name=a=b", "--flag", "true", "--inner.threshold", "0.5", "count=3"],
        ["--name", "a=b", "flag=yes", "--inner.threshold=0.5", "--count", "3"],
    ],
)
def test_every_spelling_means_the_same(words: list[str]):
    expected = Config(name="a=b", flag=True, inner=Inner(0.5), count=3)
    assert cli.parse(Config, words, "prog") == expected


def test_defaults_and_a_given_default():
    assert cli.parse(Config, [], "prog") == Config()
    assert cli.parse(Config, ["flag=true"], "prog", Config(name="y")) == Config("y", True)


def test_a_typo_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["nmae=x"], "prog")
    assert stop.value.code == 2
    assert "prog has no setting 'nmae'; did you mean name?" in capsys.readouterr().err


def test_a_setting_without_its_group_names_it(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["threshold=0.5"], "prog")
    assert stop.value.code == 2
    assert "no setting 'threshold'; did you mean inner.threshold?" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Moved:
    """A command whose settings have moved."""

    renamed: ClassVar = {"bar": "inner.threshold"}
    inner: Inner = Inner()
    sizes: tuple[int, ...] = ()
    shares: tuple[float, ...] = (0.5, 1.0)


def test_what_was_renamed_names_the_new(capsys):
    for word in ("bar=0.5", "--bar=0.5"):
        with pytest.raises(SystemExit) as stop:
            cli.parse(Moved, [word], "prog")
        assert stop.value.code == 2
        assert "prog has no setting 'bar'; it is inner.threshold now" in capsys.readouterr().err


def test_a_group_names_its_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Moved, ["inner=0.5"], "prog")
    assert stop.value.code == 2
    assert "no setting 'inner'; did you mean inner.threshold?" in capsys.readouterr().err


def test_several_numbers_are_one_word(capsys):
    assert cli.parse(Moved, ["sizes=4,8,16"], "prog").sizes == (4, 8, 16)
    assert cli.parse(Moved, ["sizes="], "prog").sizes == ()
    assert cli.parse(Moved, [], "prog").shares == (0.5, 1.0)
    assert cli.parse(Moved, ["shares=2,0.25"], "prog").shares == (2.0, 0.25)
    with pytest.raises(SystemExit):
        cli.parse(Moved, ["sizes=4,x"], "prog")
    assert "sizes" in capsys.readouterr().err


def test_a_rule_between_fields_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["count=0"], "prog")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: count=0 makes no sense: ask for at least 1\n"


WRONG_VALUES = [
    (["limit=x"], "limit=x must be a whole number or None"),
    (["--limit", "1.5"], "limit=1.5 must be a whole number or None"),
    (["decode.temperature=hot"], "decode.temperature=hot must be a finite number"),
    (["decode.align=perhaps"], "decode.align=perhaps must be true or false or None"),
    (["decode.block_lengths=4,b"], "decode.block_lengths=4,b must be a list, each item a whole"),
    (
        ["decode.temperature=-1"],
        "decode: temperature=-1.0 is out of range: it must lie in [0, inf]",
    ),
    (["decode.edit.threshold=2"], "decode.edit: edit.threshold=2.0 is out of range"),
]


@pytest.mark.parametrize("words, sentence", WRONG_VALUES, ids=str)
@pytest.mark.parametrize("columns", ["40", "1000"])
def test_wrong_values_are_one_sentence(words, sentence, columns, capsys, monkeypatch):
    """However wide the terminal: what tyro draws a box around is told without it."""
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        cli.parse(EvalConfig, words, "prog")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sentence}") and said.count("\n") == 1


def test_a_setting_that_is_needed_is_asked_for(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(SFTConfig, ["task=sudoku"], "prog")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: prog needs output=; prog --help says what it is\n"


def test_commands_are_told_as_they_were_typed(monkeypatch):
    text = "let python -m jdllm.doctor say why"
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python3", "/bin/jdllm", "eval"])
    assert mistakes.as_typed(text) == "let jdllm doctor say why"
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python3", "-m", "jdllm.eval"])
    assert mistakes.as_typed(text) == text


def helped(config: type, word: str, capsys, prog: str = "prog", **default: Any) -> str:
    """What a command prints as its help."""
    with pytest.raises(SystemExit) as stop:
        cli.parse(config, [word], prog, **default)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_full_help_lists_every_setting_with_its_default(capsys):
    text = helped(Config, "--help-all", capsys)
    for part in (
        "name=TEXT                   What it is called. (default: x)\n",
        "flag=true|false             (default: false)\n",
        "count=INTEGER\n",
        "inner.NAME=VALUE: ",
        "inner.threshold=NUMBER      (default: 0.9)\n",
    ):
        assert part in text
    assert "(default: y)" in helped(Config, "--help-all", capsys, default=Config("y"))


def test_help_is_short(capsys, monkeypatch):
    """Three examples, the command's own settings a sentence each, names of the groups' settings."""
    doc = "Solves it.\n\n" + "".join(f"prog name={i}\nprogram name={i}\n" for i in range(5))
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", doc)
    text = helped(Config, "--help", capsys)
    assert text == helped(Config, "-h", capsys)
    assert text.startswith("usage: prog [key=value ...]\n\nA command.\n\nexamples\n  prog name=0\n")
    assert text.count("  prog name=") == 3 and "program" not in text
    assert re.search(r"^inner\.NAME=VALUE: .*\n  threshold$", text, re.M)
    assert "--help-all" in text.splitlines()[-1]


@pytest.mark.parametrize("config", [EvalConfig, SFTConfig, GenerateConfig, SweepConfig])
def test_the_help_of_every_command(config: type, capsys):
    """The full one has every setting, the short one every name on two screens."""
    short, full = (helped(config, word, capsys) for word in ("--help", "--help-all"))
    assert len(short.splitlines()) < 105 and max(map(len, short.splitlines())) <= 100
    groups = {prefix.removesuffix(".") for prefix, _ in cli.nested(config)}
    for name in set(fields.field_names(config)) - groups:
        assert f"  {name}=" in full and name.rpartition(".")[2] in short
    assert "\nmodel\n" in short and "\ntask\n" in short or config is GenerateConfig


def test_dispatch_runs_the_named_command_and_suggests_others(capsys):
    ran = []
    commands = {"llada": ran.append, "export": ran.append}
    cli.dispatch(commands, ["llada", "source=x"], "prog")
    assert ran == [["source=x"]]
    with pytest.raises(SystemExit) as stop:
        cli.dispatch(commands, ["lada"], "prog")
    assert stop.value.code == 2
    assert "did you mean llada?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.dispatch(commands, ["--help"], "prog")
    assert stop.value.code == 0
    assert "{llada,export}" in capsys.readouterr().out


@dataclasses.dataclass(frozen=True)
class Tuned(Inner):
    presets: ClassVar = {"quick": {"threshold": 0.5, "cache": "dual"}, "exact": {"cache": "none"}}
    cache: str | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    """A command with presets."""

    decode: Tuned = Tuned()


@pytest.mark.parametrize(
    "words",
    [["decode.preset=quick"], ["--decode.preset", "quick"], ["--decode.preset=quick"]],
)
def test_a_preset_stands_for_what_is_not_given(words: list[str]):
    assert cli.parse(Outer, words, "prog").decode == Tuned(0.5, "dual")
    for order in ([*words, "decode.threshold=0.9"], ["decode.threshold=0.9", *words]):
        # 0.9 is the field's default, and still it is the user's word that counts
        assert cli.parse(Outer, order, "prog").decode == Tuned(0.9, "dual")
    assert cli.parse(Outer, [*words, "decode.cache=None"], "prog").decode == Tuned(0.5, None)


def test_an_unknown_preset_names_the_nearest_and_help_lists_them(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Outer, ["decode.preset=quik"], "prog")
    assert stop.value.code == 2
    assert "prog knows no decode.preset=quik; did you mean quick?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.parse(Outer, ["decode.prest=quick"], "prog")
    assert "did you mean decode.preset?" in capsys.readouterr().err
    text = helped(Outer, "--help", capsys)
    assert "A command with presets." in text and "Settings by name: quick, exact." in text


@dataclasses.dataclass(frozen=True)
class Named:
    """A command whose settings other tools call otherwise."""

    gen_length: int = 1
    shots: int = 0
    inner: Inner = Inner()
    mesh: str = "auto"
    place: Path | None = None
    cache: Literal["none", "prefix", "dual"] | None = None


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("max_new_tokens=5", "gen_length"),
        ("--max-new-tokens=5", "gen_length"),
        ("num_fewshot=5", "shots"),
        ("device=cuda", "mesh"),
        ("inner.conf_threshold=0.5", "inner.threshold"),
        ("inner.treshold=0.5", "inner.threshold"),
        ("tresholt=0.5", "inner.threshold, or shots"),
        ("cache=dula", "dual"),
        ("cache=dual_cache", "dual"),
        ("cache=true", "dual"),
    ],
)
def test_words_of_other_tools_name_ours(word: str, meant: str, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Named, [word], "prog")
    assert stop.value.code == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_every_alias_is_of_a_setting_that_some_command_has():
    commands = (EvalConfig, SFTConfig, GenerateConfig, SweepConfig, ConvertConfig)
    names = {name.rpartition(".")[2] for one in commands for name in fields.field_names(one)}
    assert set(hints.ALIASES) <= names
    allowed = {
        word
        for one in commands
        for _, group in cli.nested(one)
        for kind in get_type_hints(group).values()
        for word in mistakes.choices(kind)
    }
    assert set(hints.CHOICES.values()) <= allowed | {"float16"}


def test_choices_that_are_right_pass():
    for word in ("cache=dual", "cache=None", "--cache=none"):
        cli.parse(Named, [word], "prog")
    assert cli.parse(Named, ["--cache", "prefix"], "prog").cache == "prefix"


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert cli.parse(Named, ["place=~/a"], "prog").place == Path("/somewhere/a")
    assert cli.parse(Named, ["--place", "~"], "prog").place == Path("/somewhere")
    assert cli.parse(Named, ["place=a~b"], "prog").place == Path("a~b")


def ended(main: Callable, capsys, monkeypatch, config: type = Config) -> tuple[int, str]:
    """The exit status and the standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main, config, "prog")
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Kept(Config):
    """A command that can go on."""

    going_on: ClassVar[str] = "the same command goes on"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_is_one_sentence(number: int, status: int, capsys, monkeypatch):
    def main(_: Config) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    before = signal.getsignal(number)
    assert ended(main, capsys, monkeypatch) == (status, "interrupted\n")
    wanted = (status, "interrupted: the same command goes on\n")
    assert ended(main, capsys, monkeypatch, Kept) == wanted
    assert signal.getsignal(number) is before


def test_a_block_can_put_an_interrupt_off(capsys):
    with signals.raised(), signals.deferred("saving first") as asked:
        assert asked() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert str(asked()) == "SIGTERM" and "saving first" in capsys.readouterr().err
        with pytest.raises(signals.Interrupted, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def test_errors_of_the_system_name_the_file(capsys, monkeypatch, tmp_path: Path):
    status, told = ended(lambda _: (tmp_path / "no").read_text(), capsys, monkeypatch)
    assert (status, told) == (1, f"error: {tmp_path / 'no'}: No such file or directory\n")


SAYS = """
import dataclasses
from jdllm.runtime import cli

@dataclasses.dataclass(frozen=True)
class Config:
    lines: int = 100_000

def main(config):
    for i in range(config.lines):
        print(i)

cli.run(main, Config, "says")
"""


@pytest.mark.parametrize(
    ("shell", "told", "status"),
    [
        ("{} | head -n 1", "error: what was to read the output has closed it\n", 141),
        ("{} lines=10 > /dev/full", "error: [Errno 28] No space left on device\n", 1),
        ("{} --help | true", None, None),
    ],
)
def test_output_that_nobody_takes(shell: str, told: str, status: int, tmp_path: Path):
    (tmp_path / "says.py").write_text(SAYS)
    command = shell.format(f"{sys.executable} {tmp_path / 'says.py'}")
    words = ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if told:
        assert (done.stderr, done.returncode) == (told, status)


def test_a_platform_that_is_not_there(capsys, monkeypatch):
    def main(_: Config) -> None:
        raise AssertionError

    def none() -> None:
        raise RuntimeError

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(AssertionError):
        cli.run(main, Config, "prog")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", none)
    status, told = ended(main, capsys, monkeypatch)
    assert status == 1 and told.startswith("error: JAX_PLATFORMS=cuda names devices")
