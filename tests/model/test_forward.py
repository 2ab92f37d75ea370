"""The forward pass where it differs from LLaDA's: biases, causal attention, a tied head."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jdllm import DecodeConfig
from jdllm.llm import LLM
from jdllm.model.cache import Cache
from jdllm.model.config import NAMED, ModelConfig
from jdllm.model.mask import Mask
from jdllm.model.model import Model, assemble, forward, named
from jdllm.runtime import sharding
from jdllm.store import checkpoint
from jdllm.training.config import SFTConfig
from jdllm.training.run import fine_tune as train

FACTS = {
    "dream": {"qkv_bias": True, "shift_logits": True},
    "dream-mha": {"qkv_bias": True, "shift_logits": True, "kv_heads": 4},
    "qwen2": {"qkv_bias": True, "causal": True, "tied_head": True},
}


def random_model(name: str) -> tuple[ModelConfig, dict[str, Any]]:
    """A tiny model of these facts, whose biases are not zero."""
    config = dataclasses.replace(NAMED["tiny"], **FACTS[name])
    model = checkpoint.random_model(config, sharding.parse_mesh("1x1"), seed=1)
    rng = np.random.default_rng(0)
    arrays = {key: np.array(leaf[...]) for key, leaf in named(model).items()}
    for key, array in arrays.items():
        if key.endswith("_bias"):
            assert not array.any()
            arrays[key] = rng.normal(size=array.shape).astype(array.dtype)
    return config, arrays


def merged(config: ModelConfig, arrays: dict[str, Any]) -> Model:
    return assemble(config, arrays)


def random_tokens(B: int = 2, T: int = 12) -> tuple[jax.Array, jax.Array]:
    """Ids, and a mask that hides some columns but not the first."""
    rng = np.random.default_rng(1)
    visible = rng.random((B, T)) < 0.8
    visible[:, 0] = True
    return jnp.array(rng.integers(0, 300, (B, T))), jnp.array(visible)


def fed(
    model: Model, tokens: jax.Array, visible: jax.Array, cache: Cache, columns: list[int]
) -> tuple[jax.Array, Cache]:
    """Logits of some columns, fed alone over a cache."""
    where = jnp.broadcast_to(jnp.array(columns), (tokens.shape[0], len(columns)))
    x = model.embed(tokens[:, jnp.array(columns)])
    found = model(x, where, Mask.of(model.config, visible), cache)
    assert found.cache is not None
    return model.logits(found.hidden), found.cache


@pytest.mark.parametrize("name", FACTS)
def test_the_cache_changes_nothing(name: str):
    """Filled at once and one part fed again; a causal model also part by part, as it generates."""
    config, arrays = random_model(name)
    model = merged(config, arrays)
    tokens, visible = random_tokens()
    expected = forward(model, tokens, visible)
    empty = model.empty_cache(2, 12)
    whole, full = fed(model, tokens, visible, empty, list(range(12)))
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    again, _ = fed(model, tokens, visible, full, list(range(4, 9)))
    np.testing.assert_allclose(again, expected[:, 4:9], atol=1e-5)
    start, partial = fed(model, tokens, visible, empty, list(range(7)))
    rest, _ = fed(model, tokens, visible, partial, list(range(7, 12)))
    parts = jnp.concatenate([start, rest], axis=1)
    assert np.allclose(parts, expected, atol=1e-5) == config.causal


@pytest.mark.parametrize("name", FACTS)
def test_who_sees_whom(name: str):
    config, arrays = random_model(name)
    model = merged(config, arrays)
    tokens, _ = random_tokens(1)
    visible = jnp.ones(tokens.shape, bool)
    before = forward(model, tokens, visible)
    after = forward(model, tokens.at[0, 5].add(1), visible)
    changed = np.asarray((before != after).any(-1))[0]
    assert changed[5:].all()
    assert changed[:5].all() == (not config.causal) == changed[:5].any()


def test_left_padding_leaves_causal_rows_alone():
    config, arrays = random_model("qwen2")
    model = merged(config, arrays)
    tokens, _ = random_tokens(1)
    alone = forward(model, tokens, jnp.ones((1, 12), bool))
    padded = jnp.pad(tokens, ((0, 0), (3, 0)), constant_values=config.pad_id)
    visible = jnp.arange(15)[None] >= 3
    row = forward(model, padded, visible)[:, 3:]
    np.testing.assert_allclose(row, alone, atol=1e-4)


@pytest.mark.parametrize("name", FACTS)
def test_biases_are_placed_by_their_axes(name: str):
    config, arrays = random_model(name)
    mesh = sharding.parse_mesh("2x2")
    targets = checkpoint.placements(config, mesh)
    specs = {key: target.spec for key, target in targets.items() if key.startswith("layers.0")}
    if config.kv_heads == config.heads:
        assert specs["layers.0.attention.qkv_bias"] == P(None, "model", None)
    else:
        assert specs["layers.0.attention.q_bias"] == P("model", None)
        assert specs["layers.0.attention.kv_bias"] == P(None, "model", None)
        wide = checkpoint.placements(config, sharding.parse_mesh("1x4"))
        assert wide["layers.0.attention.kv_bias"].spec == P(None, None, None)  # 2 heads, 4 parts
    placed = assemble(config, {k: jax.device_put(v, targets[k]) for k, v in arrays.items()}, mesh)
    tokens, visible = random_tokens()
    rows = jax.device_put((tokens, visible), sharding.by_row(mesh))
    expected = forward(merged(config, arrays), tokens, visible)
    np.testing.assert_allclose(jax.jit(forward)(placed, *rows), expected, atol=1e-4)


# ---------------------------------------------------------------- what cannot be done


def test_training_refuses_a_causal_model(tmp_path: Path):
    config, arrays = random_model("qwen2")
    checkpoint.save_model(tmp_path, jax.tree.map(jnp.asarray, assemble(config, arrays)))
    with pytest.raises(ValueError, match="a causal model has no mask to predict at"):
        train(
            SFTConfig(
                task="sudoku:1", model=str(tmp_path), tokenizer="bundled", output=tmp_path / "run"
            )
        )


def test_a_causal_model_drafts_nothing():
    config, arrays = random_model("qwen2")
    llm = LLM(assemble(config, arrays, sharding.parse_mesh("1x1")))
    with pytest.raises(ValueError, match="can judge drafts as a verifier"):
        llm.generate([[1, 2, 3]], DecodeConfig(gen_length=8, block_length=8))
