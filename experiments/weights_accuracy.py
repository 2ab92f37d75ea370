"""What weights in 8 bits cost in accuracy: the bundled model's tasks, and logits of the goldens.

python experiments/weights_accuracy.py output=experiments/results/weights_accuracy.json

The bundled model is converted with every form of weights and solves the same puzzles. The goldens
are tiny checkpoints with recorded logits of the reference code; their weights are random, so that
errors grow more than in a trained model, those of rounding to bfloat16 too.
"""

import dataclasses
import datetime
import json
import math
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdllm.convert.commands import main as convert
from jdllm.kernels.quantised import KINDS
from jdllm.llm import LLM
from jdllm.load import BUNDLED, load_model
from jdllm.model.model import Model, forward
from jdllm.model.quantise import quantise_params
from jdllm.runtime import cli, files, sharding
from jdllm.tasks import TASKS

GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"
FORMS = ("bf16", *KINDS)


@dataclasses.dataclass(frozen=True)
class AccuracyConfig:
    """What is compared."""

    output: Path
    tasks: tuple[str, ...] = ("sudoku", "countdown")
    count: int = 1000
    """Puzzles of each task, generated and held out of the model's training."""
    batch_size: int = 250


def solved(llm: LLM, name: str, config: AccuracyConfig) -> tuple[np.ndarray, float]:
    """Whether each puzzle was solved, and the mean number of model calls."""
    task = TASKS[name]
    docs = task.generate(config.count, 0, held_out=True)
    right, calls = np.zeros(len(docs)), 0
    prompts = [task.prompt(doc) for doc in docs]
    for batch in llm.stream(prompts, batch_size=config.batch_size):
        for i, completion in zip(batch.index, batch.completions, strict=True):
            right[i] = task.grade(docs[i], completion.text or "")["solved"]
            calls += completion.nfe
    return right, calls / len(docs)


def tasks(config: AccuracyConfig) -> list[dict[str, Any]]:
    """A row per task and form: share solved, its standard error, and the paired difference."""
    rows, mesh = [], sharding.parse_mesh("1x1")
    with tempfile.TemporaryDirectory() as kept:
        llms = {}
        for form in FORMS:
            words = [] if form == "bf16" else [f"weights={form}"]
            convert(["llada", f"source={BUNDLED}", f"output={kept}/{form}", *words])
            llms[form] = LLM.load(f"{kept}/{form}", mesh)
        for name in config.tasks:
            base = None
            for form, llm in llms.items():
                right, calls = solved(llm, name, config)
                base = right if base is None else base
                change, count = right - base, len(right)
                row = {"task": name, "weights": form, "n": count, "solved": right.mean()}
                row |= {"stderr": right.std(ddof=1) / math.sqrt(count), "nfe": calls}
                row |= {"difference": change.mean()}
                row |= {"difference_stderr": change.std(ddof=1) / math.sqrt(count)}
                rows.append(
                    {k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()}
                )
                print(rows[-1], flush=True)
    return rows


def rounded(model: Model, form: str) -> Model:
    """The model with its linear maps in 8 bits, or all weights rounded to bfloat16."""
    if form != "bf16":
        return dataclasses.replace(model, params=quantise_params(model.params, form))
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), model.params)
    return dataclasses.replace(model, params=low)


def goldens() -> list[dict[str, Any]]:
    """A row per recorded checkpoint and form: relative error of logits, equal best tokens."""
    rows = []
    for file in sorted(GOLDENS.glob("*/logits.npz")):
        stored = np.load(file)
        if "logits" not in stored:  # of one layer only
            continue
        ids, wanted = jnp.array(stored["input_ids"]), stored["logits"]
        model = load_model(str(file.parent), sharding.parse_mesh("1x1"), "float32")
        for form in FORMS:
            with jax.default_matmul_precision("highest"):
                seen = jnp.ones(ids.shape, bool)
                found = np.asarray(jax.jit(forward)(rounded(model, form), ids, seen))
            error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            same = (found.argmax(-1) == wanted.argmax(-1)).mean()
            row = {"checkpoint": file.parent.name, "weights": form, "error": float(error)}
            rows.append(row | {"same_best": float(same), "positions": ids.size})
    return rows


def task_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `tasks` as a Markdown table."""
    lines = ["| task | weights | n | solved, % | against bf16 | calls per puzzle |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        change = f"{100 * row['difference']:+.1f} ± {100 * row['difference_stderr']:.1f}"
        change = "" if row["weights"] == "bf16" else change
        share = f"{100 * row['solved']:.1f} ± {100 * row['stderr']:.1f}"
        cells = [row["task"], row["weights"], row["n"], share, change, f"{row['nfe']:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def golden_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `goldens` as a Markdown table."""
    heads = [f"{form}: error, same best token" for form in FORMS]
    lines = [f"| checkpoint | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
    for name in dict.fromkeys(row["checkpoint"] for row in rows):
        own = {row["weights"]: row for row in rows if row["checkpoint"] == name}
        cells = [f"{own[f]['error']:.3f}, {100 * own[f]['same_best']:.0f} %" for f in FORMS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: AccuracyConfig) -> None:
    """Measures both, prints both tables and writes all rows."""
    found = {"goldens": goldens(), "tasks": tasks(config)}
    facts = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "command": " ".join(["python experiments/weights_accuracy.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    files.write_json(config.output, json.loads(json.dumps(facts | found)))
    print(task_table(found["tasks"]), golden_table(found["goldens"]), sep="\n\n")


if __name__ == "__main__":
    cli.run(main, AccuracyConfig, "python experiments/weights_accuracy.py")
