"""Reads compiled programs: which collectives run in the loops, and from which line of the model.

XLA's text lists computations, each a block of instructions; a loop names its condition and body.
"""

import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
OPCODE = re.compile(r"= (?P<shape>\(.*?\)|\S+) (?P<name>[a-z][\w-]*)\(")
CALLED = re.compile(r"(?:calls|to_apply|condition|body)=%?([\w.-]+)")
LISTED = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
SOURCE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    kind: str
    shape: str
    source: str
    """The named scopes and the operation that it came from."""


def computations(text: str) -> dict[str, list[str]]:
    """Instructions of every computation, by its name."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := HEADER.match(line):
            current = found.setdefault(match[1], [])
        elif " = " in line:
            current.append(line.strip())
    return found


def reached(text: str, start: str, loops: bool) -> list[str]:
    """Instructions of a computation and of all that it calls; those of inner loops if `loops`."""
    known, seen, lines = computations(text), set[str](), list[str]()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in known[name]:
            lines.append(line)
            opcode = OPCODE.search(line)
            if opcode and opcode["name"] == "while" and not loops:
                continue
            lists = ",".join(LISTED.findall(line)).replace("%", "").replace(" ", "")
            waiting += CALLED.findall(line) + [part for part in lists.split(",") if part]
    return lines


def loops(text: str) -> list[tuple[str, str]]:
    """Condition and body of every loop of a compiled program, of inner ones first."""
    pairs = re.findall(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", text)
    return sorted(pairs, key=lambda pair: len(reached(text, pair[1], loops=True)))


def collectives(text: str, start: str, loops: bool = False) -> list[Collective]:
    """What a computation sends between devices, once a run of it."""
    found = []
    for line in reached(text, start, loops):
        opcode = OPCODE.search(line)
        if opcode is None:
            continue
        kind = opcode["name"].removesuffix("-start")
        if kind in KINDS:
            source = SOURCE.search(line)
            found.append(Collective(kind, opcode["shape"], source[1] if source else ""))
    return found
