"""The recorded runs with other kernels than the reference's: the same tokens and calls.

On a CPU the reference serves by choice, so that test_traces.py holds it against the recordings.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from jdllm.decode import decode
from jdllm.parity import make_setup
from tests.parity.test_traces import engine_request_of, request_of
from tests.support.recordings import ROOT, Case, load, supported

pytestmark = pytest.mark.slow


def first_of_each_family() -> list[Any]:
    """A case per family of recordings; but for one of each kind of model they are slow."""
    kept = []
    for kind in ("decode", "traces"):
        found: dict[str, Any] = {}
        for param in supported(kind):
            found.setdefault(param.values[0].name, param)
        for number, param in enumerate(found.values()):
            marks = [pytest.mark.slow] if number else []
            kept.append(pytest.param(*param.values, id=param.id, marks=marks))
    return kept


@pytest.mark.parametrize("case", first_of_each_family())
def test_kernels_write_the_tokens_of_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch):
    dense = case.path.suffix == ".npz"
    folder = ROOT / case.entry["checkpoint"] if dense else case.path.parent
    checkpoint, options, request = (request_of if dense else engine_request_of)(case, load(folder))
    verifier = load(ROOT / "qwen_verifier") if options.rule == "verify" else None
    setup, runs = make_setup(options, checkpoint.config), {}
    for kernel in ("reference", "attention:xla" if dense else "experts:ragged"):
        if kernel == "attention:xla":  # which serves GPUs alone
            monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        model = dataclasses.replace(checkpoint, kernel=kernel)
        runs[kernel] = decode(model, request, setup, False, verifier).rows
    wanted, found = runs.values()
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.nfe, wanted.nfe)
