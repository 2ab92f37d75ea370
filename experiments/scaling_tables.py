"""The rows of experiments/scaling.py as Markdown tables, beside what the cost model predicts."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Predict = Callable[[Row], float]
"""Milliseconds that a row's block step should take."""
NOTHING = "Not measured: `experiments/results/scaling.jsonl` has no row of it on GPUs."
ACROSS = ("requests", "lora", "engine")  # parts whose replicas share nothing: model axis 1
WANTED = ("1x1", "2x1", "1x2", "4x1", "2x2", "1x4")
OTHERS = ("restore",)  # parts whose model has fewer layers by design


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown(rows: Sequence[Row], layers: dict[str, int]) -> list[Row]:
    """Rows of GPUs and of models with all their `layers`."""
    return [
        row
        for row in rows
        if row["platform"] == "gpu"
        and (row["part"] in OTHERS or row["layers"] == layers.get(row["model"]))
    ]


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last measured row of each kind, else the last that says why it was not, in order."""
    found: dict[Any, Row] = {}
    for row in rows:
        names = ("device", "devices", "part", "model", "layers", "mesh", "rows")
        key = tuple(row[name] for name in names)
        if key not in found or measured(row) or not measured(found[key]):
            found[key] = row
    return list(found.values())


def measured(row: Row) -> bool:
    """Whether it has numbers."""
    return not {"failed", "not_run"} & row.keys()


def applies(part: str, mesh: str) -> bool:
    """Whether a part runs on a mesh: what shares nothing on replicas, experts where they split."""
    refused = ("moe",) if mesh.endswith("x1") else ACROSS
    return mesh == "1x1" or part not in refused


def axes(row: Row) -> tuple[int, int]:
    """Of its mesh: data, model."""
    data, model = map(int, row["mesh"].split("x"))
    return data, model


def alone(row: Row, rows: Sequence[Row]) -> Row | None:
    """What one device of the same machine does with a replica's share."""
    names = ("device", "devices", "part", "model", "layers", "rows")
    for other in rows:
        if other["mesh"] == "1x1" and all(other[name] == row[name] for name in names):
            return other
    return None


def gain(row: Row, rows: Sequence[Row], name: str, less: bool = False) -> tuple[str, str]:
    """How many times as fast as one device, and that by the number of devices.

    `name` is a rate of the whole mesh; with `less`, the time of one step of all its rows.
    """
    one, (data, model) = alone(row, rows), axes(row)
    if one is None or not measured(one):
        return "-", "-"
    times = data * one[name] / row[name] if less else row[name] / one[name]
    return f"{times:.2f} of {data * model}", f"{100 * times / (data * model):.0f} %"


def table(header: str, rows: list[list[Any]]) -> str:
    """Markdown; a sentence where there are no rows."""
    if not rows:
        return NOTHING
    names = header.split("|")
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def where(row: Row) -> list[Any]:
    """The first cells of a row."""
    return [f"{row['devices']} {row['device']}", row["mesh"], row["rows"]]


def steps(rows: list[Row], predict: Predict | None) -> str:
    """Block steps, measured and predicted."""
    cells = []
    for row in rows:
        guess = predict(row) if predict else None
        beside = ["-", "-"]
        if guess is not None:
            beside = [f"{guess:.2f}", f"{100 * (guess / row['ms_per_step'] - 1):+.0f} %"]
        cells.append(
            [*where(row), f"{row['ms_per_step']:.2f}", *beside, f"{row['tokens_per_second']:.0f}",
             *gain(row, rows, "ms_per_step", less=True)]
        )  # fmt: skip
    return table(
        "GPUs|mesh|rows per replica|ms per block step|model ms|error|tokens per second"
        "|times one GPU|efficiency", cells,
    )  # fmt: skip


def requests(rows: list[Row], _: Predict | None) -> str:
    """Requests end to end."""
    cells = [
        [*where(row), row["requests"], f"{row['seconds']:.2f}", f"{row['tokens_per_second']:.0f}",
         *gain(row, rows, "tokens_per_second")]
        for row in rows
    ]  # fmt: skip
    return table(
        "GPUs|mesh|rows per replica|requests|seconds|tokens per second|times one GPU|efficiency",
        cells,
    )


def training(rows: list[Row], _: Predict | None) -> str:
    """Steps of LoRA."""
    cells = [
        [*where(row), row["columns"], f"{row['steps_per_second']:.2f}",
         f"{row['tokens_per_second']:.0f}", *gain(row, rows, "tokens_per_second")]
        for row in rows
    ]  # fmt: skip
    return table(
        "GPUs|mesh|rows per replica|columns|steps per second|tokens per second|times one GPU"
        "|efficiency", cells,
    )  # fmt: skip


def restores(rows: list[Row], _: Predict | None) -> str:
    """Restores from the local disk."""
    cells = [
        [*where(row)[:2], row["layers"], f"{row['gigabytes']:.1f}", f"{row['save_seconds']:.1f}",
         f"{row['seconds']:.1f}", f"{row['gigabytes_per_second']:.2f}",
         f"{row['host_growth_gb']:.1f}"]
        for row in rows
    ]  # fmt: skip
    return table(
        "GPUs|mesh|layers|GB|seconds of saving|seconds of restoring|GB per second"
        "|host memory's growth, GB", cells,
    )  # fmt: skip


def engines(rows: list[Row], _: Predict | None) -> str:
    """Engines of replicas, stepped by one thread or each by its own."""
    ways = ("tokens_per_second_one_thread", "tokens_per_second_threads")
    cells = [
        [*where(row), row["requests"],
         *(cell for way in ways for cell in (f"{row[way]:.0f}", gain(row, rows, way)[0]))]
        for row in rows
    ]  # fmt: skip
    return table(
        "GPUs|mesh|slots per replica|requests|tokens per second, one thread|times one GPU"
        "|tokens per second, a thread each|times one GPU", cells,
    )  # fmt: skip


def missing(rows: list[Row], _: Predict | None) -> str:
    """The meshes of up to four devices on which a part has no numbers, and why, where one asked."""
    cells = []
    for name, (part, _show) in KINDS.items():
        own = [row for row in rows if row["part"] == part]
        there = {row["mesh"] for row in own if measured(row)}
        gaps = [mesh for mesh in WANTED if part and applies(part, mesh) and mesh not in there]
        reasons = [
            f"{row['mesh']}, {row['rows']} rows: {row.get('failed', row.get('not_run'))}"
            for row in own
            if not measured(row)
        ]
        if gaps or reasons:
            cells.append([name.removeprefix("run "), ", ".join(gaps), "; ".join(reasons)])
    if not cells:
        return "Nothing."
    return table("part|meshes without numbers|what was asked for, and why there are none", cells)


def runs(rows: list[Row], _: Predict | None) -> str:
    """The commands, on what and when, and how much host memory they took."""
    found: dict[Any, float] = {}
    for row in rows:
        versions = " ".join(f"{name} {text}" for name, text in row["versions"].items())
        key = (
            f"{row['devices']} {row['device']}",
            row["date"][:10],
            versions,
            f"`{row['command']}`",
        )
        found[key] = max(found.get(key, 0.0), row["host_peak_gb"])
    cells = [[*key, f"{peak:.1f}"] for key, peak in found.items()]
    return table("GPUs|date|versions|command|peak host memory, GB", cells)


KINDS: dict[str, tuple[str | None, Callable[[list[Row], Predict | None], str]]] = {
    "run": (None, runs),
    "run steps": ("step", steps),
    "run requests": ("requests", requests),
    "run experts": ("moe", steps),
    "run training": ("lora", training),
    "run restores": ("restore", restores),
    "run engines": ("engine", engines),
    "run missing": (None, missing),
}
"""By name of a table: the part whose measured rows it shows (None: all rows), and how."""


def tables(rows: Sequence[Row], predict: Predict | None = None) -> dict[str, str]:
    """Every table by its name."""
    last = latest(rows)
    return {
        name: show(
            [r for r in last if r["part"] == part and measured(r)] if part else last, predict
        )
        for name, (part, show) in KINDS.items()
    }
