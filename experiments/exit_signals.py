"""Every exit's signal on one and the same decoding: what a map knows beyond its controls.

python experiments/exit_signals.py adapter=FOLDER output=runs/signals      (an hour on two cores)

A rule that leaves a block does nothing until it does. So one full decoding, of one block over the
whole completion, holds what every rule would have seen until it left, for every threshold; a block
that is left is filled at once with the best tokens of that call. All rules, maps and thresholds are
read off these runs, and some are decoded for themselves to see that they come out the same.
"""

import dataclasses
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from exit_recording import SignalsConfig, record, replayed

from jdllm import stop
from jdllm.completion import complete
from jdllm.decode import DecodeConfig
from jdllm.decode.aims import MAPS
from jdllm.decode.groups import Exit as Settings
from jdllm.decode.rules import EXITS, make_exit
from jdllm.evaluation import exit_report, exits, held_out
from jdllm.evaluation.exit_report import Line
from jdllm.evaluation.exits import UNITS, Entry
from jdllm.evaluation.oracle import settled
from jdllm.evaluation.paired import Mixture, compare, mixed, weigh
from jdllm.evaluation.results import Sample, TaskResult
from jdllm.evaluation.speed import Speed
from jdllm.llm import LLM
from jdllm.load import enable_compilation_cache
from jdllm.runtime import cli, files
from jdllm.runtime.environment import environment
from jdllm.stop.exit import Prophet, Unchanged
from jdllm.tasks import TASKS

SCALES = tuple(2 ** (k / 4) for k in range(-64, 25))  # of usual thresholds
CHECKED = {
    "code mean": 2.0, "code shuffled": 0.25, "code-1 weights": 1.0, "paper weights": 2.0**-8,
    "entropy": 2.0, "sched": 0.5,
}  # fmt: skip
"""Rules that are decoded for themselves, and the scale of their threshold."""
QUICK = {"code-1": ("code", 1)}
"""EDIT's rule with another patience: their mode, and so many calm steps."""
BUDGETS = (0.7, 0.8, 0.9)  # of the calls up to the last mask
Stops = list[tuple[Entry, np.ndarray]]
"""Entries of a rule by scale, and after which call each leaves every document."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What the batches of one schedule hold together; letters: documents D, steps S, signals K."""

    config: SignalsConfig
    names: list[str]
    values_DSK: np.ndarray
    texts: list[list[str]]
    """Of every document after each of its calls, the open columns filled."""
    right_DS: np.ndarray
    """Whether they are right; behind the last call as after it."""

    @classmethod
    def read(cls, config: SignalsConfig, llm: LLM, docs: Sequence[dict], paths: Sequence[Path]):
        """The files' arrays, and the verdict on every text."""
        parts = [np.load(path) for path in paths]
        calls = np.concatenate([part["calls"] for part in parts])
        filled = np.concatenate([part["filled"] for part in parts])
        values = np.concatenate([part["values"] for part in parts])
        texts, right = [], np.zeros(values.shape[:2], bool)
        for doc, own, n, row in zip(docs, filled, calls, right, strict=True):
            found = [complete(ids, 0, llm.config, llm.tokenizer).text or "" for ids in own[:n]]
            verdict = {t: bool(TASKS[config.task].grade(doc, t)["solved"]) for t in set(found)}
            row[:n] = [verdict[text] for text in found]
            row[n:] = row[n - 1]
            texts.append(found)
        return cls(config, [str(name) for name in parts[0]["names"]], values, texts, right)

    def first_calm(self, place: int, rule: stop.Exit) -> np.ndarray:
        """The call after which a rule leaves each document's block [D]; its last one if never."""
        values_DS, patience = self.values_DSK[:, :, place], rule.patience[0]
        (threshold,) = rule.thresholds
        if isinstance(rule.signal, Prophet):
            calm_DS = values_DS >= threshold
        elif isinstance(rule.signal, Unchanged):
            calm_DS = values_DS <= threshold
        else:
            calm_DS = values_DS < threshold
        run_DS = calm_DS.copy()
        for lag in range(1, patience):
            run_DS[:, lag:] &= calm_DS[:, :-lag]
        run_DS[:, : patience - 1] = False
        calls = np.array([len(own) for own in self.texts])
        found = np.where(run_DS.any(1), run_DS.argmax(1) + 1, calls)
        return np.minimum(found, calls)

    def line(self, entry: Entry, stops: np.ndarray) -> Line:
        """What a rule that leaves after so many calls would have been in the comparison."""
        task, samples = self.config.task, []
        for number, (n, texts) in enumerate(zip(stops.tolist(), self.texts, strict=True)):
            text, right = texts[min(n, len(texts)) - 1], self.right_DS[number, n - 1]
            exits = [0] if n < len(texts) else []
            samples.append(
                Sample(task, number, 0, "", text, "", {"solved": float(right)}, int(n), 0, 0.0,
                       calls=[int(n)], exits=exits)
            )  # fmt: skip
        mean = sum(sample.metrics["solved"] for sample in samples) / len(samples)
        error = math.sqrt(mean * (1 - mean) / (len(samples) - 1))
        result = TaskResult(
            task, "solved", {"solved": mean}, {"solved": error}, samples, Speed(), {}
        )
        return Line(task, self.config.length, entry, result)

    def fixed(self, decode: DecodeConfig) -> Line:
        """The line of leaving every document after the same call."""
        (step,) = decode.exit.threshold
        calls = np.array([len(own) for own in self.texts])
        entry = Entry(f"step {step:.0f}", "", self.config.schedule, decode)
        return self.line(entry, np.minimum(int(step), calls))


def entry_of(config: SignalsConfig, name: str, scale: float) -> Entry:
    """A rule whose usual threshold is multiplied, and which fills a block at once."""
    rule, _, map_name = name.partition(" ")
    mode, patience = QUICK.get(rule, (rule, 0))
    usual = UNITS.get(mode, EXITS[mode][1][0][0])
    settings = Settings(
        mode=mode, map=map_name or "mean", threshold=(scale * usual,), polish=(0,),
        patience=(patience,) if patience else (),
    )  # fmt: skip
    decode = dataclasses.replace(config.decode, exit=settings)
    return Entry(rule, map_name, config.schedule, decode, scale)


def lines_of(data: Recorded, full: Line, slack: float) -> tuple[list[Line], dict[str, Stops]]:
    """Each rule at the scale that was chosen on the first half, on the second; and all scales."""
    kept, every = [], {}
    quick = {
        f"{rule} {name}": f"{mode} {name}" for rule, (mode, _) in QUICK.items() for name in MAPS
    }
    for name, source in ({name: name for name in data.names} | quick).items():
        if source not in data.names:
            continue
        place = data.names.index(source)
        entries = [entry_of(data.config, name, scale) for scale in SCALES]
        stops = [data.first_calm(place, make_exit(entry.decode)) for entry in entries]
        own = [data.line(*pair).on(0) for pair in zip(entries, stops, strict=True)]
        best = max(held_out.chosen([full.on(0), *own], slack)) - 1
        kept.append(data.line(entries[best], stops[best]).on(1))
        every[name] = list(zip(entries, stops, strict=True))
    return kept, every


def at_budget(data: Recorded, stops: Stops, budget: float) -> Line:
    """The line whose mean calls on the first half are nearest to a budget; its second half."""
    entry, own = min(stops, key=lambda pair: abs(pair[1][::2].mean() - budget))
    return data.line(entry, own).on(1)


def at_budgets(data: Recorded, every: dict[str, Stops]) -> str:
    """Every rule at equal budgets of calls beside fixed steps, and EDIT's map beside controls."""
    most = max(map(len, data.texts))
    wanted = [round(share * most) for share in BUDGETS]
    heads = ["rule", *(f"{n} calls" for n in wanted)]
    near, best = [heads, ["---"] * len(heads)], [heads, ["---"] * len(heads)]
    for name, stops in every.items():
        lines = [at_budget(data, stops, budget) for budget in wanted]
        off = [abs(np.mean(one.steps) - n) > 1 for one, n in zip(lines, wanted, strict=True)]
        for table, mixture in ((near, neighbours), (best, best_pair)):
            found = [weigh(line.verdicts, mixture(data, line)) for line in lines]
            row = [f"{100 * one.difference:+.1f} ± {100 * one.stderr:.1f}" for one in found]
            table.append([name, *("-" if o else text for o, text in zip(off, row, strict=True))])
    heads = ["rule", "map", "calls", "accuracy", "above fixed", "mean above it", "±", "McNemar's p",
             "r of stops"]  # fmt: skip
    pairs = [heads, ["---"] * len(heads)]
    for rule, budget in itertools.product(("code", "code-1", "paper"), wanted):
        own = at_budget(data, every[f"{rule} mean"], budget)
        if abs(np.mean(own.steps) - budget) <= 1:
            lines = [at_budget(data, every[f"{rule} {name}"], budget) for name in MAPS]
            pairs += [beside(data, own, line) for line in lines]
    return "\n\n".join([
        "# Exits at equal budgets",
        "Thresholds were chosen on the first half for the mean calls of the column; a dash where "
        "none comes within one call. code-1 is code with a patience of 1.",
        "## Points above leaving all documents at one step", lined(near),
        "## Points above the best mixture of two fixed steps",
        "Two steps with as many calls on average, which were best on the first half: such a "
        "mixture gives some documents up.", lined(best),
        "## The map beside its controls",
        "Mean above it: what the map mean has more above its fixed steps than this one above its "
        "own, with its standard error; r is the correlation of the calls after which the two "
        "leave. McNemar's test where they make equally many calls (within a tenth).",
        lined(pairs),
    ]) + "\n"  # fmt: skip


def beside(data: Recorded, own: Line, other: Line) -> list[str]:
    """A row on EDIT's map and another, both beside fixed steps with as many calls."""
    first, second = (
        np.array(one.verdicts, float) - np.array(mixed(neighbours(data, one)))
        for one in (own, other)
    )
    more, near = first - second, float(np.mean(other.steps))
    close = abs(near - np.mean(own.steps)) <= 0.1
    p = compare(own.verdicts, other.verdicts).p_value
    varies = np.std(own.steps) * np.std(other.steps) > 0
    r = f"{np.corrcoef(own.steps, other.steps)[0, 1]:.2f}" if varies else "-"
    return [
        other.entry.rule, other.entry.map, f"{near:.1f}", f"{100 * np.mean(other.verdicts):.1f}",
        f"{100 * second.mean():+.1f}", f"{100 * more.mean():+.1f}",
        f"{100 * more.std() / len(more) ** 0.5:.1f}", f"{p:.3f}" if close else "-", r,
    ]  # fmt: skip


def lined(table: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def neighbours(data: Recorded, line: Line) -> Mixture:
    """The two fixed steps around the calls of a line on the second half, mixed to as many."""
    steps = [data.fixed(entry.decode).on(1) for entry in held_out.matched(line)]
    return held_out.mixture(line, steps)


def best_pair(data: Recorded, line: Line) -> Mixture:
    """The two fixed steps that, mixed to as many calls as a line makes, are best on the first half.

    Their verdicts are those on the second.
    """
    mean, most = float(np.mean(line.steps)), max(map(len, data.texts))
    share_S = np.mean(data.right_DS[::2], axis=0)

    def gain(pair: tuple[int, int]) -> float:
        low, high = pair
        part = (mean - low) / (high - low)
        return part * share_S[high - 1] + (1 - part) * share_S[low - 1]

    whole, above = range(1, math.floor(mean) + 1), range(math.floor(mean) + 1, most + 1)
    low, high = max(itertools.product(whole, above or [most + 1]), key=gain)
    part = (mean - low) / (high - low)
    verdicts = data.right_DS[1::2]
    return [(verdicts[:, low - 1].tolist(), 1 - part), (verdicts[:, high - 1].tolist(), part)]


def curves(data: Recorded, every: dict[str, Stops]) -> bytes:
    """PNG of accuracy against mean calls, all documents: fixed steps, exits and controls."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(13, 6), dpi=90, layout="constrained")
    steps = range(1, data.right_DS.shape[1] + 1)
    fixed = [100 * np.mean(data.right_DS[:, n - 1]) for n in steps]
    panels, rows = canvas.subplots(1, 2), np.arange(len(data.texts))
    groups = [
        [n for n in data.names if n.startswith("code")],
        [n for n in data.names if not n.startswith("code")],
    ]
    for panel, names in zip(panels, groups, strict=True):
        panel.plot(steps, fixed, "k-", linewidth=2, label="fixed step")
        for number, name in enumerate(names):
            spots = [
                (own.mean(), 100 * np.mean(data.right_DS[rows, own - 1])) for _, own in every[name]
            ]
            style = "-" if name.endswith(("mean", "late", "ema", "momentum")) else "--"
            color = f"C{number}" if number < 7 else ("gray", "gold", "magenta", "navy")[number - 7]
            panel.plot(
                *zip(*sorted(spots), strict=True), style, marker=".", label=name, color=color
            )
        panel.set(xlabel="model calls per document", ylabel="accuracy, %")
        panel.legend(frameon=False, fontsize=8)
        panel.set_xlim(0, max(len(own) for own in data.texts) + 0.5)
    canvas.suptitle(
        f"{data.config.task}, {data.config.schedule} schedule, {len(data.texts)} documents"
    )
    out = io.BytesIO()
    canvas.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def main(config: SignalsConfig) -> None:
    """Decodes, reads everything off, and writes the report."""
    enable_compilation_cache()
    files.make_folder(config.output)
    task = TASKS[config.task]
    docs = task.generate(config.limit, 0, held_out=True)
    llm = LLM.load(config.model, adapter=config.adapter)
    prompts = [task.prompt(doc) for doc in docs]
    data = Recorded.read(config, llm, docs, list(record(config, llm, prompts)))
    plain = Entry(exits.FULL, "", config.schedule, config.decode)
    steps = data.right_DS.shape[1]
    full = data.line(plain, np.full(len(docs), steps))
    last = data.line(
        dataclasses.replace(plain, rule=exits.LAST_MASK), np.array([len(own) for own in data.texts])
    )
    kept, every = lines_of(data, full, config.slack)
    lines = [full.on(1), last.on(1), *kept]
    fixed = [weigh(one.verdicts, neighbours(data, one)) for one in kept]
    rows = exit_report.rows_of(lines, [None, None, *fixed])
    oracle = [
        settled(own) for own in data.right_DS[1::2, :][:, : max(map(len, data.texts))].tolist()
    ]
    rows.append(exit_report.oracle_row(rows[1], oracle))
    blank = dict.fromkeys(("seconds", "tokens_per_second", "peak_mib", "rule_cost"))
    rows = [row | blank for row in rows]
    cosines = {
        name: llm.maps.alignment(Settings(mode="code", map=name))
        for name in MAPS if f"code {name}" in data.names
    }  # fmt: skip
    checks = []
    if config.replayed:
        some = [every[name][SCALES.index(scale)] for name, scale in CHECKED.items()]
        lines = [data.line(*pair) for pair in some]
        checks = replayed(llm, prompts[: config.replayed], lines)
        print("\n".join(checks))
    facts = {"command": cli.command(config, "exit_signals"), **environment()}
    facts |= {"decoded for themselves, text and calls the same": "; ".join(checks)}
    facts["config"] = dataclasses.asdict(config)
    folder = config.output / config.schedule
    files.make_folder(folder)
    exit_report.write(folder, rows, lines, cosines, facts)
    text = at_budgets(data, every)
    for name, content in {"budgets.md": text.encode(), "curves.png": curves(data, every)}.items():
        with files.atomic_file(folder / name) as file:
            file.write(content)
    print((folder / "table.md").read_text() + text)


if __name__ == "__main__":
    cli.run(main, SignalsConfig, "python experiments/exit_signals.py")
