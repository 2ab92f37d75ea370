"""Help: what a command's settings are, in the words that set them."""

import ast
import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

from jdllm.runtime.fields import nested, preset_tables
from jdllm.runtime.mistakes import choices

WORDS = {bool: "true|false", int: "INTEGER", float: "NUMBER", Path: "PATH"}
GROUPS = {
    "model": "model source tokenizer adapter allow_unknown verifier mesh dtype kernel batch_size "
    "batch",
    "task": "task preset data dataset include_path prompt_file prompt shots chat limit samples "
    "num_samples skip_sample confirm_run_unsafe_code",
    "text": "examples length response_length padding packing group_by_length",
    "training": "objective normalise accumulation epochs remat seed",
    "watching": "log_every logger save_every eval_data eval_every sample_prompt sample_every",
    "output": "output save_dtype json viz fps trace html replay",
}
"""Settings that several commands share, by what they are about; the others are "more"."""
COLUMN = 30  # where the texts begin
FEW = 8  # settings or names that are not worth a group


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a command."""

    name: str
    """As it is set: decode.threshold."""
    values: str
    """The words that it may be set to, or what kind of word."""
    text: str
    """What it is, then its default."""


def described(config: type) -> dict[str, str]:
    """Returns the texts below the fields of a dataclass, those of its bases included."""
    texts: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, SyntaxError):  # made without a file
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                value, name = text.value, field.target
                if isinstance(value, ast.Constant) and isinstance(name, ast.Name):
                    texts[name.id] = inspect.cleandoc(str(value.value))
    return texts


def values_of(kind: Any) -> str:
    """Returns the words for what a setting of this type may be set to."""
    if known := choices(kind):
        return "|".join(known)
    several = typing.get_origin(kind) in (typing.Union, types.UnionType)
    inner = [k for k in typing.get_args(kind) if k is not types.NoneType] if several else [kind]
    return WORDS.get(inner[0], "TEXT")


def _text(text: str, field: dataclasses.Field, default: Any) -> str:
    """What a setting is, and its default where that is worth a word."""
    if default is dataclasses.MISSING:
        return f"{text} (required)"
    if default in (None, (), "") or "(default" in text:
        return text
    shown = str(default).lower() if isinstance(default, bool) else default
    return f"{text} (default: {shown})".strip()


def settings_of(config: type, default: Any = None) -> dict[str, list[Setting]]:
    """Returns the settings of a dataclass by the prefix of their names: "", "decode." and so on."""
    found: dict[str, list[Setting]] = {}
    for prefix, owner in nested(config):
        texts, hints = described(owner), typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if dataclasses.is_dataclass(hints[field.name]):
                continue
            given = field.default
            if field.default_factory is not dataclasses.MISSING:
                given = field.default_factory()
            if default is not None and not prefix:
                given = getattr(default, field.name)
            text = _text(texts.get(field.name, ""), field, given)
            one = Setting(prefix + field.name, values_of(hints[field.name]), text)
            found.setdefault(prefix, []).append(one)
    for name, table in preset_tables(config).items():
        prefix = name.removesuffix("preset")
        one = Setting(name, "NAME", f"Settings by name: {', '.join(filter(None, table))}.")
        same = [other for other in found[prefix] if other.name == name]
        merged = dataclasses.replace(one, text=f"{same[0].text} {one.text}") if same else one
        found[prefix] = [merged, *(other for other in found[prefix] if other.name != name)]
    return found


def grouped(settings: list[Setting]) -> dict[str, list[Setting]]:
    """Returns a command's own settings by what they are about; few of them are one group."""
    if len(settings) <= FEW:
        return {"settings": settings}
    home = {name: group for group, names in GROUPS.items() for name in names.split()}
    groups: dict[str, list[Setting]] = {name: [] for name in (*GROUPS, "more")}
    for setting in settings:
        groups[home.get(setting.name, "more")].append(setting)
    return {name: some for name, some in groups.items() if some}


def examples(prog: str, doc: str | None) -> list[str]:
    """Returns the lines of a text, such as a door's docstring, that call `prog`: three at most."""
    lines = [line.strip() for line in (doc or "").splitlines()]
    return [line for line in lines if f"{line} ".startswith(f"{prog} ")][:3]


def _first(text: str) -> str:
    """The first sentence, and the default behind the last."""
    sentence = re.split(r"(?<=[.;])\s+(?=[A-Z(])|\n\n", text, maxsplit=1)[0]
    default = re.search(r"\((default: [^()]*|required)\)$", text)
    return sentence if not default or default[0] in sentence else f"{sentence} {default[0]}"


def _lines(setting: Setting, width: int, full: bool) -> list[str]:
    """One setting as it is shown."""
    word = f"  {setting.name}={setting.values}"
    text = " ".join((setting.text if full else _first(setting.text)).split())
    if not full and len(text) > 3 * width:
        text = "Settings by name; --help-all lists the names."
    body = textwrap.wrap(text, width - COLUMN) or [""]
    rest = [" " * COLUMN + line for line in body]
    if len(word) < COLUMN:
        return [(word.ljust(COLUMN) + body[0]).rstrip(), *rest[1:]]
    return [word, *(rest if text else [])]


def page(config: type, prog: str, default: Any = None, full: bool = False) -> str:
    """Returns the help of a command: examples, its own settings, then those of each nested group.

    The groups are their settings' names alone, each text a sentence, unless `full`.
    """
    width = max(60, min(100, shutil.get_terminal_size((100, 24)).columns))
    lines = [f"usage: {prog} [key=value ...]", "", inspect.getdoc(config) or ""]
    if shown := examples(prog, sys.modules["__main__"].__doc__):
        lines += ["", "examples", *(f"  {line}" for line in shown)]
    for prefix, settings in settings_of(config, default).items():
        owner = dict(nested(config))[prefix]
        if not prefix:
            for title, some in grouped(settings).items():
                lines += ["", title, *(line for s in some for line in _lines(s, width, full))]
            continue
        about = (inspect.getdoc(owner) or "").split("\n\n")[0].replace("\n", " ")
        lines += ["", *textwrap.wrap(f"{prefix}NAME=VALUE: {about}", width)]
        if full:
            lines += [line for s in settings for line in _lines(s, width, full)]
        else:
            names = " ".join(s.name.removeprefix(prefix) for s in settings)
            indent = "  "
            lines += textwrap.wrap(
                names, width, initial_indent=indent, subsequent_indent=indent,
                break_on_hyphens=False,
            )  # fmt: skip
            lists = [s for s in settings if s.values == "NAME"]
            lines += [line for s in lists for line in _lines(s, width, full)]
    if not full:
        lines += ["", "--help-all tells more about each setting, those of the groups included."]
    return "\n".join(lines)
