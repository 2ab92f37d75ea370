"""Fields: dataclasses by the dotted names of their values, checked by type, and read from JSON."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

WORDS: dict[Any, str] = {bool: "true or false", str: "text", NoneType: "None"}
"""Types whose values are of that very type, and the words for them."""
Rule = tuple[Callable[[Any], bool], str]
Presets = Mapping[str, Mapping[str, Any]]
"""Settings by name; what a dataclass may have as its class attribute `presets`."""
NUMBERS: dict[Any, type] = {tuple[int, ...]: int, tuple[float, ...]: float}
"""Types of several numbers that are written as one word, and of each of them."""


def nested(config: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yields a dataclass and those in its fields, each with the prefix of its dotted names."""
    yield prefix, config
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from nested(kind, f"{prefix}{field.name}.")


def field_names(config: type) -> list[str]:
    """Every setting of a dataclass by its dotted name, those of nested dataclasses included."""
    groups = {prefix.removesuffix(".") for prefix, _ in nested(config)}
    fields = [p + field.name for p, kind in nested(config) for field in dataclasses.fields(kind)]
    return [name for name in fields if name not in groups] + list(preset_tables(config))


def renamed(config: type) -> dict[str, str]:
    """What settings are called now, by the dotted names that they had."""
    return {
        prefix + old: prefix + new
        for prefix, kind in nested(config)
        for old, new in getattr(kind, "renamed", {}).items()
    }


def preset_tables(config: type) -> dict[str, Presets]:
    """The presets of a dataclass and of those nested in it, by the setting that names one."""
    tables = (
        (f"{prefix}preset", getattr(kind, "presets", None)) for prefix, kind in nested(config)
    )
    return {setting: table for setting, table in tables if table}


def refused_presets(config: type) -> dict[str, Mapping[str, str]]:
    """Presets that cannot be, with the reason why, by the setting that would name one."""
    return {f"{prefix}preset": getattr(kind, "refused", {}) for prefix, kind in nested(config)}


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with mappings and dataclasses among them as one table, by dotted names.

    Lists, of which JSON has no other kind, become tuples.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if dataclasses.is_dataclass(value):
            value = vars(value)
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": one for inner, one in flatten(value).items()}
        else:
            flat[name] = tuple(value) if isinstance(value, list) else value
    return flat


def leaves(settings: Any) -> dict[str, Any]:
    """Returns the values of a dataclass by name, those of nested ones by dotted name."""
    return flatten(
        {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    )


def replaced[T](settings: T, changes: Mapping[str, Any]) -> T:
    """Returns a dataclass of settings with `changes`, by dotted names, in place of its own."""
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    own |= {head: replaced(getattr(settings, head), part) for head, part in inner.items()}
    return dataclasses.replace(settings, **own)  # pyright: ignore[reportArgumentType, reportCallIssue]


def check_fields(settings: Any, prefix: str = "", least: Mapping[str, int] | None = None) -> None:
    """Refuses a dataclass one of whose values is not of its declared type.

    ValueError that names the field behind `prefix`, its value and what it must be. With `least`,
    whole numbers count from what it says by name, or from 1, and other numbers are above 0. What
    `rule` does not know passes.
    """
    for name, kind in _declared(type(settings)):
        value = getattr(settings, name)
        tested = rule(kind, None if least is None else least.get(name, 1))
        if tested and not tested[0](value):
            shown = value if isinstance(value, str) and "Literal" in str(kind) else repr(value)
            raise ValueError(f"{prefix}{name}={shown} must be {tested[1]}")


@functools.cache
def _declared(owner: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(owner)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(owner)]


@functools.cache
def rule(kind: Any, least: int | None = None) -> Rule | None:
    """Returns the test of values that are declared as `kind`, and the words for what passes it.

    Whole numbers count from `least`, and other numbers are finite and, with `least`, above 0. A
    whole number may stand for a float; True and False are no numbers. None for unknown types.
    """
    if get_origin(kind) in (UnionType, Union):
        inner = [rule(one, least) for one in get_args(kind)]
        rules = [one for one in inner if one]
        words = " or ".join(words for _, words in rules)
        return (lambda x: any(test(x) for test, _ in rules), words) if all(inner) else None
    if get_origin(kind) is Literal:
        known = get_args(kind)
        return lambda x: type(x) is str and x in known, " or ".join(map(str, known))
    if get_origin(kind) is tuple and (each := rule(get_args(kind)[0], least)):
        return lambda x: type(x) is tuple and all(map(each[0], x)), f"a list, each item {each[1]}"
    if kind is int:
        words = "a whole number" + (f" of {least} or more" if least is not None else "")
        return lambda x: _is(x, numbers.Integral) and (least is None or x >= least), words
    if kind is float:
        low, words = (-math.inf, "a finite number") if least is None else (0, "a number above 0")
        return lambda x: _is(x, numbers.Real) and low < x < math.inf, words
    if kind in WORDS:
        return lambda x: type(x) is kind, WORDS[kind]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return lambda x: isinstance(x, kind), f"{kind.__name__}(...)"
    return None


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def read[T](kind: type[T], facts: Any, where: str) -> T:
    """Returns a dataclass of what JSON gave for it; ValueError for an unknown or a missing key.

    Lists become tuples; `where` names the object in the sentence.
    """
    if not isinstance(facts, dict):
        raise ValueError(f"{where} must be an object with facts, not {facts!r}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    if unknown := sorted(facts.keys() - {field.name for field in fields}):
        raise ValueError(f"unknown keys in {where}: {', '.join(unknown)}")
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in facts]:
        raise ValueError(f"{where} is incomplete: it lacks {', '.join(missing)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()})
