"""Evaluates the bundled model on d1's puzzles and writes the table that README.md shows.

python experiments/bundled/evaluate.py data=FOLDER      (FOLDER holds sudoku4x4/ and countdown/)
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from jdllm.runtime import cli

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results" / "bundled.json"
README = ROOT / "README.md"
START, END = "<!-- table: bundled -->", "<!-- end of table -->"

TASKS = {"sudoku_d1": "sudoku, d1's 500", "countdown_d1": "countdown, d1's 256"}
# One token per step, exact; then the default.
SETTINGS = {
    "one token per step": ("decode.rule=quota", "decode.cache=none"),
    "threshold 0.9, dual cache": ("decode.threshold=0.9", "decode.cache=dual"),
}


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """The README's table of the bundled model."""

    data: Path | None = None
    """Folder with d1's files; without it the stored results are only written into the README."""
    batch_size: int = 64


def evaluate(task: str, words: tuple[str, ...], config: TableConfig) -> dict:
    """Runs one evaluation in a process of its own; results.json and the command behind it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [f"task={task}", f"batch_size={config.batch_size}", *words]
        extra = [f"data={config.data}", f"output={folder}"]
        subprocess.run([sys.executable, "-m", "jdllm.eval", *command, *extra], check=True)
        results = json.loads((Path(folder) / "results.json").read_text())
    found = results["tasks"][task]
    return {
        "command": " ".join(["python -m jdllm.eval", *command, "data=FOLDER"]),
        "n": found["n"],
        "metrics": found["metrics"],
        "stderr": found["stderr"],
        "nfe_mean": found["nfe_mean"],
        "tokens_per_forward": results["speed"]["tokens_per_forward"],
        "environment": results["environment"],
    }


def table(results: dict) -> str:
    """Returns the Markdown table: accuracy and NFE of both settings side by side."""
    lines = [
        "| task | decoding | solved | string match | NFE per puzzle | tokens per forward |",
        "|---|---|---|---|---|---|",
    ]
    for task, label in TASKS.items():
        for setting in SETTINGS:
            row = results[task][setting]
            cells = [
                f"{100 * row['metrics'][name]:.1f} ± {100 * row['stderr'][name]:.1f} %"
                for name in ("solved", "exact_match")
            ]
            cells += [f"{row['nfe_mean']:.1f}", f"{row['tokens_per_forward']:.2f}"]
            lines.append(f"| {label} | {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(readme: str, results: dict) -> str:
    """Returns the README with the table between its two markers renewed."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table(results)}\n{END}{after}"


def main(config: TableConfig) -> None:
    """Measures (where there is data), stores the results, renews the README."""
    if config.data is not None:
        results = {
            task: {name: evaluate(task, words, config) for name, words in SETTINGS.items()}
            for task in TASKS
        }
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    results = json.loads(RESULTS.read_text())
    README.write_text(with_table(README.read_text(), results))
    print(table(results))


if __name__ == "__main__":
    main(cli.parse(TableConfig))
