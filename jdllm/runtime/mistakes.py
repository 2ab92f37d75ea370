"""Mistakes in `key=value` words: each is told in one sentence that has the fix."""

import dataclasses
import itertools
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

from jdllm.runtime.fields import NUMBERS, field_names, nested, renamed, rule
from jdllm.runtime.hints import asked, nearest_choices, nearest_settings

TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
READERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    bool: lambda word: TRUTH[word.lower()],
    types.NoneType: {"None": None}.__getitem__,
    **{
        several: lambda word, kind=kind: [kind(one) for one in word.split(",") if one]
        for several, kind in NUMBERS.items()
    },
}
"""How a word becomes a value of a type."""


def setting_of(option: str) -> str:
    """Returns the setting that an option sets; "" for other words."""
    return option[2:].partition("=")[0].replace("-", "_") if option.startswith("--") else ""


def listed(names: Iterable[str]) -> str:
    """Returns names in a sentence, where none of them is near to what was written."""
    return f"there are {', '.join(names)}"


def as_typed(text: str) -> str:
    """Returns a text in which commands are called as this process was: jdllm eval, by that name."""
    short = any(Path(word).name == "jdllm" for word in sys.orig_argv[:2])
    return text.replace("python -m jdllm.", "jdllm ") if short else text


def refuse(sentence: str) -> NoReturn:
    """Ends the process with status 2, which is what a mistyped command line has."""
    print(f"error: {as_typed(sentence)}", file=sys.stderr)
    raise SystemExit(2)


def check_names(config: type, options: Sequence[str], prog: str) -> None:
    """Refuses an option that is no setting, with the new or the nearest names."""
    names, old_names = field_names(config), renamed(config)
    for option in options:
        name = option.removeprefix("--").partition("=")[0].replace("-", "_")
        if not option.startswith("--") or name in names:
            continue
        now = [new for old, new in old_names.items() if f".{old}".endswith(f".{name}")]
        hint = asked(nearest_settings(name, names)) or f"{listed(names)}."
        hint = f"it is {now[0]} now" if now else hint
        refuse(f"{prog} has no setting {name!r}; {hint}")


def kinds_of(kind: Any) -> tuple[Any, ...]:
    """Returns the types that a declared one is made of; itself where it is one."""
    several = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if several else (kind,)


def choices(kind: Any) -> list[str]:
    """Returns the words that a Literal, or one that may be None, allows; [] for other types."""
    kinds = kinds_of(kind)
    if not all(one is types.NoneType or typing.get_origin(one) is Literal for one in kinds):
        return []
    words = [str(word) for one in kinds for word in typing.get_args(one)]
    return words + ["None"] * (types.NoneType in kinds)


def check_values(config: type, options: Sequence[str], prog: str) -> None:
    """Refuses a word that its setting cannot be, with the nearest choices or with what it must be.

    tyro would say the same in a dozen lines that name types.
    """
    words = {
        setting_of(option): option.partition("=")[2] if "=" in option else after
        for option, after in itertools.pairwise([*options, ""])
    }
    for prefix, group in nested(config):
        for name, kind in get_type_hints(group).items():
            if (word := words.get(prefix + name)) is None:
                continue
            if (known := choices(kind)) and word not in known:
                near = nearest_choices(word, known)
                hint = f"; did you mean {', or '.join(near)}?" if near else ""
                refuse(
                    f"{prog} knows no {prefix}{name}={word}; it is one of {', '.join(known)}{hint}"
                )
            tested = rule(kind)
            if tested and not known and not _readable(word, kinds_of(kind)):
                refuse(f"{prefix}{name}={word} must be {tested[1]}")


def _readable(word: str, kinds: Sequence[Any]) -> bool:
    """Whether a word reads as a value of one of the types; so it does where one has no reader."""
    for kind in kinds:
        if kind not in READERS:
            return True
        try:
            READERS[kind](word)
            return True
        except (ValueError, KeyError):
            continue
    return False


def check_given(config: type, options: Sequence[str], prog: str) -> None:
    """Refuses a command line without one of the settings that have no default."""
    given = {setting_of(option) for option in options}
    for field in dataclasses.fields(config):
        optional = field.default is not field.default_factory  # one of them is MISSING, or both
        if not optional and field.name not in given:
            refuse(f"{prog} needs {field.name}=; {prog} --help says what it is")


def unboxed(text: str) -> str:
    """Returns one sentence of what tyro draws a box around; other text as it is.

    A group of settings that refused its values stands before the sentence.
    """
    words = " ".join(line.strip("│ ") for line in text.splitlines())
    body, *_ = re.split(r" [─-]{8,} ", words[words.find("Error parsing") :])
    found = re.match(r"Error parsing (\S+): (.*)", body)
    if not found:
        return text
    place, sentence = found.groups()
    return as_typed(f"error: {sentence if place[0].isupper() else f'{place}: {sentence}'}\n")
