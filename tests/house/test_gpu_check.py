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
    found = runpy.run_path(str(SCRIPT))["blocks"]()
    operations = {"norm", "opening", "rotary", "mlp", "closing", "head", "product"}
    assert {(row["operation"], row["name"]) for row in found} == {
        (operation, name) for operation in operations for name in choose.TABLES[operation]
    }
    for row in found:
        assert "declined" not in row, row
        ids = row["errors"][0] if row["operation"] == "head" else 0.0
        assert ids <= 0.1 and max(row["errors"][row["operation"] == "head" :]) < 0.02, row


def test_a_kernel_that_does_not_serve_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shapes, "PUBLISHED_BLOCKS", TINY[:1])
    rows = {(row["operation"], row["name"]): row for row in runpy.run_path(str(SCRIPT))["blocks"]()}
    assert "it needs a GPU" in rows["rotary", "fused"]["declined"]
    assert max(rows["rotary", "reference"]["errors"]) < 0.01
