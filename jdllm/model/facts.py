"""Facts in frozen dataclasses: checked against the types of their fields, and read from JSON."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, get_args, get_origin

Rule = tuple[Callable[[Any], bool], str]


def rule(kind: Any, least: int = 1) -> Rule:
    """The test that a field of type `kind` must pass, and the words for it.

    Whole numbers, alone or in a tuple, count from `least`; other numbers are finite and above 0.
    """
    if kind is int:
        return lambda x: type(x) is int and x >= least, f"a whole number of {least} or more"
    if kind is float:
        return (
            lambda x: isinstance(x, int | float) and type(x) is not bool and 0 < x < math.inf,
            "a number above 0",
        )
    if kind is bool:
        return lambda x: type(x) is bool, "true or false"
    if get_origin(kind) is Literal:
        return lambda x: x in get_args(kind), f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is tuple:
        each, words = rule(get_args(kind)[0], least)
        return lambda x: type(x) is tuple and all(map(each, x)), f"a list, each item {words}"
    if get_origin(kind) is UnionType:  # with None
        inner, words = rule(get_args(kind)[0], least)
        return lambda x: x is None or inner(x), f"{words}, or null"
    words = "text" if kind is str else f"the facts of a {kind.__name__}"
    return lambda x: isinstance(x, kind), words


def check(facts: Any, least: Mapping[str, int], prefix: str = "") -> None:
    """Raises ValueError, naming field, value and rule, where a value is not of its field's type.

    `least` is where whole numbers count from that may be less than 1; `prefix` stands before names.
    """
    for field in dataclasses.fields(facts):
        value = getattr(facts, field.name)
        passes, words = rule(field.type, least.get(field.name, 1))
        if not passes(value):
            raise ValueError(f"{prefix}{field.name}={value!r} must be {words}")


def read[T](kind: type[T], facts: Any, where: str) -> T:
    """A dataclass of what JSON gave for it; ValueError for an unknown or a missing key.

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
