"""Meshes, and the rules that place weights on them. Eight virtual CPU devices."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdllm import DecodeConfig
from jdllm.convert.commands import main as convert
from jdllm.decode.memory import weight_bytes
from jdllm.kernels.attention import reference
from jdllm.kernels.choose import TABLES
from jdllm.kernels.choose import experts as kernel
from jdllm.kernels.experts import dense
from jdllm.llm import LLM
from jdllm.load import choose_mesh
from jdllm.model.config import NAMED, MoEConfig, count_parameters
from jdllm.model.model import forward
from jdllm.runtime import sharding
from jdllm.store import checkpoint
from jdllm.store.checkpoint import placements
from tests.support.marks import quick
from tests.support.models import on_mesh, random_arrays

GOLDEN = Path(__file__).parents[1] / "goldens" / "llada"
SPARSE = dataclasses.replace(
    NAMED["tiny"], moe=MoEConfig(experts=8, top_k=2, expert_mlp=16, shared_mlp=24)
)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("auto", (8, 1)),
        ("4x1", (4, 1)),
        ("2x4", (2, 4)),
        ("model:2", (1, 2)),
        ("data:2,model:2", (2, 2)),
    ],
)
def test_mesh_texts(text: str, shape: tuple[int, int]):
    assert sharding.parse_mesh(text).devices.shape == shape


@pytest.mark.parametrize("text", ["4", "0x1", "2x", "data:2,data:3,x", "rows:2", "axb"])
def test_a_text_that_is_no_mesh_is_refused(text: str):
    with pytest.raises(ValueError, match="is not a mesh: write mesh=AxB"):
        sharding.parse_mesh(text)


def test_too_many_devices_are_refused():
    with pytest.raises(ValueError, match="needs 16 devices, but only 8 cpu device"):
        sharding.parse_mesh("4x4")


def test_auto_is_data_parallel_where_the_model_fits():
    """16 GB of bfloat16 weights, of which a device may hold 70 % of its memory."""
    shapes = {40e9: (8, 1), 20e9: (4, 2), 10e9: (2, 4)}
    for memory, shape in shapes.items():
        mesh = choose_mesh("auto", "random:llada-8b", "bfloat16", memory=int(memory))
        assert mesh.devices.shape == shape
    trained = choose_mesh("auto", "random:llada-8b", "float32", copies=4, memory=int(80e9))
    assert trained.devices.shape == (2, 4)
    assert choose_mesh("2x1", "random:llada-8b", memory=1).devices.shape == (2, 1)


def test_auto_says_where_no_mesh_serves():
    with pytest.raises(ValueError, match="finds no mesh of 8 cpu device.*use more devices"):
        choose_mesh("auto", "random:llada-8b", "bfloat16", memory=1_000_000)
    # 14 heads do not split over 4 or 8 devices, so only 2 remain
    assert choose_mesh("auto", "random:qwen2.5-0.5b", "float32", memory=2 * 10**9).shape == {
        "data": 4,
        "model": 2,
    }


def test_the_bytes_of_a_device():
    """Everything but norms and what cannot be split goes by shares."""
    config = dataclasses.replace(NAMED["tiny"], kv_heads=4)
    whole, quarter = (weight_bytes(config, sharding.parse_mesh(m)) for m in ("1x1", "2x4"))
    norms = 4 * config.embed * (2 * config.layers + 1)
    assert whole == 4 * count_parameters(config)
    assert quarter == (whole - norms) / 4 + norms


@pytest.mark.parametrize("source", ["random", "converted", "hugging face"])
def test_a_mesh_that_cannot_serve_is_refused_before_anything_is_read(source, tmp_path, monkeypatch):
    """4 query heads cannot be split over 8 devices."""
    folder = {"random": "random:tiny", "hugging face": str(GOLDEN)}.get(source)
    if folder is None:
        convert(["llada", f"source={GOLDEN}", f"output={tmp_path / 'ours'}"])
        folder = str(tmp_path / "ours")

    def never(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "restore", never)
    monkeypatch.setattr(checkpoint.jax, "make_array_from_callback", never)
    monkeypatch.setattr(checkpoint.jax, "jit", never)
    with pytest.raises(ValueError, match="of size 4 cannot be split over the 8.*divides 4"):
        LLM.load(folder, "1x8")


def test_kernels_run_per_shard_with_their_own_rows_heads_and_experts(monkeypatch):
    """As if they were custom kernels: they see a device's slices, never the mesh."""
    config = dataclasses.replace(SPARSE, layers=1, heads=8, kv_heads=2, head_dim=8)
    arrays = random_arrays(config)
    seen: dict[str, set] = {"attention": set(), "experts": set()}

    def attention(q, k, v, visible):
        seen["attention"].add((q.shape, k.shape, visible.shape))
        return reference.attention(q, k, v, visible)

    def experts(x, gate_up, down, picks, weights):
        seen["experts"].add((x.shape, gate_up.shape, picks.shape))
        return dense.experts(x, gate_up, down, picks, weights)

    monkeypatch.setitem(TABLES["attention"], "reference", attention)
    monkeypatch.setitem(TABLES["experts"], "reference", experts)
    tokens, visible = np.ones((4, 6), np.int32), np.ones((4, 6), bool)
    logits = {}
    for text in ("1x1", "2x4"):
        grid = sharding.parse_mesh(text)
        model = on_mesh(config, arrays, grid)
        rows = jax.device_put((tokens, visible), sharding.by_row(grid))
        logits[text] = jax.jit(forward)(model, *rows)
    np.testing.assert_allclose(logits["2x4"], logits["1x1"], atol=1e-5)
    assert seen["attention"] == {  # 8 heads on 2 key/value heads: two of a group, on one of them
        ((4, 6, 8, 8), (4, 6, 2, 8), (4, 6)),
        ((2, 6, 2, 8), (2, 6, 1, 8), (2, 6)),
    }
    E, D, M = 8, config.embed, 16
    assert seen["experts"] == {
        ((24, D), (E, D, 2, M), (24, 2)),
        ((12, D), (E // 4, D, 2, M), (12, 2)),
    }


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mesh"),
    [(8, 8, "1x8"), (8, 2, "1x4"), (12, 4, "1x6"), (12, 4, "2x2"), (6, 1, "1x3")],
)
def test_attention_of_any_grouping_on_any_mesh(heads: int, kv_heads: int, mesh: str):
    """Also where a device's query heads belong to several key/value heads, but not to all."""
    config = dataclasses.replace(
        NAMED["tiny"], layers=1, heads=heads, kv_heads=kv_heads, mlp=96, vocab=336
    )
    tokens, visible = np.arange(12).reshape(2, 6), np.ones((2, 6), bool)
    visible[1, 4:] = False
    arrays, logits = random_arrays(config), []
    for text in ("1x1", mesh):
        model = on_mesh(config, arrays, text)
        logits.append(jax.jit(forward)(model, tokens, visible))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)


def test_rows_that_do_not_divide_are_everybodys():
    """A batch that LLM did not fill up still works, on every device alike."""
    config = dataclasses.replace(SPARSE, layers=1)
    arrays, logits = random_arrays(config), []
    for text in ("1x1", "4x2"):
        model = on_mesh(config, arrays, text)
        tokens, visible = np.arange(15).reshape(3, 5), np.ones((3, 5), bool)
        logits.append(jax.jit(forward)(model, tokens, visible))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "ragged"])
def test_picks_of_other_devices_add_nothing(implementation: str):
    rng = np.random.default_rng(0)
    T, E, D, M, P = 5, 8, 6, 4, 3
    x, gate_up, down, weights = (
        jnp.array(rng.normal(size=s), jnp.float32)
        for s in ((T, D), (E, D, 2, M), (E, M, D), (T, P))
    )
    picks = jnp.array(rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :P], jnp.int32)
    whole = kernel(x, gate_up, down, picks, weights, f"experts:{implementation}")
    parts = [
        kernel(
            x, gate_up[i : i + 2], down[i : i + 2], picks - i, weights, f"experts:{implementation}"
        )
        for i in range(0, E, 2)
    ]
    np.testing.assert_allclose(sum(parts), whole, atol=1e-5)


def test_weights_are_placed_by_their_axes():
    mesh = sharding.parse_mesh("2x4")
    specs = {name: s.spec for name, s in placements(NAMED["tiny"], mesh).items()}
    assert specs["embedding"] == P("model", None)
    assert specs["layers.0.attention.q"] == P(None, "model", None)
    assert specs["layers.0.attention.kv"] == P(None, None, None, None)  # 2 kv heads, 4 shards
    assert specs["layers.1.mlp.gate_up"] == P(None, None, "model")
    assert specs["norm"] == P(None)


def test_an_indivisible_axis_names_the_weight():
    config = dataclasses.replace(NAMED["tiny"], vocab=321)
    with pytest.raises(ValueError, match="embedding: its axis 'vocab' of size 321"):
        placements(config, sharding.parse_mesh("1x4"))


def test_two_axes_on_one_mesh_axis_are_refused():
    mesh = sharding.parse_mesh("1x4")
    with pytest.raises(ValueError, match="w: two of its axes"):
        sharding.spec("w", (4, 4), ("heads", "mlp"), mesh)


@pytest.mark.parametrize(
    ("mesh", "cfg_scale"), quick([("8x1", 1.0), ("4x2", 0.0), ("1x4", 1.0)], ("4x2", 0.0))
)
def test_every_mesh_decodes_the_same_tokens(mesh: str, cfg_scale: float):
    """Five prompts, so that batches do not divide; sharp random weights, so that no ties come."""
    config = NAMED["tiny"]
    arrays = random_arrays(config, seed=1, sharpness=5)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, n).tolist() for n in (5, 17, 9, 30, 3)]
    decode = DecodeConfig(gen_length=16, block_length=8, threshold=0.5, cfg_scale=cfg_scale)
    results = []
    for text in ("1x1", mesh):
        grid = sharding.parse_mesh(text)
        results.append(LLM(on_mesh(config, arrays, grid)).generate(prompts, decode))
    assert results[0] == results[1]
    assert any(completion.nfe > 2 for completion in results[0])
