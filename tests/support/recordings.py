"""Finds the recorded runs of the reference implementations and their checkpoints.

The root is JDLLM_GOLDENS or tests/goldens. What there is to replay is found by content; a family
that is not supported yet stands in UNSUPPORTED with its reason.
"""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jdllm.load import load_model
from jdllm.model.model import Model
from jdllm.runtime import sharding

ROOT = Path(os.environ.get("JDLLM_GOLDENS", Path(__file__).parents[1] / "goldens"))
MOE = {"LLaDAMoEModelLM", "LLaDA2MoeModelLM"}  # their logits.npz has a layout of its own
EOT = 314  # stands for LLaDA's end-of-turn id in the tiny vocabularies

# (kind, name) -> why it is not replayed yet. Names: the architecture of a checkpoint, the family
# of a decode trace, the folder of likelihoods, the stem of a traces_*.json.
UNSUPPORTED: dict[tuple[str, str], str] = {}


class Case(NamedTuple):
    kind: str
    name: str
    """What UNSUPPORTED is keyed by, besides the kind."""
    id: str
    path: Path
    entry: dict[str, Any]


def discover(root: Path) -> list[Case]:
    """Returns everything below `root` that can be replayed; ValueError where there is nothing."""
    if not root.is_dir():
        raise ValueError(f"JDLLM_GOLDENS={root} is not a folder")
    cases = []
    for config in sorted(root.rglob("config.json")):
        folder = config.parent
        if list(folder.glob("*.safetensors")):
            architecture = json.loads(config.read_text())["architectures"][0]
            name = str(folder.relative_to(root))
            cases.append(Case("checkpoint", architecture, f"{name}-checkpoint", folder, {}))
    for index in sorted(root.rglob("decode/index.json")):
        for entry in json.loads(index.read_text()):
            family = entry["family"]
            ident = f"decode-{family}-{entry['name']}"
            cases.append(Case("decode", family, ident, index.parent.parent / entry["file"], entry))
    for path in sorted(root.rglob("likelihood/*.npz")):
        cases.append(Case("likelihood", "likelihood", f"likelihood-{path.stem}", path, {}))
    for path in sorted(root.rglob("traces_*.json")):
        for entry in json.loads(path.read_text()):
            ident = f"{path.parent.name}-{path.stem}-{entry['name']}"
            cases.append(Case("traces", path.stem, ident, path, entry))
    if not cases:
        raise ValueError(f"JDLLM_GOLDENS={root} holds nothing to replay")
    return cases


CASES = discover(ROOT)


def supported(kind: str, moe: bool = False) -> list[Any]:
    rows = [c for c in CASES if c.kind == kind and (kind, c.name) not in UNSUPPORTED]
    rows = [c for c in rows if (c.name in MOE) == moe]
    return [pytest.param(case, id=case.id) for case in rows]


def with_mask(folder: Path, scratch: Path) -> Path:
    """Returns the folder, or a copy whose config.json names the mask, where it did not."""
    facts = json.loads((folder / "config.json").read_text())
    if facts["architectures"][0] not in MOE or (folder / "tokenizer.json").exists():
        return folder
    copy = Path(shutil.copytree(folder, scratch / folder.name))
    facts["mask_token_id"] = facts["vocab_size"] - 1
    (copy / "config.json").write_text(json.dumps(facts))
    return copy


def has_ties(param: Any) -> bool:
    """Returns whether a recording holds steps in which confidences are equal."""
    return bool(param.values[0].entry.get("has_ties"))


@functools.cache
def load(folder: Path) -> Model:
    """Returns the checkpoint in a folder, float32, on one device; every one is read once."""
    with tempfile.TemporaryDirectory() as scratch:
        source = str(with_mask(folder, Path(scratch)))
        model = load_model(source, sharding.parse_mesh("1x1"), "float32")
    config = dataclasses.replace(model.config, stop_ids=(model.config.eos_id, EOT))
    return dataclasses.replace(model, config=config)
