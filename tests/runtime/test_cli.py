"""The command-line grammar."""

import dataclasses
from typing import ClassVar

import pytest

from jdllm.runtime import cli


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


def test_a_rule_between_fields_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["count=0"], "prog")
    assert stop.value.code == 2
    assert "count=0 makes no sense: ask for at least 1" in capsys.readouterr().err


def test_help_lists_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["--help"], "prog")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in ("--name", "What it is called", "(default: x)", "--inner.threshold", "0.9"):
        assert part in text


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
    assert "did you mean decode.preset," in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.parse(Outer, ["--help"], "prog")
    text = capsys.readouterr().out
    assert "A command with presets." in text and "there are quick, exact." in text
