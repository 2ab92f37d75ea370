"""Adapters that we write, read and merged by PEFT itself; only where it and torch are installed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jdllm.convert import adapters
from jdllm.convert.shards import Shards
from jdllm.model import lora
from tests.convert.test_adapters import GOLDENS, load, merged_tensors, random_factors, written

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch peft")
peft = pytest.importorskip("peft", reason="peft is not installed: pip install torch peft")


def bare_modules(shards: Shards) -> Any:
    """Modules with the names and the matrices of a checkpoint, and no forward pass."""
    root = torch.nn.Module()
    for name in shards.shapes:
        tensor = torch.tensor(np.asarray(shards.map(name), np.float32))
        *path, last, kind = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        if kind == "weight" and tensor.ndim == 2:
            module = torch.nn.Linear(*reversed(tensor.shape), bias=False)
            module.weight = torch.nn.Parameter(tensor)
            place.add_module(last, module)
    return root


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "targets", "rslora"),
    [
        ("llada", "all", True),
        ("llada_gqa", "layers.1.*", False),
        ("dream", "q,v,down", False),
        ("llada2_moe", "all,shared", False),
        ("llada_moe", "k,experts", False),
    ],
)
def test_peft_merges_what_we_write(name: str, targets: str, rslora: bool, tmp_path: Path):
    model, shards = load(GOLDENS / name), Shards(GOLDENS / name)
    settings = lora.LoraConfig(rank=3, alpha=6, rslora=rslora)
    factors = random_factors(model, targets, ranks=(3,), scale=settings.scale)
    folder = written(tmp_path / "out", model, factors, rank=3, alpha=6, rslora=rslora)
    theirs = peft.PeftModel.from_pretrained(bare_modules(shards), str(folder))
    changed = {
        n.split(".lora_A")[0].removeprefix("base_model.model.")
        for n, _ in theirs.named_parameters()
        if "lora_A" in n
    }
    assert changed == {
        p for p, held in adapters.pieces(model.config).items() if held[0].name in factors
    }
    state, ours = theirs.merge_and_unload().state_dict(), merged_tensors(model, factors)
    for path in changed:
        np.testing.assert_allclose(ours[f"{path}.weight"], state[f"{path}.weight"], atol=1e-5)
    assert "model.transformer.ff_out" not in changed
