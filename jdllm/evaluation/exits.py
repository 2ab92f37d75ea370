"""What plan=edit runs: exits, maps and schedules, and what they are to be compared with."""

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jdllm.decode import DecodeConfig
from jdllm.decode.aims import MAPS, WINDOW
from jdllm.decode.presets import PRESETS, edit
from jdllm.decode.rules import make_exit
from jdllm.store.dynamics import FILE, read_facts

TASKS = "countdown,sudoku,math500_boxed,gsm8k_boxed"
LENGTHS = (128, 256, 512)
FULL, LAST_MASK, CURVE = "full", "last-mask", "fewer-steps"
MATCHED = "step-matched"
SCHEDULES = ("gaussian", "uniform")
FIRST_GUESS = (4, 5, 6, 0.05)  # EDIT's settings of every first block, for other tasks and lengths
SHARES = (0.75, 0.5, 0.375, 0.25)  # of the steps, for the curve of plain decoding
FIXED = (0.375, 0.5, 0.625, 0.75)  # of a block's steps, for exits at a fixed one
ALONE: dict[str, dict[str, Any]] = {
    "unchanged": {"exit.mode": "unchanged"},
    "entropy": {"exit.mode": "entropy"},
    "prophet": {"exit.mode": "prophet"},
    "sched": {"exit.mode": "sched"},
    "klass": {"rule": "klass", "threshold": 0.6, "klass.kl": 0.015},
}
"""Rules that read the model's predictions alone, on top of the schedule."""
UNITS = {"unchanged": 0.05}
"""What scales multiply of a mode whose usual threshold is 0."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the comparison."""

    rule: str
    """full (every step is made), last-mask, an exit's mode, klass, or fewer-steps."""
    map: str
    """What an adapter's activations are compared with, or nothing."""
    schedule: str
    decode: DecodeConfig
    scale: float = 1.0
    """What its usual threshold is multiplied by."""


def base_settings(task: str, length: int, block: int = 0) -> dict[str, Any]:
    """EDIT's settings for a task and length; for others its first block's, in blocks up to 64.

    With `block` all blocks have so many columns.
    """
    kind = task.removesuffix("_boxed").removesuffix("_d1")
    name = f"edit-{kind}-{length}"
    known = name in PRESETS
    found = dict(PRESETS[name] if known else edit(length, FIRST_GUESS))
    if block:
        found.pop("block_lengths", None)
    if block or not known:
        found["block_length"] = block or min(64, length)
    return found


def recorded_maps(adapter: Path | None) -> list[str]:
    """The maps that an adapter's folder has what it takes for; none without an adapter.

    ValueError where it has no dynamics.
    """
    if adapter is None:
        return []
    windows = read_facts(adapter)["windows"]
    return [name for name in MAPS if WINDOW.get(name, windows[0]) in windows]


def entries(
    task: str, length: int, adapter: Path | None, rules: str = "", maps: str = "",
    schedules: str = "", scales: Sequence[float] = (), block: int = 0,
) -> list[Entry]:  # fmt: skip
    """All lines for a task and length, of those that comma-separated patterns match.

    A rule with a threshold has a line for every one of the `scales` that multiply it.
    """
    base = base_settings(task, length, block)
    plain = {name: value for name, value in base.items() if not name.startswith("exit.")}
    found = []
    for schedule in SCHEDULES:
        wide = {"gaussian.width": (1e6,)} if schedule == "uniform" else {}
        for rule, name, settings in _lines(base, plain, recorded_maps(adapter)):
            decode = DecodeConfig.of(settings | wide | {"stop": "none"})
            found += scaled(Entry(rule, name, schedule, decode), scales)
    more = "" if adapter else "; code and paper need adapter=FOLDER"
    found = matching(found, "rule", rules, (FULL, LAST_MASK), more)
    found = matching(found, "map", maps, ("",), more)
    return matching(found, "schedule", schedules)


def matching(
    entries: Sequence[Entry], name: str, words: str, always: tuple[str, ...] = (), more: str = ""
) -> list[Entry]:
    """The entries whose rule, map or schedule comma-separated patterns match; all without any."""
    if not words:
        return list(entries)
    known = dict.fromkeys(getattr(one, name) for one in entries)
    patterns = [one.strip() for one in words.split(",")]
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            there = ", ".join(filter(None, known)) or "none"
            raise ValueError(f"{name}s={pattern} matches no {name}; there are {there}{more}")
    kept = {one for pattern in (*always, *patterns) for one in fnmatch.filter(known, pattern)}
    return [one for one in entries if getattr(one, name) in kept | set(always)]


def scaled(entry: Entry, scales: Sequence[float]) -> list[Entry]:
    """The entry at each scale of its threshold; as it is without scales, or a threshold."""
    decode, found = entry.decode, []
    for scale in scales if entry.rule in ALONE or entry.map else ():
        if entry.rule == "klass":
            own = {"klass": dataclasses.replace(decode.klass, kl=scale * decode.klass.kl)}
        else:
            usual = (UNITS[entry.rule],) if entry.rule in UNITS else make_exit(decode).thresholds
            exit = dataclasses.replace(decode.exit, threshold=tuple(scale * x for x in usual))
            own = {"exit": exit}
        settings = dataclasses.replace(decode, **own)
        found.append(dataclasses.replace(entry, decode=settings, scale=scale))
    return found or [entry]


def _lines(
    base: dict[str, Any], plain: dict[str, Any], maps: list[str]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Rule, map and settings of every line under one schedule, the full decoding first."""
    yield FULL, "", plain | {"parity": "edit"}
    yield LAST_MASK, "", plain
    for name in maps:
        yield "code", name, base | {"exit.map": name}
    for name in maps:
        own = {name: value for name, value in base.items() if name not in ("exit.threshold",)}
        yield "paper", name, own | {"exit.mode": "paper", "exit.map": name}
    block = max(plain.get("block_lengths", ()), default=plain.get("block_length", 64))
    steps = block * plain["steps"] // plain["gen_length"]
    for share in FIXED:
        after = {"exit.mode": "step", "exit.threshold": (max(round(share * steps), 1),)}
        yield f"step-{share:g}", "", plain | after | {"exit.polish": (2,)}
    for name, settings in ALONE.items():
        yield name, "", plain | settings
    for share in SHARES:
        fewer = max(round(share * plain["steps"]), 1)
        yield f"{CURVE}-{share:g}", "", plain | {"steps": fewer}


def described(adapter: Path | None) -> str:
    """What is left out, in a sentence; nothing where all is there."""
    if adapter is None:
        return "without adapter= the rules code and paper are left out"
    missing = [name for name in MAPS if name not in recorded_maps(adapter)]
    return f"{adapter / FILE} has no windows for the maps {', '.join(missing)}" if missing else ""
