"""Dials: the numbers in decoding rules that are facts of a row, so that requests which differ in
them alone share slots and programs."""

import dataclasses
from typing import Any

import jax

from jdllm.decode.setup import Setup
from jdllm.unmask.candidate import Gumbel, Warp
from jdllm.unmask.rule import Unmasker
from jdllm.unmask.selection import Threshold

PLACES: dict[str, tuple[str, type, str, float]] = {
    "noise": ("candidate", Gumbel, "temperature", 1.0),
    "heat": ("warp", Warp, "temperature", 1.0),
    "top_p": ("warp", Warp, "top_p", 0.5),
    "threshold": ("selection", Threshold, "threshold", 0.5),
}
"""By name: which part of an Unmasker, of which kind, which field, and what stands there instead."""


def shared(setup: Setup) -> tuple[Setup, dict[str, float]]:
    """The rules without what is a fact of each row, and the dials that were in them.

    The canvas's length is such a fact, too; but a step of a prefix cache feeds so many columns.
    """
    if setup.plan.kind != "prefix" and not setup.block_lengths:
        setup = dataclasses.replace(setup, gen_length=setup.block_length)
    rule, found = setup.unmask, {}
    if not isinstance(rule, Unmasker):
        return setup, {}
    for name, (part, kind, field, instead) in PLACES.items():
        held: Any = getattr(rule, part)
        value = getattr(held, field) if isinstance(held, kind) else None
        if value is None or (name == "heat" and not value) or (name == "top_p" and value >= 1):
            continue  # what is off stays off: another program
        found[name] = float(value)
        rule = dataclasses.replace(rule, **{part: dataclasses.replace(held, **{field: instead})})
    return dataclasses.replace(setup, unmask=rule), found


def turned(setup: Setup, dials: dict[str, jax.Array]) -> Setup:
    """The rules with the rows' own numbers [B] in them, for use inside one traced function."""
    rule: Any = setup.unmask
    for name, value_B in dials.items():
        part, _, field, _ = PLACES[name]
        value = value_B if field == "threshold" else value_B[:, None, None]
        held = dataclasses.replace(getattr(rule, part), **{field: value})
        rule = dataclasses.replace(rule, **{part: held})
    return dataclasses.replace(setup, unmask=rule)
