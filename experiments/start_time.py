"""How long the same command takes to its first tokens, with and without compiled programs on disk.

python experiments/start_time.py output=start.json                             (two minutes, a GPU)
python experiments/start_time.py output=start.json model=random:llada2-mini

`jdllm.generate` runs twice, each in a process of its own, over a folder for programs that is empty
at first. It completes one block, since the loop hands out what it wrote at its end. The weights are
random: what reading a model takes is no part of it.
"""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jdllm.runtime import cli, files


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Two starts of one command."""

    output: Path
    model: str = "random:llada-8b"
    block: int = 32
    words: str = ""
    """More settings of jdllm.generate, with spaces between them."""
    timeout: float = 280.0
    """Seconds that one start may take."""


def command(config: StartConfig) -> list[str]:
    """What is started."""
    lengths = [f"decode.gen_length={config.block}", f"decode.block_length={config.block}"]
    words = [f"model={config.model}", "mesh=1x1", "json=true", *lengths, *config.words.split()]
    return [sys.executable, "-m", "jdllm.generate", "prompt=1 2 3", *words]


def start(config: StartConfig, home: str) -> dict[str, Any]:
    """One start: its parts, until the first tokens; RuntimeError with the end of what it said."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    begun = time.perf_counter()
    ran = subprocess.run(
        command(config),
        env=variables | {"JDLLM_HOME": home},
        capture_output=True,
        text=True,
        timeout=config.timeout,
    )
    whole = time.perf_counter() - begun
    if ran.returncode:
        raise RuntimeError(ran.stderr[-600:])
    told = json.loads(ran.stdout)
    parts = told["start_seconds"]
    first = sum(parts.values())
    programs = [path.stat().st_size for path in Path(home).rglob("*-cache")]
    return parts | {
        "first_tokens": first,
        "without_weights": first - parts["weights"],
        "process": whole,
        "programs_on_disk": len(programs),
        "bytes_on_disk": sum(programs),
        "ids": told["ids"],
    }


def device() -> str:
    """The kind of device, asked in a process of its own: this one must not hold its memory."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return asked.stdout.strip() or f"unknown: {asked.stderr[-200:]}"


def main(config: StartConfig) -> None:
    """Starts twice, prints a table and writes both."""
    with tempfile.TemporaryDirectory() as home:
        rows = {name: start(config, home) for name in ("first", "second")}
    same = rows["first"].pop("ids") == rows["second"].pop("ids")
    facts = {
        "device": device(),
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "command": " ".join(["python experiments/start_time.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "started": " ".join(["python", *command(config)[1:]]),
        "same_tokens": same,
    }
    files.write_json(config.output, facts | rows)
    names = list(rows["first"])
    print("\n".join([f"| start | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]))
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[key]:.1f}' for key in names)} |")


if __name__ == "__main__":
    cli.run(main, StartConfig, "python experiments/start_time.py")
