"""Weights in 8 bits: their rounding, products, experts, meshes, and what they change of logits."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.decode.memory import weight_bytes
from jdllm.kernels import choose
from jdllm.kernels.product import narrow
from jdllm.kernels.product import reference as plain
from jdllm.kernels.quantised import KINDS, Quantised, quantise
from jdllm.model.config import NAMED, ModelConfig, MoEConfig
from jdllm.model.model import Model, abstract, arrays, assemble, forward, named
from jdllm.model.quantise import quantise_params
from jdllm.model.weights import product
from jdllm.runtime import sharding
from jdllm.store.checkpoint import placements, random_model
from jdllm.store.fingerprint import fingerprint
from tests.support.interpreted import interpreted
from tests.support.marks import quick
from tests.support.recordings import Case, load, supported

__all__ = ["interpreted"]
KEY = jax.random.key(0)
SPARSE = dataclasses.replace(
    NAMED["tiny"], moe=MoEConfig(experts=8, top_k=2, expert_mlp=16, shared_mlp=24)
)
# Of the goldens' logits: the relative error at most, and the share of equal best tokens at least.
# Random weights of 64 channels amplify: rounding them to bfloat16 makes an error of 0.02 already
# (experiments/weights_accuracy.py tells all).
BOUNDS = {"int8": (0.09, 0.85), "fp8": (0.25, 0.7)}


def as_held(config: ModelConfig, weights: str) -> ModelConfig:
    changed: Any = weights
    return dataclasses.replace(config, weights=changed)


def in_8_bits(model: Model, weights: str) -> Model:
    config, params = as_held(model.config, weights), quantise_params(model.params, weights)
    return dataclasses.replace(model, config=config, params=params)


def by_hand(weight: np.ndarray, inputs: tuple[int, ...], kind: str) -> np.ndarray:
    """The weight rounded to 8 bits, in float64 but for the scale."""
    largest = {"int8": 127, "fp8": 448}[kind]
    scale = np.abs(weight).max(axis=inputs, keepdims=True) / np.float32(largest)
    scale = np.where(scale == 0, np.float32(1), scale)
    if kind == "int8":
        return np.rint(weight / scale).astype(float) * scale
    return (weight / scale).astype(ml_dtypes.float8_e4m3fn).astype(float) * scale


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from([((6, 3), (0,)), ((4, 2, 5), (0,)), ((3, 4, 6), (0, 1)), ((2, 6, 3), (1,))]),
    st.integers(0, 99),
)
def test_values_are_the_nearest(kind, case, seed):
    shape, inputs = case
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    weight[..., 0] = 0
    found = quantise(jnp.array(weight), inputs, kind)
    assert found.shape == shape and found.dtype == KINDS[kind].dtype
    assert found.scale.shape == tuple(n for i, n in enumerate(shape) if i not in inputs)
    np.testing.assert_allclose(found.dense(), by_hand(weight, inputs, kind), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spec", "x", "shape", "inputs"),
    [
        ("BTD,DCHK->CBTHK", (2, 3, 8), (8, 3, 2, 4), (0,)),
        ("BTHK,HKD->BTD", (2, 3, 2, 4), (2, 4, 8), (0, 1)),
        ("BTF,FD->BTD", (2, 3, 6), (6, 8), (0,)),
        ("TD,EDM->TEM", (3, 8), (2, 8, 5), (1,)),
    ],
)
def test_products_are_those_of_the_dense_weight(kind, spec, x, shape, inputs):
    weight = quantise(jax.random.normal(KEY, shape), inputs, kind)
    x = jax.random.normal(jax.random.key(1), x)
    wanted = jnp.einsum(spec, x, weight.dense())
    np.testing.assert_allclose(product(spec, x, weight), wanted, atol=1e-5)
    got = product(spec, x, weight, result=jnp.dtype("float32"))  # no kernel's case
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_bfloat16_holds_every_value():
    whole, codes = np.arange(-127, 128), np.arange(256, dtype=np.uint8)
    floats = codes.view(ml_dtypes.float8_e4m3fn)
    floats = floats[np.isfinite(floats.astype(float))]
    for values in (whole, floats):
        again = values.astype(ml_dtypes.bfloat16).astype(float)
        np.testing.assert_array_equal(again, values.astype(float))


def test_the_scale_is_not_rounded_to_the_dtype_of_x():
    """A channel's factor would be off by the same share in every product."""
    weight = Quantised(jnp.full((4, 8), 1, jnp.int8), jnp.full((4,), 1 / 3, jnp.float32), (0,))
    got = product("BD,DF->BF", jnp.ones((1, 8), jnp.bfloat16), weight)
    np.testing.assert_array_equal(got, jnp.full((1, 4), 8 / 3, jnp.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", quick(["reference", "ragged"], "reference"))
def test_experts_take_weights_in_8_bits(name, kind):
    T, E, D, M = 6, 4, 8, 5
    keys = jax.random.split(KEY, 5)
    x = jax.random.normal(keys[0], (T, D))
    gate_up = quantise(jax.random.normal(keys[1], (E, D, 2, M)), (1,), kind)
    down = quantise(jax.random.normal(keys[2], (E, M, D)), (1,), kind)
    _, picks = jax.lax.top_k(jax.random.uniform(keys[3], (T, E)), 2)
    weights = jax.random.uniform(keys[4], (T, 2))
    run = partial(choose.experts, x, picks_TP=picks, weights_TP=weights)
    got = run(gate_up_EDCM=gate_up, down_EMD=down, kernel=f"experts:{name}")
    wanted = run(gate_up_EDCM=gate_up.dense(), down_EMD=down.dense(), kernel="reference")
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_kernels_of_gpus_decline_elsewhere():
    x, weight = jnp.ones((2, 8), jnp.bfloat16), quantise(jnp.ones((4, 8)), (1,))
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        narrow.product(x, weight.values, weight.scale)
    with choose.forcing("product:narrow"), pytest.raises(ValueError, match="does not serve prod"):
        product("BD,FD->BF", x, weight)


@pytest.mark.parametrize("rows", [5, 40])
def test_narrow_interpreted_is_the_reference(rows: int, interpreted: None):
    """With the tiles of few rows and of many, of which some are left over."""
    keys = jax.random.split(KEY)
    x = jax.random.normal(keys[0], (rows, 256)).astype(jnp.bfloat16)
    weight = quantise(jax.random.normal(keys[1], (128, 256)), (1,))
    given = x, weight.values, weight.scale
    found = narrow.product(*given).astype(jnp.float32)
    exact = plain.product(x.astype(jnp.float32), *given[1:])
    np.testing.assert_allclose(found, exact, rtol=0.01, atol=0.05)


@given(st.integers(1, 600), st.integers(1, 64), st.integers(1, 64))
def test_tiles_cover_the_product(M, columns, inner):
    N, K = 64 * columns, 64 * inner
    try:
        tiles = narrow.tiles_of(M, K, N)
    except NotImplementedError:
        assert any(N % tiles.columns or K % tiles.inner for _, tiles in narrow.TILES)
        return
    assert N % tiles.columns == 0 and K % (tiles.inner * tiles.split) == 0


# Models


MODELS = {"dense": NAMED["tiny"], "experts": SPARSE}


@pytest.mark.parametrize(
    ("name", "kind"),
    quick(itertools.product(MODELS, KINDS), ("experts", "fp8")),
)
def test_a_model_computes_what_its_weights_say_on_any_mesh(name, kind):
    config, one = MODELS[name], sharding.parse_mesh("1x1")
    model = random_model(as_held(config, kind), one)
    plain = random_model(config, one)
    dense = {
        name: value.dense() if isinstance(value := leaf.get_value(), Quantised) else value
        for name, leaf in named(model).items()
    }
    for name, leaf in named(plain).items():  # the same weights, but for the rounding
        np.testing.assert_allclose(dense[name], leaf[...], atol=np.abs(leaf[...]).max() / 14)
    tokens, visible = jax.random.randint(KEY, (4, 8), 0, 300), jnp.ones((4, 8), bool)
    run = jax.jit(forward)
    wanted = run(assemble(config, dense, one), tokens, visible)
    np.testing.assert_allclose(run(model, tokens, visible), wanted, atol=2e-4)

    grid = sharding.parse_mesh("2x2")
    places = placements(model.config, grid)
    held = {name: jax.device_put(array, places[name]) for name, (array, _) in arrays(model).items()}
    spread = assemble(model.config, held, grid)
    np.testing.assert_allclose(run(spread, tokens, visible), wanted, atol=2e-4)
    scale, values = held["layers.0.attention.q.scale"], held["layers.0.attention.q.values"]
    assert scale.addressable_shards[0].data.shape == (2, 16)  # half of the heads
    assert values.addressable_shards[0].data.shape == (2, 16, 64)
    assert fingerprint(spread) == fingerprint(model) != fingerprint(plain)
    size = sum(array.nbytes for array, _ in arrays(model).values())
    assert weight_bytes(model.config, one) == size < weight_bytes(config, one)


def test_a_model_without_8_bits_keeps_its_fingerprint():
    """Adapters, results and runs name their base by it; this one is from before there were any."""
    config = dataclasses.replace(NAMED["tiny"], layers=1)
    zeros = {n: jnp.zeros(leaf.shape, leaf.dtype) for n, leaf in named(abstract(config)).items()}
    assert fingerprint(assemble(config, zeros)) == "e8fea631a222227e886a9047e4960892"


@pytest.mark.parametrize("kind", quick(KINDS, "int8"))
@pytest.mark.parametrize("case", supported("checkpoint"))
def test_logits_stay_near_those_recorded(case: Case, kind: str):
    stored = case.path / "logits.npz"
    if not stored.exists():
        return
    recorded = np.load(stored)
    ids, wanted = jnp.array(recorded["input_ids"]), recorded["logits"]
    model = in_8_bits(load(case.path), kind)
    got = np.asarray(jax.jit(forward)(model, ids, jnp.ones(ids.shape, bool)))
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    same = (got.argmax(-1) == wanted.argmax(-1)).mean()
    most, least = BOUNDS[kind]
    assert 0 < error < most and same >= least, (error, same)
