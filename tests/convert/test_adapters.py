"""Adapters that PEFT wrote: read, replayed, merged, written again; and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.convert import adapters
from jdllm.convert.families import FAMILIES
from jdllm.convert.table import restore_sources
from jdllm.model import lora
from jdllm.model.lora import Adapter
from jdllm.model.mask import Mask
from jdllm.model.model import Model, named
from jdllm.model.weights import dense
from jdllm.runtime import sharding
from tests.support.recordings import load

GOLDENS = Path(__file__).parents[1] / "goldens"
# Recorded adapters, and what they adapt.
CASES = {
    "llada_qkv": "llada",
    "llada_all": "llada",
    "llada_gqa_attn": "llada_gqa",
    "dream_all": "dream",
    "llada2_moe_attn_mlp": "llada2_moe",
    "llada_moe_attn": "llada_moe",
}
ATOL = 5e-4


@jax.jit
def logits_of(model: Model, tokens_BT: jax.Array, mask: Mask) -> jax.Array:
    columns_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return model.logits(model(model.embed(tokens_BT), columns_BT, mask).hidden)


def one_device() -> jax.sharding.Mesh:
    return sharding.parse_mesh("1x1")


def adapted(case: str) -> Model:
    model = load(GOLDENS / CASES[case])
    factors = adapters.read_factors(GOLDENS / "peft" / case, model.config)
    placed = adapters.place(factors, model.config, one_device())
    return dataclasses.replace(model, adapter=Adapter(placed))


def recorded(case: str) -> dict[str, Any]:
    with np.load(GOLDENS / "peft" / case / "logits.npz") as stored:
        return dict(stored)


def mask_of(model: Model, stored: dict[str, Any]) -> Mask:
    config = dataclasses.replace(
        model.config, block_causal=int(stored.get("block_length", 0)) or None
    )
    return Mask.of(config, jnp.ones(stored["tokens"].shape, bool))


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_the_recorded_logits(case):
    model, stored = adapted(case), recorded(case)
    got = logits_of(model, stored["tokens"], mask_of(model, stored))
    np.testing.assert_allclose(got, stored["adapted_logits"], atol=ATOL)


@pytest.mark.parametrize("case", ["llada_all", "dream_all", "llada2_moe_attn_mlp"])
def test_merged_weights_are_those_of_peft(case):
    model, stored = adapted(case), recorded(case)
    assert model.adapter
    whole = dataclasses.replace(model, params=lora.joined(model.params, model.adapter))
    joined = {name: np.asarray(dense(leaf)) for name, leaf in named(whole).items()}
    tensors = restore_sources(FAMILIES[model.config.family], model.config, joined)
    merged = {k.removeprefix("merged__"): v for k, v in stored.items() if k.startswith("merged__")}
    assert len(merged) == 2
    for name, value in merged.items():
        np.testing.assert_allclose(tensors[name], value, atol=1e-6)
