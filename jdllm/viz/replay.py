"""Writes a run as one HTML page with a slider over the model calls; it loads nothing else.

The page, `replay.html`, gets the lines of the trace as JSON. Text from the run reaches it only as
data, never as markup.
"""

import dataclasses
import html
import json
import re
from pathlib import Path

import numpy as np

from jdllm.runtime import files
from jdllm.viz.trace import Run, describe, make_header

TEMPLATE = Path(__file__).with_name("replay.html")
SLOT = re.compile("__(TITLE|DATA)__")
DIGITS = 4
"""Decimals of a confidence or an entropy on the page."""


def page(run: Run) -> str:
    """Returns the HTML page that replays a run."""
    record = dataclasses.replace(
        run.record,
        confidence=np.round(run.record.confidence, DIGITS),
        entropy=np.round(run.record.entropy, DIGITS),
    )
    calls = [describe(record, call) for call in range(1, record.calls + 1)]
    data = json.dumps({"header": make_header(run), "calls": calls}, ensure_ascii=False)
    title = " ".join(str(run.about.get("prompt", "")).split())[:80]
    filled = {
        "TITLE": html.escape(f"{title} · jdllm" if title else "jdllm"),
        "DATA": data.replace("<", "\\u003c"),  # so that no text can end the script element
    }
    return SLOT.sub(lambda slot: filled[slot[1]], TEMPLATE.read_text(encoding="utf-8"))


def write(path: Path, run: Run) -> None:
    """Writes the page, whole or not at all."""
    with files.atomic_file(path) as file:
        file.write(page(run).encode())
