"""Reads compiled programs for what their loops send between devices, and for which part.

XLA's text lists computations, each a block of instructions; loops, branches and calls name others.
"""

import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
OPCODE = re.compile(r"= (?P<shape>\(.*?\)|\S+) (?P<name>[a-z][\w-]*)\(")
LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
CALLED = re.compile(r"(?:calls|to_apply|condition|body)=%?([\w.-]+)")
LISTED = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
SOURCE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    kind: str
    shape: str
    source: str
    """The named scopes and the operation that it came from."""

    @property
    def elements(self) -> int:
        """Returns the number of elements of the result, of all arrays if it is a tuple."""
        total = 0
        for dims in re.findall(r"\w\[([\d,]*)\]", self.shape):
            size = 1
            for n in filter(None, dims.split(",")):
                size *= int(n)
            total += size
        return total


def computations(text: str) -> dict[str, list[str]]:
    """Returns the instructions of every computation, by its name."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := HEADER.match(line):
            current = found.setdefault(match[1], [])
        elif " = " in line:
            current.append(line.strip())
    return found


def loops(text: str) -> list[tuple[str, str]]:
    """Returns the condition and the body of every loop."""
    return LOOP.findall(text)


def reached(text: str, start: str) -> set[str]:
    """Returns a computation and all that it calls, inner loops and all branches included."""
    known, seen, waiting = computations(text), set[str](), [start]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in known[name]:
            lists = re.sub("[% ]", "", ",".join(LISTED.findall(line)))
            waiting += CALLED.findall(line) + [part for part in lists.split(",") if part]
    return seen


def collectives(text: str, computation: str) -> list[Collective]:
    """Returns what a computation itself sends; a pass of the model is whole within one."""
    found = []
    for line in computations(text)[computation]:
        opcode = OPCODE.search(line)
        kind = opcode["name"].removesuffix("-start") if opcode else ""
        if opcode and kind in KINDS:
            source = SOURCE.search(line)
            found.append(Collective(kind, opcode["shape"], source[1] if source else ""))
    return found


def in_loops(text: str) -> tuple[list[list[Collective]], list[list[Collective]]]:
    """Returns what loops send, per condition and per sending computation of their bodies."""
    conditions = {condition for condition, _ in loops(text)}
    bodies = {name for _, body in loops(text) for name in reached(text, body)} - conditions
    sent = [[collectives(text, name) for name in sorted(group)] for group in (conditions, bodies)]
    return [x for x in sent[0] if x], [x for x in sent[1] if x]
