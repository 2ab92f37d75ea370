"""Accuracy against model calls for every rule and cache: the bundled model on held-out puzzles.

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

WIDEST = 45  # calls at the right edge of the plot
BATCH = 25  # rows wait for the slowest of their batch, so small ones are quicker here

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One rule, and the setting of it that is varied; a line of the plot."""

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
    """Accuracy against model calls, by rule."""

    output: Path = FOLDER
    """Folder for decoding_rules.json, .md and .png."""
    limit: int | None = None
    """Documents of each task, at most."""
    rules: str = ""
    """Rules to measure, separated by semicolons (default: all)."""
    plot: bool = False
    """Measure nothing; write the table and the plot of what is there."""


def documents(config: RulesConfig) -> dict[str, int]:
    return {task: min(n, config.limit or n) for task, n in DOCUMENTS.items()}


def measure(llm: LLM, settings: Settings, counts: Mapping[str, int]) -> dict[str, Any]:
    """Share solved, its standard error and mean NFE, by task."""
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


def front(rows: Sequence[Mapping[str, Any]], task: str) -> list[Mapping[str, Any]]:
    """Rows that no other one beats: none has as few calls and solves more, by increasing NFE."""
    best: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[task]["nfe"], -row[task]["solved"])):
        if not best or row[task]["solved"] > best[-1][task]["solved"]:
            best.append(row)
    return best


def line(row: Mapping[str, Any], fronts: Mapping[str, Sequence[Any]] | None = None) -> str:
    cells = []
    for task in DOCUMENTS:
        score = row[task]
        star = " *" if fronts and row in fronts[task] else ""
        cells += [
            f"{100 * score['solved']:.1f} ± {100 * score['stderr']:.1f} %{star}",
            f"{score['nfe']:.2f}",
        ]
    return f"| {row['rule']} | {label(row)} | {' | '.join(cells)} |"


def table(results: Mapping[str, Any]) -> str:
    """The Markdown table; a star marks the Pareto front of a task."""
    rows = results["rows"]
    fronts = {task: front(rows, task) for task in DOCUMENTS}
    counts = ", ".join(f"{rows[0][task]['n']} {task}" for task in DOCUMENTS)
    heads = [part for task in DOCUMENTS for part in (f"{task} solved", "NFE")]
    facts = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join(
        [
            "# Decoding rules: accuracy against model calls",
            "",
            f"Bundled model, held-out documents: {counts}. One block of {BLOCK} columns with the "
            "dual cache, unless it says otherwise; a star marks the Pareto front.",
            "",
            f"`{results['command']}`, {results['date']}, {results['device']}, {facts}",
            "",
            f"| rule | setting | {' | '.join(heads)} |",
            "|---" * (2 + len(heads)) + "|",
            *(line(row, fronts) for row in rows),
            "",
        ]
    )


def draw(results: Mapping[str, Any], path: Path) -> None:
    """One panel a task: a line for each rule, before the Pareto front and its standard error."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = results["rows"]
    names = list(dict.fromkeys(row["rule"] for row in rows))
    figure, panels = pyplot.subplots(1, len(DOCUMENTS), figsize=(13, 5.4), layout="constrained")
    for panel, task in zip(panels, DOCUMENTS, strict=True):
        best = [row[task] for row in front(rows, task)]
        best.append(best[-1] | {"nfe": WIDEST})
        calls = [score["nfe"] for score in best]
        solved = [100 * score["solved"] for score in best]
        error = [100 * score["stderr"] for score in best]
        panel.step(calls, solved, where="post", color="0.75", linewidth=7, zorder=0,
                   label="Pareto front")  # fmt: skip
        panel.fill_between(
            calls,
            [y - e for y, e in zip(solved, error, strict=True)],
            [min(y + e, 100) for y, e in zip(solved, error, strict=True)],
            step="post", color="0.93", zorder=-1, label="± its standard error",
        )  # fmt: skip
        for i, name in enumerate(names):
            mine = sorted((r[task] for r in rows if r["rule"] == name), key=lambda s: s["nfe"])
            panel.plot(
                [score["nfe"] for score in mine],
                [100 * score["solved"] for score in mine],
                label=name, color=f"C{i % 10}", marker="osD^vPX"[i % 7], markersize=6.5,
                markeredgecolor="white", markeredgewidth=0.5, linewidth=1.4,
                linestyle="--" if i >= 10 else "-", clip_on=False,
            )  # fmt: skip
        panel.set_xscale("log")
        panel.set_xlim(0.95, WIDEST)
        ticks = (1, 2, 5, 10, 20, 40)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        low = min(100 * row[task]["solved"] for row in rows)
        panel.set_ylim(min(low, 95) - 3, 101)
        panel.set_xlabel("model calls a puzzle (NFE, log scale)")
        panel.set_ylabel("solved (%)")
        panel.set_title(f"{task}, {rows[0][task]['n']} held-out puzzles")
        panel.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


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
