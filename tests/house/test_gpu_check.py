"""What a GPU is checked with finds right kernels right; here at tiny shapes, and interpreted."""

import runpy
from pathlib import Path

import pytest

from jdllm.kernels import choose, shapes
from tests.support.interpreted import interpreted

__all__ = ["interpreted"]
SCRIPT = Path(__file__).parents[2] / "experiments" / "gpu_check.py"
TINY = (
    shapes.Block(1, 5, 128, 256, 2, 2, 64, 300, False),
    shapes.Block(2, 3, 128, 256, 4, 2, 64, 300, True),
)


def test_every_operation_of_a_block_is_held_against_its_reference(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shapes, "PUBLISHED_BLOCKS", TINY)
    monkeypatch.setattr(shapes, "PUBLISHED_EXPERTS", (shapes.Experts(5, 4, 32, 64, 128),))
    found = runpy.run_path(str(SCRIPT))["blocks"]()
    operations = {"routing", "norm", "opening", "rotary", "mlp", "closing", "head", "product"}
    assert {(row["operation"], row["name"]) for row in found} == {
        (operation, name) for operation in operations for name in choose.TABLES[operation]
    }
    for row in found:
        assert "declined" not in row, row
        has_ids = row["operation"] in ("head", "routing")
        assert not has_ids or row["errors"][0] <= 0.1, row
        assert max(row["errors"][has_ids:]) < 0.02, row


def test_a_kernel_that_does_not_serve_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shapes, "PUBLISHED_BLOCKS", TINY[:1])
    monkeypatch.setattr(shapes, "PUBLISHED_EXPERTS", ())
    rows = {(row["operation"], row["name"]): row for row in runpy.run_path(str(SCRIPT))["blocks"]()}
    assert "it needs a GPU" in rows["rotary", "fused"]["declined"]
    assert max(rows["rotary", "reference"]["errors"]) < 0.01
