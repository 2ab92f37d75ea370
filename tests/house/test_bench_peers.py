"""Our loop beside its peers: the table, what is refused, and tokamax's layer against the reference.

The peers themselves need a GPU.
"""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.kernels.experts import dense
from jdllm.runtime import cli

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(sys, "path", [*sys.path])
    return runpy.run_path(str(FOLDER / "bench_peers.py"))


def test_a_step_of_a_peer_has_our_floor(script: dict):
    rows = [
        {"name": "jdllm loop", "model": "m", "rows": 1, "ms": 6.0, "floor_ms": 5.0},
        {"name": "torch eager", "model": "m", "rows": 1, "ms": 20.0},
        {"name": "torch", "model": "m", "rows": 8, "reason": "no | memory\nat all"},
    ]
    found = script["joined"](rows)
    assert [row.get("ratio") for row in found] == [1.2, 4.0, None]
    lines = script["shown"](found).splitlines()
    assert lines[2] == "| jdllm loop | m | 1 | 6.00 | 5.00 | 1.20 |  |"
    assert lines[3] == "| torch eager | m | 1 | 20.00 | 5.00 | 4.00 |  |"
    assert lines[4] == "| torch | m | 8 | - | - | - | no / memory at all |"


def test_settings_are_checked(script: dict):
    config = cli.parse(script["PeersConfig"], ["output=x.json"])
    assert config.cases == [("llada-8b", (1, 8)), ("llada2-mini", (1,))]
    for words, match in ((["models=a:x"], "models=a:x"), (["parts=ours,theirs"], "parts=theirs")):
        with pytest.raises(SystemExit):
            cli.parse(script["PeersConfig"], ["output=x.json", *words])
        with pytest.raises(ValueError, match=match):
            script["PeersConfig"](Path("x"), **dict([words[0].split("=")]))


def test_torch_is_refused_where_it_is_missing_or_sees_no_gpu(monkeypatch: pytest.MonkeyPatch):
    load = runpy.run_path(str(FOLDER / "torch_step.py"))["load_torch"]
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match="torch is not installed"):
        load()
    blind = SimpleNamespace(__version__="2", cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", blind)
    with pytest.raises(RuntimeError, match="torch 2 sees no GPU"):
        load()


def test_a_peer_that_cannot_run_says_why(script: dict, tmp_path: Path):
    words = ["parts=torch", "models=nothing", f"output={tmp_path / 'rows.json'}"]
    script["main"](cli.parse(script["PeersConfig"], words))
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert "nothing" in row["reason"] and (row["name"], row["rows"]) == ("torch", 1)
    assert row["reason"][:40].strip() in (tmp_path / "rows.md").read_text()


def test_a_process_that_hangs_ends(script: dict):
    (row,) = script["started"]("torch_step.py", [], {"name": "torch"}, 0.01)
    assert row == {"name": "torch", "reason": "it did not end within 0 s"}


def test_tokamaxs_layer_is_the_reference():
    script = runpy.run_path(str(FOLDER / "bench_peers.py"))
    rng, (T, P, E, D, M) = np.random.default_rng(0), (6, 2, 5, 8, 4)
    x, gate_up, down = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((T, D), (E, D, 2, M), (E, M, D))
    )
    picks = jnp.asarray([rng.permutation(E)[:P] for _ in range(T)], jnp.int32)
    given = x, gate_up, down, picks, jnp.asarray(rng.random((T, P)), jnp.float32)
    layer = script["by_ragged_dot"](jax.lax.ragged_dot)
    np.testing.assert_allclose(layer(*given), dense.experts(*given), rtol=1e-5, atol=1e-5)


def test_the_best_of_tokamaxs_tiles_counts(script: dict, monkeypatch: pytest.MonkeyPatch):
    """Those that cannot run say why; with none left the reason is raised."""

    def made(config: Any) -> int:
        if config.block_m > 64:
            raise NotImplementedError("too many rows")
        return config.block_m

    sides = SimpleNamespace(MatmulDimension=SimpleNamespace(M=0, N=1))
    own = SimpleNamespace(Config=SimpleNamespace, PallasMosaicGpuRaggedDot=made, common=sides)
    tokamax = SimpleNamespace(ragged_dot=lambda *, implementation: implementation[0])
    monkeypatch.setitem(sys.modules, "tokamax", tokamax)
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.ragged_dot.pallas_mosaic_gpu", own)
    monkeypatch.setitem(script["quickest"].__globals__, "by_ragged_dot", lambda dot: dot)
    tiles = [{"block_m": rows, "grid_minor_dim": "M"} for rows in (32, 128, 16)]
    found = script["quickest"](lambda layer: float(layer()), tiles)
    wide, *narrow = ({"grid_minor_dim": "M", "block_m": rows} for rows in (128, 16, 32))
    refused = wide | {"reason": "NotImplementedError: too many rows"}
    assert found["ms"] == 16.0
    assert found["tiles"] == [one | {"ms": float(one["block_m"])} for one in narrow] + [refused]
    with pytest.raises(NotImplementedError, match="too many rows"):
        script["quickest"](float, tiles[1:2])


@pytest.mark.slow
def test_our_rows_are_measured(script: dict, tmp_path: Path):
    words = ["parts=ours", "models=tiny:1+2", "columns=64", "block=8", "repeats=1"]
    words += ["copy_megabytes=1", f"output={tmp_path / 'rows.json'}"]
    script["main"](cli.parse(script["PeersConfig"], words))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["name"], row["rows"]) for row in rows] == [("jdllm loop", 1), ("jdllm loop", 2)]
    keys = {"device", "versions", "command", "date", "floor_ms", "ms", "ratio"}
    assert all(keys <= set(row) for row in rows), rows
