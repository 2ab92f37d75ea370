"""A block step in two checkouts, side by side on one GPU: what a change of the code costs or saves.

python experiments/compare_trees.py before=FOLDER output=experiments/results/compare_trees.json

Each checkout times its own loop, through its own experiments/gpu_loop.py, in processes of their own
that take turns. A step's time is the difference of two requests that take one and two tokens per
step, over the difference of their calls; random weights, one token block of 32.
"""

import dataclasses
import datetime
import json
import os
import runpy
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
CASES = [
    ("random:llada-8b", 1, "dual"),
    ("random:llada-8b", 8, "dual"),
    ("random:llada2-mini", 1, "block"),
]
COLUMNS, BLOCK = 1024, 32


def time_tree(models: list[str], repeats: int) -> list[dict[str, Any]]:
    """Rows of the checkout in the working folder; what runs in a process of its own."""
    loop = runpy.run_path("experiments/gpu_loop.py")
    rows = []
    for name in models:
        config = dataclasses.replace(loop["LoopConfig"](), model=name, repeats=repeats)
        llm = loop["LLM"].load(name, loop["sharding"].parse_mesh("1x1"))
        for model, batch, cache in CASES:
            if model != name:
                continue
            one, two = (
                loop["measure"](
                    llm,
                    loop["Case"](batch, COLUMNS - 4 * BLOCK, 4 * BLOCK, BLOCK, cache, tokens),
                    config,
                    1e12,
                )
                for tokens in (1, 2)
            )
            seconds = (one["seconds"] - two["seconds"]) / (one["forwards"] - two["forwards"])
            row = {"model": name, "rows": batch, "cache": cache, "ms_per_step": 1e3 * seconds}
            kept = ("forwards", "peak_gb", "compile_seconds")
            rows.append(row | {key: one[key] for key in kept} | {"request_seconds": one["seconds"]})
        del llm
    return rows


def run(tree: Path, models: list[str], repeats: int) -> list[dict[str, Any]]:
    """`time_tree` of a checkout, in a process that has nothing else on the device."""
    words = [sys.executable, str(Path(__file__).resolve()), "tree", str(repeats), *models]
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        words, cwd=tree, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(words: list[str]) -> None:
    """Times both checkouts in turns, prints a table and writes `output`."""
    settings = dict(word.split("=", 1) for word in words)
    before, output = Path(settings["before"]).resolve(), Path(settings["output"])
    rounds, repeats = int(settings.get("rounds", 2)), int(settings.get("repeats", 5))
    names = sorted({model for model, _, _ in CASES})
    found: dict[str, list[list[dict[str, Any]]]] = {"before": [], "after": []}
    for number in range(rounds):
        trees = [("before", before), ("after", HERE)]
        for name, tree in trees[:: 1 if number % 2 == 0 else -1]:
            found[name].append(run(tree, names, repeats))
            print(name, json.dumps(found[name][-1]), flush=True)
    import jax

    table = []
    for i, row in enumerate(found["before"][0]):
        shown = {key: row[key] for key in ("model", "rows", "cache", "forwards")}
        for key in ("ms_per_step", "request_seconds", "peak_gb", "compile_seconds"):
            pair = [statistics.median(r[i][key] for r in found[t]) for t in ("before", "after")]
            shown |= {f"{key}_before": pair[0], f"{key}_after": pair[1]}
            shown |= {f"{key}_ratio": pair[1] / pair[0]}
        table.append(shown)
        print(json.dumps(shown))
    facts = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "command": " ".join(["python experiments/compare_trees.py", *words]),
        "date": datetime.date.today().isoformat(),
        "table": table,
        "rounds": found,
    }
    output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["tree"]:
        print(json.dumps(time_tree(sys.argv[3:], int(sys.argv[2]))))
    else:
        main(sys.argv[1:])
