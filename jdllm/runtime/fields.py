"""Fields: whether the values of a settings object are of the types that it declares."""

import functools
import math
import numbers
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a finite number"),
    NoneType: (NoneType, "None"),
}
"""Declared type -> what a value must be an instance of, and the words for it."""


def check_fields(settings: Any) -> None:
    """Refuses a dataclass of settings one of whose values is not of its declared type.

    ValueError that names the field, its value and what it must be. A whole number may stand for a
    float; True and False are no numbers. Types other than those of KINDS and Literals pass.
    """
    for name, kinds in _declared(type(settings)):
        value = getattr(settings, name)
        if not any(_fits(value, kind) for kind in kinds):
            words = [word for kind in kinds for word in _words(kind)]
            shown = value if isinstance(value, str) and "Literal" in str(kinds) else repr(value)
            raise ValueError(f"{name}={shown} must be {' or '.join(words)}")


@functools.cache
def _declared(owner: type) -> list[tuple[str, tuple[Any, ...]]]:
    """Fields that can be checked, and the types that each may have."""
    found = []
    for name, hint in get_type_hints(owner).items():
        union = get_args(hint) if get_origin(hint) is not Literal and get_args(hint) else (hint,)
        if get_origin(hint) is not ClassVar and all(map(_known, union)):
            found.append((name, union))
    return found


def _known(kind: Any) -> bool:
    return kind in KINDS or get_origin(kind) is Literal


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, KINDS[kind][0]) and (kind is not float or math.isfinite(value))


def _words(kind: Any) -> tuple[str, ...]:
    return get_args(kind) if get_origin(kind) is Literal else (KINDS[kind][1],)
