"""Accuracy and model calls of every rule and cache: the bundled model on held-out puzzles.

python experiments/decoding_rules.py           (half an hour on two cores; continues where it was)
python experiments/decoding_rules.py plot=true            (table and plot of what is measured)
"""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jdllm import LLM, DecodeConfig
from jdllm.load import enable_compilation_cache
from jdllm.runtime import cli
from jdllm.runtime.files import atomic_file
from jdllm.tasks import TASKS

FOLDER = Path(__file__).resolve().parent / "results"
DOCUMENTS = {"sudoku": 50, "countdown": 150}  # sudoku is easy for nearly every rule
BLOCK = 40  # the bundled model's own: one block over all of its canvas
SHORT = 8  # blocks for the comparison of caches

BATCH = 25  # rows wait for the slowest of their batch, so small ones are quicker here

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One rule, and the setting of it that is varied: one group of the plot."""

    name: str
    fixed: Settings
    varied: Sequence[Settings]


def tokens(*counts: int) -> list[Settings]:
    return [{"tokens_per_step": n} for n in counts]


def thresholds(*values: float) -> list[Settings]:
    return [{"threshold": value} for value in values]


def quota(remasking: str) -> Settings:
    return {"rule": "quota", "remasking": remasking}


SWEEPS = (
    Sweep("threshold", {}, thresholds(0.5, 0.7, 0.9, 0.99)),
    Sweep("quota, confidence", quota("low_confidence"), tokens(1, 2, 4, 8, 20, 40)),
    Sweep("factor", {"rule": "factor"}, [{"factor": f} for f in (0.1, 0.5, 1.0)]),
    Sweep(
        "hierarchy",
        {"rule": "hierarchy"},
        [
            {"threshold": high, "low_threshold": low}
            for high, low in ((0.92, 0.62), (0.8, 0.5), (0.8, 0.3))
        ],
    ),
    Sweep("credit", {"credit.alpha": 0.7, "edge": "slack"}, thresholds(0.7, 0.9, 0.99)),
    Sweep("entropy threshold", {"remasking": "entropy"}, thresholds(0.1, 0.5)),
    Sweep(
        "entropy bound",
        {"rule": "entropy_bound", "remasking": "entropy"},
        [{"entropy_bound": bound} for bound in (0.05, 0.35, 1.0)],
    ),
    Sweep("quota, margin", quota("topk_margin"), tokens(4, 8)),
    Sweep("quota, entropy", quota("entropy"), tokens(4, 8)),
    Sweep("quota, left to right", quota("leftright"), tokens(4, 8)),
    Sweep("quota, random", quota("random"), tokens(4, 8)),
    Sweep("Dream's origin", {"rule": "origin", "schedule": "timesteps"}, [{"steps": 5}]),
    Sweep("quota 1, stable stop", quota("low_confidence"), [{"stable_steps": n} for n in (1, 2)]),
    Sweep("IterSmooth", {"edge": "slack", "smooth.weight": 0.3}, thresholds(0.9)),
    *(
        Sweep(f"blocks of {SHORT}, {name}", {"block_length": SHORT, **plan}, thresholds(0.9))
        for name, plan in {
            "no cache": {"cache": "none"},
            "prefix": {"cache": "prefix"},
            "dual": {"cache": "dual"},
            "dual, vicinity 8": {"cache": "dual", "vicinity.before": 8, "vicinity.after": 8},
        }.items()
    ),
)


@dataclasses.dataclass(frozen=True)
class RulesConfig:
    """Measures accuracy and model calls of every rule."""

    output: Path = FOLDER
    """Folder for decoding_rules.json, .md and .png."""
    limit: int | None = None
    """The most documents per task."""
    rules: str = ""
    """Rules to measure, separated by semicolons (default: all)."""
    plot: bool = False
    """Measure nothing; write the table and the plot of what is there."""


def documents(config: RulesConfig) -> dict[str, int]:
    return {task: min(n, config.limit or n) for task, n in DOCUMENTS.items()}


def measure(llm: LLM, settings: Settings, counts: Mapping[str, int]) -> dict[str, Any]:
    """Returns the share solved, its standard error and the mean NFE, per task."""
    decode = DecodeConfig.of({"block_length": BLOCK, "cache": "dual", **settings})
    row: dict[str, Any] = {}
    for name, n in counts.items():
        task = TASKS[name]
        docs = task.generate(n, 0, held_out=True)
        found = llm.generate([task.prompt(doc) for doc in docs], decode, batch_size=BATCH)
        scores = [
            task.grade(doc, completion.text or "")["solved"]
            for doc, completion in zip(docs, found, strict=True)
        ]
        solved = sum(scores) / n
        row[name] = {
            "n": n,
            "solved": solved,
            "stderr": (solved * (1 - solved) / max(n - 1, 1)) ** 0.5,
            "nfe": sum(completion.nfe for completion in found) / n,
        }
    return row


def write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def measure_all(config: RulesConfig, path: Path) -> None:
    """Measures what the file does not hold yet; every row is stored as soon as it is there."""
    enable_compilation_cache()
    llm = LLM.load("bundled", "1x1")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    chosen = [name.strip() for name in config.rules.split(";") if name.strip()]
    counts = documents(config)
    done = [(row["rule"], row["settings"], {t: row[t]["n"] for t in counts}) for row in rows]
    results = {
        "command": "python experiments/decoding_rules.py",
        "model": "bundled",
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    for sweep in SWEEPS:
        for varied in sweep.varied:
            settings = {**sweep.fixed, **varied}
            new = (sweep.name, settings, counts) not in done
            if new and (not chosen or sweep.name in chosen):
                row = {"rule": sweep.name, "varied": dict(varied), "settings": settings}
                row |= measure(llm, settings, counts)
                rows.append(row)
                write(path, json.dumps(results, indent=1) + "\n")
                print(line(row), flush=True)


def label(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in row["varied"].items())


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share measured on n documents; it also serves 0 and 1."""
    z = 1.96
    centre, spread = (
        share + z**2 / (2 * n),
        z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5,
    )
    return (centre - spread) / (1 + z**2 / n), (centre + spread) / (1 + z**2 / n)


def line(row: Mapping[str, Any]) -> str:
    cells = []
    for task in DOCUMENTS:
        solved, n = row[task]["solved"], row[task]["n"]
        low, high = interval(solved, n)
        cells += [
            f"{round(solved * n)} of {n}",
            f"{100 * low:.1f} to {100 * high:.1f} %",
            f"{row[task]['nfe']:.2f}",
        ]
    return f"| {row['rule']} | {label(row)} | {' | '.join(cells)} |"


def table(results: Mapping[str, Any]) -> str:
    """Returns the Markdown table, a line per setting."""
    rows = results["rows"]
    counts = ", ".join(f"{rows[0][task]['n']} {task}" for task in DOCUMENTS)
    heads = [part for task in DOCUMENTS for part in (f"{task} solved", "95 % interval", "NFE")]
    facts = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join(
        [
            "# Decoding rules: accuracy and model calls",
            "",
            f"The bundled model on held-out puzzles: {counts}. One block of {BLOCK} columns with "
            "the dual cache, unless the rule says otherwise. NFE is the mean number of model calls "
            "per puzzle. Intervals are Wilson's; they overlap too much to rank the rules.",
            "",
            f"`{results['command']}`, {results['date']}, {results['device']}, {facts}",
            "",
            f"| rule | setting | {' | '.join(heads)} |",
            "|---" * (2 + len(heads)) + "|",
            *(line(row) for row in rows),
            "",
        ]
    )


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws a line per setting: its calls per puzzle, and what it solves with its interval."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    rows = results["rows"]
    names = list(dict.fromkeys(row["rule"] for row in rows))
    rows = sorted(rows, key=lambda row: names.index(row["rule"]))
    places = [i + names.index(row["rule"]) * 0.6 for i, row in enumerate(rows)]
    figure, (calls, *panels) = pyplot.subplots(
        1, 1 + len(DOCUMENTS), sharey=True, figsize=(12, 0.2 * places[-1] + 2),
        width_ratios=(1.3, 0.9, 0.9), layout="constrained",
    )  # fmt: skip
    marks = dict(zip(DOCUMENTS, (("o", "tab:blue", -0.12), ("D", "tab:orange", 0.12)), strict=True))
    for panel, (task, (marker, colour, shift)) in zip(panels, marks.items(), strict=True):
        nfe = [row[task]["nfe"] for row in rows]
        shifted = [place + shift for place in places]
        calls.plot(nfe, shifted, marker, color=colour, label=task, markersize=4.5)
        n = rows[0][task]["n"]
        solved = [100 * row[task]["solved"] for row in rows]
        ends = [[100 * end for end in interval(row[task]["solved"], n)] for row in rows]
        panel.axvspan(*ends[slowest(rows, task)], color="0.92", zorder=0)
        panel.hlines(places, *zip(*ends, strict=True), color=colour, alpha=0.45, linewidth=2)
        panel.plot(solved, places, marker, color=colour, markersize=4.5)
        panel.set_xlim(70, 101)
        panel.set_xlabel(f"{task}: solved of {n} puzzles (%)")
    calls.set_xscale("log")
    ticks = (1, 2, 5, 10, 20, 40)
    calls.set_xticks(ticks, [str(tick) for tick in ticks])
    calls.xaxis.set_minor_locator(NullLocator())
    calls.set_xlabel("model calls per puzzle (NFE, mean, log scale)")
    calls.set_yticks(places, [f"{row['rule']}: {label(row)}" for row in rows], fontsize=8)
    calls.set_ylim(places[-1] + 0.8, places[0] - 0.8)
    calls.legend(loc="lower right", frameon=True)
    for panel in (calls, *panels):
        panel.grid(axis="x", alpha=0.3)
        panel.tick_params(axis="y", length=0)
    figure.suptitle(
        "Bars: Wilson's 95 % intervals. Grey: the interval of the setting with the most calls.\n"
        "Where bars overlap this much, the accuracies cannot be told apart; the calls can.",
        fontsize=10,
    )
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def slowest(rows: Sequence[Mapping[str, Any]], task: str) -> int:
    """Returns the place of the row with the most calls."""
    return max(range(len(rows)), key=lambda i: rows[i][task]["nfe"])


def main(config: RulesConfig) -> None:
    """Measures, then writes the table and the plot beside the JSON."""
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "decoding_rules.json"
    if not config.plot:
        measure_all(config, path)
    results = json.loads(path.read_text())
    write(path.with_suffix(".md"), table(results))
    draw(results, path.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    cli.run(main, RulesConfig, "python experiments/decoding_rules.py")
