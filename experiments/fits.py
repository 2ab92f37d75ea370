"""Which models decode on small cards, in bfloat16 and with weights in 8 bits: the memory plan.

python experiments/fits.py output=experiments/results/fits.json     (ten minutes, no GPU)

Activations are an upper bound where a CPU compiles, as in `jdllm.convert plan` with memory=.
"""

import dataclasses
import datetime
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jdllm import DecodeConfig
from jdllm.decode.memory import Planner
from jdllm.model.config import NAMED
from jdllm.runtime import cli, files, sharding


@dataclasses.dataclass(frozen=True)
class FitsConfig:
    """What is planned."""

    output: Path
    models: tuple[str, ...] = ("llada-8b", "dream-7b", "llada-moe-7b", "llada2-mini")
    weights: tuple[str, ...] = ("bf16", "int8")
    memories: tuple[float, ...] = (16, 24)
    """GB of a card."""
    length: int = 1024
    gen_length: int = 128


def row(model: str, weights: str, config: FitsConfig) -> dict[str, Any]:
    """Gigabytes of one row, by part, and the most rows on every card; 0 where none fits."""
    held: Any = None if weights == "bf16" else weights
    facts = dataclasses.replace(NAMED[model], weights=held)
    decoding = DecodeConfig().resolve(gen_length=config.gen_length, model=facts)
    planner = Planner(facts, sharding.abstract_mesh("1x1"), config.length, decoding, elsewhere=True)
    plan = planner.plan(1)
    parts = {f"{name}_gb": size / 1e9 for name, size in dataclasses.asdict(plan).items()}
    rows = {f"{m:g}": planner.largest_batch(int(m * 1e9)) for m in config.memories}
    return {"model": model, "weights": weights} | parts | {"total": plan.total / 1e9, "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    cards = list(rows[0]["rows"])
    heads = ["model", "weights", "GB of weights", "GB for one row"]
    heads += [f"rows in {card} GB" for card in cards]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for one in rows:
        cells = [one["model"], one["weights"], f"{one['weights_gb']:.1f}", f"{one['total']:.1f}"]
        cells += [str(one["rows"][card] or "none") for card in cards]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config: FitsConfig) -> None:
    """Plans, prints the table and writes the rows after every model."""
    found: list[dict[str, Any]] = []
    facts = {
        "planned_on": jax.default_backend(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "command": " ".join(["python experiments/fits.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "length": config.length,
    }
    for model in config.models:
        for weights in config.weights:
            found.append(row(model, weights, config))
            files.write_json(config.output, facts | {"rows": found})
    print(table(found))


if __name__ == "__main__":
    cli.run(main, FitsConfig, "python experiments/fits.py")
