"""Meshes, and the rules that place weights on them. Eight virtual CPU devices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdllm import DecodeConfig, sharding
from jdllm.checkpoint import placements, random_model
from jdllm.configs import NAMED
from jdllm.llm import LLM
from jdllm.model import assemble, named


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


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x2", "1x4"])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_every_mesh_decodes_the_same_tokens(mesh: str, cfg_scale: float):
    """Five prompts, so that batches do not divide; sharp random weights, so that no ties come."""
    config = NAMED["tiny"]
    _, params = random_model(config, sharding.parse_mesh("1x1"), seed=1)
    arrays = {name: np.array(leaf[...]) for name, leaf in named(params).items()}
    arrays["head"] *= 5
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, n).tolist() for n in (5, 17, 9, 30, 3)]
    decode = DecodeConfig(gen_length=16, block_length=8, threshold=0.5, cfg_scale=cfg_scale)
    results = []
    for text in ("1x1", mesh):
        grid = sharding.parse_mesh(text)
        targets = placements(config, grid)
        placed = {name: jax.device_put(x, targets[name]) for name, x in arrays.items()}
        results.append(LLM(config, *assemble(config, placed), grid).generate(prompts, decode))
    assert results[0] == results[1]
    assert any(completion.nfe > 2 for completion in results[0])
