"""The report of plan=edit: a table per task and length, curves, histograms of the stop step."""

import csv
import dataclasses
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jdllm.evaluation.exits import CURVE, FULL, LAST_MASK, Entry
from jdllm.evaluation.paired import Weighed, compare, percentile
from jdllm.evaluation.report import STYLE, can_plot
from jdllm.evaluation.results import TaskResult
from jdllm.runtime.files import atomic_file

Row = dict[str, Any]
COLUMNS = {  # column of the table -> how a value is written
    "schedule": "{}", "rule": "{}", "map": "{}", "scale": "{:g}", "n": "{}", "accuracy": "{:.1f}",
    "stderr": "{:.1f}", "difference": "{:+.1f}", "difference_stderr": "{:.1f}", "p": "{:.3f}",
    "lost": "{:.1f}", "steps": "{:.1f}", "p10": "{:.0f}", "p90": "{:.0f}", "exited": "{:.0f}",
    "fixed": "{:.1f}", "above": "{:+.1f}", "above_stderr": "{:.1f}", "above_p": "{:.3f}",
    "forwards": "{}", "seconds": "{:.1f}", "tokens_per_second": "{:.0f}", "peak_mib": "{:.0f}",
    "rule_cost": "{:+.1f}",
}  # fmt: skip
MEANING = (
    "difference, in points of accuracy, and p (McNemar's exact test) are paired with full decoding "
    "under the same schedule; scale is what the usual threshold was multiplied by; lost is the "
    "share of its right answers that a rule has wrong; steps are model calls per document (mean, "
    "10th and 90th percentile); exited is the share of blocks that were left early; fixed is the "
    "accuracy of leaving every block at a step of its own, the same for all documents, with as "
    "many calls on average (a mixture of two neighbours); above is what the rule has more, with "
    "its standard error, and p against the nearer neighbour; rule cost is what a call takes longer "
    "than without a rule. All shares are percent. Seconds, rates and rule cost are of all "
    "documents of a run. Peak memory is that of the process so far."
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One finished run of the comparison."""

    task: str
    length: int
    entry: Entry
    result: TaskResult
    peak: int | None = None
    """Bytes that the device, or on a CPU the process, has held at most."""

    @property
    def verdicts(self) -> list[bool]:
        """Whether each sample is right."""
        return [sample.metrics[self.result.metric] == 1 for sample in self.result.samples]

    def on(self, half: int | None) -> Self:
        """The line of every other document, from number 0 or 1; the same of all where None.

        What it cost stays that of all.
        """
        if half is None:
            return self
        result, n = self.result, len(self.result.samples[half::2])
        own = dataclasses.replace(result, samples=result.samples[half::2])
        mean = sum(sample.metrics[result.metric] for sample in own.samples) / n
        error = math.sqrt(mean * (1 - mean) / max(n - 1, 1))
        own = dataclasses.replace(
            own, metrics=result.metrics | {result.metric: mean},
            stderr=result.stderr | {result.metric: error},
        )  # fmt: skip
        return dataclasses.replace(self, result=own)

    def beside(self, other: "Line") -> bool:
        """Whether the two are compared: of the same task, length and schedule."""
        mine, theirs = ((line.task, line.length, line.entry.schedule) for line in (self, other))
        return mine == theirs

    @property
    def steps(self) -> list[int]:
        """Model calls of each sample."""
        return [sample.nfe for sample in self.result.samples]

    @property
    def seconds_per_call(self) -> float:
        """Of a batch's call."""
        speed = self.result.speed
        return speed.seconds / speed.calls if speed.calls else 0.0


def row_of(line: Line, full: Line, plain: Line, fixed: Weighed | None) -> Row:
    """What the table says of a run beside full decoding, decoding without a rule, fixed steps."""
    own, entry, result = compare(line.verdicts, full.verdicts), line.entry, line.result
    blocks = sum(len(sample.calls) for sample in result.samples)
    exits = sum(len(sample.exits) for sample in result.samples)
    base, error = plain.seconds_per_call, result.stderr.get(result.metric)
    beside = (None,) * 4 if fixed is None else (*(100 * x for x in fixed[:3]), fixed.p_value)
    return {
        "task": line.task, "length": line.length, "schedule": entry.schedule, "rule": entry.rule,
        "map": entry.map, "scale": entry.scale, "n": result.documents,
        "accuracy": 100 * result.metrics[result.metric],
        "stderr": None if error is None else 100 * error,
        "difference": 100 * own.difference, "difference_stderr": 100 * own.stderr,
        "p": own.p_value, "lost": 100 * own.lost,
        "steps": sum(line.steps) / len(line.steps),
        "p10": percentile(line.steps, 10), "p90": percentile(line.steps, 90),
        "exited": 100 * exits / blocks if blocks else 0.0,
        **dict(zip(("fixed", "above", "above_stderr", "above_p"), beside, strict=True)),
        "forwards": sum(line.steps), "seconds": result.speed.seconds,
        "tokens_per_second": result.speed.tokens_per_second,
        "peak_mib": None if line.peak is None else line.peak / 2**20,
        "rule_cost": 100 * (line.seconds_per_call / base - 1) if base else None,
    }  # fmt: skip


def rows_of(lines: Sequence[Line], fixed: Sequence[Weighed | None] = ()) -> list[Row]:
    """Rows of all lines; those of a task, length and schedule are compared with each other."""
    found = []
    for line, beside in zip(lines, fixed or [None] * len(lines), strict=True):
        full, plain = (
            next(other for other in lines if other.entry.rule == rule and other.beside(line))
            for rule in (FULL, LAST_MASK)
        )
        found.append(row_of(line, full, plain, beside))
    return found


def oracle_row(row: Row, steps: Sequence[int]) -> Row:
    """The row of the oracle's stop: full decoding's verdicts at the least steps that keep them."""
    blank = dict.fromkeys(("exited", "seconds", "tokens_per_second", "peak_mib", "rule_cost"))
    own = {"rule": "oracle", "map": "", "forwards": sum(steps)}
    own |= {"steps": sum(steps) / len(steps)}
    own |= {"p10": percentile(steps, 10), "p90": percentile(steps, 90)}
    return row | blank | own


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Heads, then the rows as text; an absent number is a dash, a column without any left out."""
    shown = {
        name: form for name, form in COLUMNS.items()
        if any(row[name] not in (None, "") for row in rows)
    }  # fmt: skip
    body = [
        ["-" if row[name] in (None, "") else form.format(row[name]) for name, form in shown.items()]
        for row in rows
    ]
    return [[name.replace("_", " ") for name in shown], *body]


def groups(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by task and length."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["length"]), []).append(row)
    return found


def markdown(rows: Sequence[Row], alignment: Mapping[str, Mapping[str, float]]) -> str:
    """The tables in Markdown, and the cosines of maps and B by module."""
    parts = []
    for (task, length), own in groups(rows).items():
        heads, *body = cells(own)
        lines = [heads, ["---"] * len(heads), *body]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"## {task}, {length} columns\n\n{text}")
    if alignment:
        modules = list(next(iter(alignment.values())))
        lines = [["module", *alignment], ["---"] * (len(alignment) + 1)]
        lines += [[m, *(f"{own[m]:+.3f}" for own in alignment.values())] for m in modules]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"## Cosine of map and B, by module\n\n{text}")
    return "\n\n".join([*parts, MEANING]) + "\n"


def figure(rows: Sequence[Row], lines: Sequence[Line]) -> bytes:
    """PNG of one task and length: accuracy against steps, and stop steps by verdict."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(15, 6), dpi=100, layout="constrained")
    left, right = canvas.subplots(1, 2)
    names = list(dict.fromkeys(f"{row['rule']} {row['map']}".strip() for row in rows))
    for number, schedule in enumerate(dict.fromkeys(row["schedule"] for row in rows)):
        own = [row for row in rows if row["schedule"] == schedule]
        curve = [r for r in own if r["rule"] == FULL or r["rule"].startswith(CURVE)]
        curve.sort(key=lambda r: r["steps"])
        spots = [r["steps"] for r in curve], [r["accuracy"] for r in curve]
        left.plot(*spots, "-", color=f"C{number}", label=f"{schedule}: fewer steps")
        for rule in (r for r in own if r not in curve):
            mark = "*" if rule["rule"] == "oracle" else "o"
            left.plot(rule["steps"], rule["accuracy"], mark, color=f"C{number}", markersize=7)
            place = str(names.index(f"{rule['rule']} {rule['map']}".strip()) + 1)
            left.annotate(place, (rule["steps"], rule["accuracy"]), (3, 3),
                          textcoords="offset points", fontsize=7)  # fmt: skip
    for place, name in enumerate(names, 1):
        if name != FULL and not name.startswith(CURVE):
            left.plot([], [], " ", label=f"{place} {name}")
    left.set(xlabel="model calls per document", ylabel="accuracy, %")
    left.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    shown = [line for line in lines if line.entry.rule == "code"] or [
        line for line in lines if not line.entry.rule.startswith((FULL, LAST_MASK, CURVE))
    ]
    if shown:
        line = shown[0]
        pairs = list(zip(line.steps, line.verdicts, strict=True))
        both = [[s for s, ok in pairs if ok == verdict] for verdict in (True, False)]
        right.hist(both, bins=20, label=["right", "wrong"], color=["C2", "C3"])
        right.set(xlabel=f"stop step of {line.entry.rule} {line.entry.map}, {line.entry.schedule}")
        right.legend(frameon=False)
    canvas.suptitle(f"{rows[0]['task']}, {rows[0]['length']} columns")
    data = io.BytesIO()
    canvas.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def sheet(rows: Sequence[Row]) -> bytes:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write(
    folder: Path,
    rows: Sequence[Row],
    lines: Sequence[Line],
    alignment: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, Any],
    tried: Sequence[Row] = (),
) -> list[str]:
    """Writes table.md, table.csv, report.html and, with matplotlib, a PNG per task and length.

    tried.csv has the rows by which thresholds were chosen, if they were. Returns the names.
    """
    text = markdown(rows, alignment)
    outputs = {"table.md": text.encode(), "table.csv": sheet(rows)}
    if tried:
        outputs["tried.csv"] = sheet(tried)
    for (task, length), own in groups(rows).items() if can_plot() else ():
        same = [line for line in lines if (line.task, line.length) == (task, length)]
        outputs[f"{task}-{length}.png"] = figure(own, same)
    images = "".join(f'<p><img alt="{n}" src="{n}"></p>' for n in outputs if n.endswith("png"))
    where = "".join(
        f"<tr><td>{html.escape(str(n))}</td><td>{html.escape(str(v))}</td></tr>"
        for n, v in facts.items()
    )
    outputs["report.html"] = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>jdllm exits</title>'
        f"<style>{STYLE}</style><h1>Exits compared</h1>{images}<pre>{html.escape(text)}</pre>"
        f"<h2>Measured on</h2><table>{where}</table></html>\n"
    ).encode()
    for name, data in outputs.items():
        with atomic_file(folder / name) as file:
            file.write(data)
    return list(outputs)
