"""Every Triton kernel compiles for a Hopper GPU, and a processor of it can hold the tiles."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = 227 * 1024  # bytes that a program may have of a processor's own memory


def test_kernels_compile_and_their_tiles_fit():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-m", "tests.support.compiled"]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    text = "".join(path.read_text() for path in (ROOT / "kernels").rglob("*.py"))
    launched = set(re.findall(r"\bkernels\.(\w+),", text))
    assert {row["kernel"] for row in rows} == launched
    assert not [row for row in rows if row["shared"] > SHARED]
