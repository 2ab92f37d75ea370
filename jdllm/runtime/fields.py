"""Fields: settings objects by the dotted names of their values, and whether the types are right."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a finite number"),
    NoneType: (NoneType, "None"),
}
"""Declared type -> what a value must be an instance of, and the words for it."""
SEVERAL: dict[Any, tuple[Any, str]] = {
    tuple[int, ...]: (int, "a tuple of integers"),
    tuple[float, ...]: (float, "a tuple of numbers"),
}
"""Declared type of several values -> the type of each, and the words for it."""


def nested(config: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yields a dataclass and those in its fields, each with the prefix of its dotted names."""
    yield prefix, config
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from nested(kind, f"{prefix}{field.name}.")


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


def check_fields(settings: Any, prefix: str = "") -> None:
    """Refuses a dataclass of settings one of whose values is not of its declared type.

    ValueError that names the field behind `prefix`, its value and what it must be. A whole number
    may stand for a float; True and False are no numbers. Types that KINDS does not list, but for
    Literals, dataclasses and tuples of numbers, pass.
    """
    for name, kinds in _declared(type(settings)):
        value = getattr(settings, name)
        if not any(_fits(value, kind) for kind in kinds):
            words = [word for kind in kinds for word in _words(kind)]
            shown = value if isinstance(value, str) and "Literal" in str(kinds) else repr(value)
            raise ValueError(f"{prefix}{name}={shown} must be {' or '.join(words)}")


@functools.cache
def _declared(owner: type) -> list[tuple[str, tuple[Any, ...]]]:
    """Fields that can be checked, and the types that each may have."""
    found = []
    for name, hint in get_type_hints(owner).items():
        whole = get_origin(hint) is Literal or hint in SEVERAL or not get_args(hint)
        union = (hint,) if whole else get_args(hint)
        if get_origin(hint) is not ClassVar and all(map(_known, union)):
            found.append((name, union))
    return found


def _known(kind: Any) -> bool:
    return kind in KINDS or get_origin(kind) is Literal or kind in SEVERAL or _is_group(kind)


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _fits(value: Any, kind: Any) -> bool:
    if _is_group(kind):
        return isinstance(value, kind)
    if kind in SEVERAL:
        return isinstance(value, tuple) and all(_fits(one, SEVERAL[kind][0]) for one in value)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, KINDS[kind][0]) and (kind is not float or math.isfinite(value))


def _words(kind: Any) -> tuple[str, ...]:
    if _is_group(kind):
        return (f"{kind.__name__}(...)",)
    if kind in SEVERAL:
        return (SEVERAL[kind][1],)
    return get_args(kind) if get_origin(kind) is Literal else (KINDS[kind][1],)
