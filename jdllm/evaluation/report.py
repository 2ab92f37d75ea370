"""What was found, to look at: tables (text, Markdown, CSV), plots (PNG) and one HTML page."""

import base64
import csv
import html
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jdllm.evaluation.intervals import interval
from jdllm.evaluation.pareto import aup, front
from jdllm.runtime.files import atomic_file

Row = dict[str, Any]
NO_PLOTS = "tables alone are written; plots need matplotlib: python -m pip install -e '.[plot]'"
COLUMNS = {  # column of the table -> how a value is written
    "model": "{}", "task": "{}", "setting": "{}", "n": "{}", "accuracy": "{:.1f}",
    "stderr": "{:.1f}", "interval": "{}", "nfe": "{:.1f}", "tokens_per_forward": "{:.2f}",
    "tokens_per_second": "{:.0f}", "calls_per_second": "{:.1f}", "latency_p50": "{:.2f}",
    "latency_p95": "{:.2f}", "front": "{}",
}  # fmt: skip
STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;
color:#1c2430}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid #d9dee5;text-align:right}th{background:#f2f4f7}
td:nth-child(-n+3),th:nth-child(-n+3){text-align:left;white-space:nowrap}
tr.front td{background:#eaf5ee}
img{max-width:100%}code,pre{background:#f2f4f7;padding:.1rem .3rem;overflow-x:auto}
.wide{overflow-x:auto}"""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under the first row: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by task and model, in the order in which they come."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["model"]), []).append(row)
    return found


def points(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Tokens per forward and accuracy of each row."""
    return [(row["tokens_per_forward"], row["accuracy"]) for row in rows]


def areas(rows: Sequence[Row]) -> list[Row]:
    """AUP of every model on every task."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["task"]] = max(best.get(row["task"], 0.0), row["accuracy"])
    return [
        {"task": task, "model": model, "aup": aup(points(own), best[task])}
        for (task, model), own in groups(rows).items()
    ]


def mark_front(rows: Sequence[Row]) -> list[Row]:
    """The rows with `front`: whether no other setting of the model on the task beats them."""
    marked = []
    for own in groups(rows).values():
        spots = points(own)
        best = {spots[i] for i in front(spots)}
        marked += [
            row | {"front": "yes" if spot in best else ""}
            for row, spot in zip(own, spots, strict=True)
        ]
    return marked


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Heads, then the rows as text; an absent number is a dash."""
    body = [
        ["-" if row[name] is None else form.format(row[name]) for name, form in COLUMNS.items()]
        for row in rows
    ]
    return [[name.replace("_", " ") for name in COLUMNS], *body]


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown, and the areas under it."""
    heads, *body = cells(rows)
    lines = [heads, ["---"] * len(heads), *body]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    under = [f"| {a['task']} | {a['model']} | {a['aup']:.1f} |" for a in areas(rows)]
    return f"{text}\n\n" + "\n".join(["| task | model | AUP |", "|---|---|---|", *under]) + "\n"


def can_plot() -> bool:
    """Whether matplotlib is there; without it a report has no plots."""
    return importlib.util.find_spec("matplotlib") is not None


def figure(rows: Sequence[Row], task: str) -> bytes:
    """PNG of one task: accuracy against model calls, and tokens per forward with the fronts."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(13, 4.8), dpi=100, layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    under = {(a["task"], a["model"]): a["aup"] for a in areas(rows)}
    models = list(dict.fromkeys(row["model"] for row in rows))
    for (name, model), own in groups(rows).items():
        if name == task:
            color = f"C{models.index(model) % 10}"
            note = f"{model}: Pareto front (AUP {under[task, model]:.0f})"
            _scatter(left, own, "nfe", color)
            _scatter(right, own, "tokens_per_forward", color)
            _front(right, own, color, note)
    left.set(xlabel="model calls per sample (NFE)", ylabel="accuracy, %", xscale="log")
    right.set(xlabel="completion tokens per forward")
    for axes in (left, right):
        axes.margins(x=0.08, y=0.15)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    canvas.suptitle(task)
    data = io.BytesIO()
    canvas.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def bar(row: Row) -> tuple[float, float]:
    """How far the error bar of a row reaches down and up, in percentage points: one error each."""
    share = row["accuracy"] / 100
    ends = interval(share, row["stderr"], row["n"], z=1.0)
    if ends is None:
        return row["stderr"] or 0.0, row["stderr"] or 0.0
    return 100 * (share - ends[0]), 100 * (ends[1] - share)


def _scatter(axes: Any, rows: Sequence[Row], column: str, color: str) -> None:
    """Accuracy with its standard error against a column."""
    axes.errorbar(
        [row[column] for row in rows],
        [row["accuracy"] for row in rows],
        yerr=list(zip(*(bar(row) for row in rows), strict=True)),
        fmt="o", color=color, alpha=0.55, capsize=2, markersize=5, linewidth=1,
    )  # fmt: skip


def _front(axes: Any, rows: Sequence[Row], color: str, note: str) -> None:
    """The Pareto front, its points numbered as in the legend, and the area below it."""
    spots = points(rows)
    chosen = front(spots)
    best = [spots[i] for i in chosen]
    start = (min(x for x, _ in spots), best[0][1])  # left of the front its best point stands
    line = [start, *best]
    floor = min(y for _, y in spots)
    names = [
        f"{number} {rows[i]['setting'].removeprefix('rule=')}" for number, i in enumerate(chosen, 1)
    ]
    axes.fill_between(*zip(*line, strict=True), floor, color=color, alpha=0.08, linewidth=0)
    label = "\n".join([note, *names])
    axes.plot(*zip(*line, strict=True), "-", color=color, linewidth=1.6, label=label)
    for number, spot in enumerate(best, 1):
        axes.plot(*spot, "o", color=color, markersize=13)
        axes.annotate(str(number), spot, fontsize=8, color="white", ha="center", va="center")


def page(rows: Sequence[Row], plots: dict[str, bytes], facts: dict[str, Any]) -> str:
    """One self-contained HTML page: what was run on what, plots, areas, table."""
    heads, *body = cells(rows)

    def line(values: Sequence[str], tag: str = "td", kind: str = "") -> str:
        inner = "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)
        return f"<tr{kind}>{inner}</tr>"

    lines = [
        line(values, kind=' class="front"' if row["front"] else "")
        for values, row in zip(body, rows, strict=True)
    ]
    images = "".join(
        f'<h2>{html.escape(task)}</h2><img alt="accuracy against tokens per forward on '
        f'{html.escape(task)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for task, data in plots.items()
    )
    under = [line([a["task"], a["model"], f"{a['aup']:.1f}"]) for a in areas(rows)]
    where = "".join(line([name, str(value)]) for name, value in facts.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>jdllm sweep</title>'
        '<meta name="viewport" content="width=device-width"><style>' + STYLE + "</style>"
        f"<h1>Sweep: {len(rows)} runs</h1>{images}"
        "<h2>AUP</h2><p>Accuracy under parallelism: the area under accuracy over tokens per "
        "forward, speed that costs accuracy weighted down. Higher is better; without any "
        "speed-up it is the accuracy itself.</p>"
        f"<table>{line(['task', 'model', 'AUP'], 'th')}{''.join(under)}</table>"
        "<h2>Runs</h2><p>Shaded: no other setting is both faster and better. Accuracy and its "
        f'standard error in percent.</p><div class="wide"><table>{line(heads, "th")}'
        f"{''.join(lines)}</table></div><h2>Measured on</h2><table>{where}</table></html>\n"
    )


def write_report(folder: Path, rows: Sequence[Row], facts: dict[str, Any]) -> list[str]:
    """Writes table.md, table.csv, report.html and, with matplotlib, a PNG per task.

    Returns their names.
    """
    rows = mark_front(rows)
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    tasks = dict.fromkeys(row["task"] for row in rows)
    plots = {task: figure(rows, task) for task in tasks} if can_plot() else {}
    outputs = {f"{task}.png": data for task, data in plots.items()} | {
        "table.md": markdown(rows).encode(),
        "table.csv": sheet.getvalue().encode(),
        "report.html": page(rows, plots, facts).encode(),
    }
    for name, data in outputs.items():
        with atomic_file(folder / name) as file:
            file.write(data)
    return list(outputs)
