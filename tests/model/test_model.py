"""The model's seams: a pytree, masks from the caller, slots of a cache, probes, forced kernels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.kernels import choose
from jdllm.kernels.attention.reference import by_query
from jdllm.llm import LLM
from jdllm.model.config import NAMED, MoEConfig
from jdllm.model.mask import Mask
from jdllm.model.model import Model, forward, named
from jdllm.model.weights import product
from jdllm.runtime import sharding
from jdllm.store.checkpoint import random_model

SMALL = dataclasses.replace(
    NAMED["tiny"], embed=32, heads=2, kv_heads=2, head_dim=16, mlp=32, vocab=64,
    mask_id=61, eos_id=60, pad_id=60, stop_ids=(60,),
    moe=MoEConfig(experts=4, top_k=2, expert_mlp=8, shared_mlp=8, dense_layers=(0,)),
)  # fmt: skip
T, BLOCK = 8, 4


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(SMALL, sharding.parse_mesh("1x1"), seed=2)


@jax.jit
def states(model: Model, tokens_BT: jax.Array, positions_BT: jax.Array, mask: Mask) -> jax.Array:
    return model(model.embed(tokens_BT), positions_BT, mask).hidden


def ids(rows: int, columns: int, seed: int = 0) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).integers(0, 60, (rows, columns)), jnp.int32)


def columns(rows: int, count: int, start: int = 0) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(start, start + count), (rows, count))


def test_parameters_are_its_only_data(model: Model):
    leaves = jax.tree.leaves(model)
    assert len(leaves) == len(named(model)) == len(jax.tree.leaves(model.params))
    double = jax.tree.map(lambda x: 2 * x, model)
    assert isinstance(double, Model) and double.config == model.config
    np.testing.assert_array_equal(named(double)["head"][...], 2 * named(model)["head"][...])


def test_the_compute_dtype_is_a_fact_of_the_model(model: Model):
    half = dataclasses.replace(model, dtype="bfloat16")
    assert half.embed(ids(1, 3)).dtype == half.empty_cache(1, 3).keys[0].dtype == jnp.bfloat16
    assert states(half, ids(1, 3), columns(1, 3), Mask(jnp.array([3]))).dtype == jnp.bfloat16
    assert forward(half, ids(1, 3), jnp.ones((1, 3), bool)).dtype == jnp.float32
    assert named(half)["head"][...].dtype == jnp.float32


# ---------------------------------------------------------------- masks


def sees(mask: Mask, q: int, k: int) -> bool:
    """The definition, for one query and one key; of two streams by column."""
    n = mask.size
    match mask.kind:
        case "causal":
            return k <= q
        case "blocks":
            return k // n <= q // n
        case "window":
            return abs(q - k) < n
        case "two_stream":
            of_q, of_k = (q % T) // n, (k % T) // n
            if k < T:  # noisy keys are for the noisy queries of their block alone
                return q < T and of_q == of_k
            return of_k < of_q if q < T else of_k <= of_q
    return True


@pytest.mark.parametrize(
    ("kind", "size"),
    [("causal", 1), ("blocks", 3), ("window", 1), ("window", 4), ("two_stream", 4)],
)
@pytest.mark.parametrize("form", ["lengths", "columns"])
def test_masks_equal_their_definitions(kind, size: int, form: str):
    S = 2 * T if kind == "two_stream" else T
    positions = jnp.tile(columns(2, T), (1, 2)) if kind == "two_stream" else columns(2, T)
    shown = np.arange(S) < np.array([[S - 1], [3]])
    visible = jnp.array([S - 1, 3]) if form == "lengths" else jnp.array(shown)
    mask = Mask(visible, kind=kind, size=size)
    seen = mask.resolve(positions)
    assert seen.shape == (2, S, S)
    for b, q, k in np.ndindex(*seen.shape):
        assert bool(seen[b, q, k]) == bool(shown[b, k] and sees(mask, q, k))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(["full", "causal", "blocks", "window"]),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 24), st.integers(0, 26)), min_size=1, max_size=3),
    st.integers(0, 30),
)
def test_over_a_cache_what_is_seen_is_a_range(
    kind: Any, size: int, spans: list[tuple[int, int]], start: int
):
    """Of every query, by two numbers: as the mask of the same columns, written out, says."""
    positions = start + columns(len(spans), 5)
    own = jnp.array(spans, jnp.int32)
    written = (jnp.arange(24) >= own[:, :1]) & (jnp.arange(24) < own[:, 1:])
    found = Mask(own, kind=kind, size=size).resolve(positions, 24)
    assert found.shape == (len(spans), 1 if kind == "full" else 5, 2)
    expected = by_query(Mask(written, kind=kind, size=size).resolve(positions, 24), 24)
    np.testing.assert_array_equal(by_query(found, 24), expected)
    first = Mask(own[:, 1], kind=kind, size=size).resolve(positions, 24)
    whole = Mask(own.at[:, 0].set(0), kind=kind, size=size).resolve(positions, 24)
    np.testing.assert_array_equal(by_query(first, 24), by_query(whole, 24))


def test_full_masks_stay_lengths():
    """So that kernels which take lengths can serve."""
    lengths = jnp.array([3, 2])
    assert Mask(lengths).resolve(columns(2, T), 40) is lengths
    assert Mask.of(SMALL, lengths, 8) == Mask(lengths)


def test_impossible_masks_are_refused():
    with pytest.raises(ValueError, match="kind=odd of a mask must be full, causal, blocks"):
        Mask(jnp.array([3]), kind="odd")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="size=0 of a mask must be 1 or more"):
        Mask(jnp.array([3]), kind="blocks", size=0)
    with pytest.raises(ValueError, match="two-stream mask is for whole canvases"):
        Mask(jnp.array([3]), kind="two_stream").resolve(columns(1, T), T)


def test_two_streams_are_every_block_behind_its_clean_past(model: Model):
    """One call of [noisy ; clean] gives what a call per block gives, and the clean text's own."""
    noisy, clean = ids(1, T, 3), ids(1, T, 4)
    both, twice = jnp.concatenate([noisy, clean], 1), jnp.tile(columns(1, T), (1, 2))
    two = Mask(jnp.array([2 * T]), kind="two_stream", size=BLOCK)
    found = states(model, both, twice, two)
    blocks = Mask(jnp.array([T]), kind="blocks", size=BLOCK)
    expected = states(model, clean, columns(1, T), blocks)
    np.testing.assert_allclose(found[:, T:], expected, atol=1e-5)
    for start in range(0, T, BLOCK):
        mixed = jnp.concatenate([clean[:, :start], noisy[:, start : start + BLOCK]], 1)
        mixed = jnp.pad(mixed, ((0, 0), (0, T - mixed.shape[1])))
        expected = states(model, mixed, columns(1, T), blocks)[:, start : start + BLOCK]
        np.testing.assert_allclose(found[:, start : start + BLOCK], expected, atol=1e-5)


# ---------------------------------------------------------------- cache


def test_positions_and_slots_are_two_things(model: Model):
    """A canvas written to a cache's last columns, backwards: the mask says where they stand."""
    tokens, order = ids(2, T), columns(2, T)
    mask = Mask(jnp.full(2, T), kind="blocks", size=BLOCK)
    expected = states(model, tokens, order, mask)
    slots = columns(2, T, 4)
    positions = jnp.concatenate([columns(2, 4), order], 1)
    seen = Mask(positions * 0 + jnp.arange(T + 4) >= 4, positions, kind="blocks", size=BLOCK)
    found = model(model.embed(tokens), order, seen, model.empty_cache(2, T + 4).at(slots))
    np.testing.assert_allclose(found.hidden, expected, atol=1e-5)
    assert found.cache is not None and found.cache.slots is None
    assert not found.cache.keys[0][:, :4].any() and found.cache.keys[0][:, 4:].any()


def test_a_cache_is_told_where_to_write(model: Model):
    cache = model.empty_cache(1, 4)
    k = jnp.ones((1, 2, 2, 16))
    with pytest.raises(ValueError, match="name them, cache.at"):
        cache.update(0, k, k)
    keys, values = cache.at(jnp.array([[1, 3]])).update(1, k, 2 * k).view(1)
    np.testing.assert_array_equal(keys[0, :, 0, 0], [0, 1, 0, 1])
    np.testing.assert_array_equal(values[0, :, 0, 0], [0, 2, 0, 2])
    assert not cache.view(1)[0].any()


# ---------------------------------------------------------------- probes


@pytest.mark.parametrize("remat", ["none", "layers"])
def test_probes_are_products_by_name(model: Model, remat: Any):
    mask, x = Mask(jnp.full(2, T)), model.embed(ids(2, T))
    asked = ("layers.*.attention.out", "layers.0.mlp.gate_up")

    @jax.jit
    def run(model: Model):
        return model(x, columns(2, T), mask, probes=asked, remat=remat)

    found = run(model)
    shapes = {name: value.shape for name, value in found.probes.items()}
    assert shapes == {
        "layers.0.attention.out": (2, T, SMALL.embed),
        "layers.1.attention.out": (2, T, SMALL.embed),
        "layers.0.mlp.gate_up": (2, T, 2, SMALL.mlp),
    }
    layer = model.net.layers[0]
    mixed, _ = layer.attention(
        jnp.asarray(x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + SMALL.norm_eps)),
        columns(2, T),
        mask.resolve(columns(2, T)),
    )
    assert isinstance(mixed, jax.Array)
    np.testing.assert_allclose(found.probes["layers.0.attention.out"], mixed, atol=1e-5)
    plain = model(x, columns(2, T), mask)
    assert plain.probes == {}
    np.testing.assert_allclose(found.hidden, plain.hidden, atol=1e-5)


def test_probes_that_match_nothing_are_refused(model: Model):
    with pytest.raises(ValueError, match="no product matches layers.9.*; try layers"):
        model(model.embed(ids(1, 2)), columns(1, 2), Mask(jnp.array([2])), probes=["layers.9.*"])


def test_only_weights_are_multiplied():
    with pytest.raises(TypeError, match="str is no weight"):
        product("BD,DE->BE", jnp.ones((1, 2)), "weight")


# ---------------------------------------------------------------- kernels


def test_a_kernel_is_forced_in_every_layer(model: Model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choose, "_made", {})
    forced = dataclasses.replace(model, kernel="ragged")
    seen = jnp.ones((1, T), bool)
    found, plain = (forward(m, ids(1, T), seen) for m in (forced, model))
    np.testing.assert_allclose(found, plain, atol=1e-4)
    chosen = {(row["operation"], row["chosen"]) for row in choose.choices()}
    others = {(name, "reference") for name in ("norm", "mlp", "routing")}
    experts = {("experts", "ragged"), ("experts", "reference")}
    assert chosen == {("attention", "reference"), *experts, *others}
    with pytest.raises(ValueError, match="kernel=attention:cudnn does not serve.*it needs a GPU"):
        forward(dataclasses.replace(model, kernel="attention:cudnn"), ids(1, T), seen)


def test_an_unknown_kernel_is_refused_before_loading():
    with pytest.raises(ValueError, match="kernel=fast must be auto"):
        LLM.load("/nowhere", kernel="fast")
