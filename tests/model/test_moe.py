"""Mixture of experts: routing against a plain float64 twin, and the expert kernels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jdllm import DecodeConfig
from jdllm.kernels.choose import TABLES, experts
from jdllm.kernels.routing import reference as routing
from jdllm.llm import LLM
from jdllm.model.config import NAMED, ModelConfig, MoEConfig, count_parameters
from jdllm.model.mask import Mask
from jdllm.model.model import assemble, forward, named
from jdllm.model.moe import rule
from jdllm.runtime import sharding
from jdllm.store.checkpoint import placements, random_model, restore_model, save_model

SPARSE = dataclasses.replace(
    NAMED["tiny"],
    layers=3,
    qk_norm=True,
    rotary_dim=8,
    moe=MoEConfig(
        experts=8, top_k=2, expert_mlp=16, shared_mlp=24, dense_layers=(1,), expert_bias="score"
    ),
)


def routes(moe: MoEConfig, logits: np.ndarray, bias: np.ndarray | None) -> tuple[Any, Any]:
    """One token in float64: picks by sorting, weights by the book."""
    z = logits.astype(float)
    if moe.score == "softmax":
        score = np.exp(z - z.max())
        score /= score.sum()
    else:
        score = 1 / (1 + np.exp(-z))
    ranked = score.copy() if bias is None else score + bias
    if moe.expert_bias == "score":
        score = ranked.copy()
    size = moe.experts // moe.groups
    members = [range(g * size, (g + 1) * size) for g in range(moe.groups)]
    quality = [sum(sorted((ranked[e] for e in group), reverse=True)[:2]) for group in members]
    best = sorted(range(moe.groups), key=lambda g: (-quality[g], g))[: moe.top_groups]
    open_ = [e for g in best for e in members[g]]
    picks = sorted(open_, key=lambda e: (-ranked[e], e))[: moe.top_k]
    weights = score[picks]
    if moe.renormalise and moe.top_k > 1:
        weights = weights / (weights.sum() + 1e-20)
    return picks, weights * moe.scale


@st.composite
def moe_configs(draw: st.DrawFn) -> MoEConfig:
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    top_groups = draw(st.integers(1, groups))
    return MoEConfig(
        experts=groups * size,
        top_k=draw(st.integers(1, top_groups * size)),
        expert_mlp=8,
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalise=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        groups=groups,
        top_groups=top_groups,
        expert_bias=draw(st.sampled_from(["none", "selection", "score"])),
    )


@settings(max_examples=60, deadline=None)
@given(moe_configs(), st.integers(0, 2**32 - 1))
def test_routing_equals_the_twin(moe: MoEConfig, seed: int):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 3, moe.experts)).astype(np.float32)
    bias = None if moe.expert_bias == "none" else rng.normal(size=moe.experts).astype(np.float32)
    given = jnp.array(logits), None if bias is None else jnp.array(bias), rule(moe)
    found, factors = routing.pick(*given)
    assert found.dtype == jnp.int32 and factors.dtype == jnp.float32
    for at in np.ndindex(2, 3):
        picks, weights = routes(moe, logits[at], bias)
        assert found[at].tolist() == picks
        np.testing.assert_allclose(factors[at], weights, rtol=1e-4, atol=1e-6)


def test_equal_scores_go_to_the_lower_expert():
    moe = MoEConfig(experts=8, top_k=3, expert_mlp=8, groups=4, top_groups=2, score="sigmoid")
    assert routing.pick(jnp.zeros((1, 8)), None, rule(moe))[0].tolist() == [[0, 1, 2]]


def test_the_router_computes_in_float32():
    """In bfloat16 the two products would be rounded to one value."""
    x = jnp.array([[1.0, 0.0078125]], jnp.bfloat16)
    router = jnp.array([[256.0, 256.0], [0.0, 1.0]], jnp.float32)
    logits = routing.logits(x, router)
    assert logits.dtype == jnp.float32 and logits[0, 1] > logits[0, 0]


ANYWHERE = [name for name in TABLES["experts"] if name != "grouped"]  # which needs a GPU


def expert_inputs(shape: tuple[int, ...], seed: int) -> tuple[Any, ...]:
    T, D, E, M, P = shape
    rng = np.random.default_rng(seed)
    x, gate_up, down = (rng.normal(size=s) for s in ((T, D), (E, D, 2, M), (E, M, D)))
    picks = np.stack([rng.permutation(E)[:P] for _ in range(T)]).astype(np.int32)
    arrays = (x, gate_up, down, picks, rng.random((T, P)))
    return tuple(jnp.array(a, a.dtype if a is picks else jnp.float32) for a in arrays)


def by_hand(x: Any, gate_up: Any, down: Any, picks: Any, weights: Any) -> np.ndarray:
    """One token and one expert at a time, in float64."""
    out = np.zeros(x.shape)
    for t, token in enumerate(np.asarray(x, float)):
        for e, w in zip(picks[t], weights[t], strict=True):
            gate, up = token @ np.asarray(gate_up[e, :, 0]), token @ np.asarray(gate_up[e, :, 1])
            out[t] += w * (gate / (1 + np.exp(-gate)) * up) @ np.asarray(down[e])
    return out


@pytest.mark.parametrize("name", ANYWHERE)
@settings(max_examples=8, deadline=None)
@given(
    st.tuples(*[st.integers(1, 6)] * 4).flatmap(
        lambda s: st.tuples(*map(st.just, s), st.integers(1, s[2]))
    ),
    st.integers(0, 2**32 - 1),
)
def test_experts_equal_the_definition(name: str, shape: tuple[int, ...], seed: int):
    inputs = expert_inputs(shape, seed)
    found = experts(*inputs, kernel=f"experts:{name}")
    np.testing.assert_allclose(found, by_hand(*inputs), rtol=1e-3, atol=1e-3)


def test_what_needs_a_gpu_says_so_and_the_next_one_serves():
    inputs = expert_inputs((2, 2, 2, 2, 1), 0)
    with pytest.raises(ValueError, match="grouped: it needs a GPU"):
        experts(*inputs, kernel="experts:grouped")
    np.testing.assert_array_equal(experts(*inputs), experts(*inputs, kernel="reference"))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(
        ValueError, match="kernel=fast must be auto, reference, or of .*experts:ragged"
    ):
        experts(*expert_inputs((2, 2, 2, 2, 1), 0), kernel="fast")


@pytest.mark.parametrize("name", ANYWHERE)
def test_experts_of_bfloat16_stay_bfloat16(name: str):
    x, *rest = expert_inputs((5, 4, 3, 8, 2), 0)
    assert experts(x.astype(jnp.bfloat16), *rest, kernel=f"experts:{name}").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 9},
        {"top_k": 0},
        {"groups": 3},
        {"groups": 2, "top_groups": 3},
        {"groups": 4, "top_groups": 1, "top_k": 3},
        {"experts": None},
        {"shared_mlp": -1},
    ],
)
def test_facts_that_cannot_be_are_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="experts|moe"):
        dataclasses.replace(MoEConfig(experts=8, top_k=2, expert_mlp=4), **changes)


@pytest.mark.parametrize("config", [SPARSE, NAMED["llada2-mini"], NAMED["llada-8b"]])
def test_facts_survive_json(config: ModelConfig):
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("changes", [{"rotary_dim": 7}, {"rotary_dim": 18}, {"block_causal": 0}])
def test_widths_that_cannot_be_are_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="rotary_dim|block_causal"):
        dataclasses.replace(SPARSE, **changes)


def test_parameters_are_counted_and_routers_stay_float32(tmp_path):
    config = dataclasses.replace(SPARSE, dtype="bfloat16")
    mesh = sharding.parse_mesh("1x1")
    model = random_model(config, mesh)
    leaves = named(model)
    assert sum(leaf[...].size for leaf in leaves.values()) == count_parameters(config)
    precise = {name for name, leaf in leaves.items() if leaf[...].dtype == jnp.float32}
    sparse = ("layers.0.experts", "layers.2.experts")
    assert precise == {f"{layer}.{name}" for layer in sparse for name in ("router", "bias")}
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", model)
    restored = restore_model(tmp_path / "model", mesh)
    assert restored.config == config
    for name, leaf in named(restored).items():
        assert leaf[...].dtype == leaves[name][...].dtype
        np.testing.assert_array_equal(leaf[...], leaves[name][...])


def test_llada2_mini_has_16_billion_parameters():
    assert 16.2e9 < count_parameters(NAMED["llada2-mini"]) < 16.3e9


def test_experts_lie_along_the_model_axis():
    specs = {n: s.spec for n, s in placements(SPARSE, sharding.parse_mesh("2x4")).items()}
    assert specs["layers.0.experts.gate_up"] == P("model", None, None, None)
    assert specs["layers.0.experts.down"] == P("model", None, None)
    assert specs["layers.0.experts.router"] == P(None, None)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x4"])
def test_every_mesh_decodes_the_same_tokens(mesh: str):
    model = random_model(SPARSE, sharding.parse_mesh("1x1"), seed=1)
    arrays = {name: np.array(leaf[...]) for name, leaf in named(model).items()}
    arrays["head"] *= 5
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, n).tolist() for n in (5, 17, 3)]
    decode = DecodeConfig(gen_length=16, block_length=8, threshold=0.5)
    results = []
    for text in ("1x1", mesh):
        grid = sharding.parse_mesh(text)
        targets = placements(SPARSE, grid)
        placed = {name: jax.device_put(x, targets[name]) for name, x in arrays.items()}
        results.append(LLM(assemble(SPARSE, placed, grid)).generate(prompts, decode))
    assert results[0] == results[1]


# ---------------------------------------------------------------- the block-causal mask


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(1, 12), st.booleans())
def test_a_query_sees_the_blocks_up_to_its_own(length: int, start: int, count: int, cached: bool):
    config = dataclasses.replace(NAMED["tiny"], block_causal=length)
    positions = np.arange(start, start + count)
    columns = 50 if cached else None
    keys = positions if columns is None else np.arange(columns)
    shown = np.random.default_rng(start).random(len(keys)) < 0.8
    mask = Mask.of(config, jnp.array(shown[None]))
    seen = mask.resolve(jnp.array(positions[None]), columns)
    for t, p in enumerate(positions):
        for s, k in enumerate(keys):
            assert seen[0, t, s] == (shown[s] and k < (p // length + 1) * length)


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_attention_under_a_mask_for_each_query(name: str, monkeypatch: pytest.MonkeyPatch):
    """Each query apart, with its own visible keys, gives the same."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.array(rng.normal(size=s), jnp.float32)
        for s in ((2, 3, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8))
    )
    visible = rng.random((2, 3, 6)) < 0.6
    visible[:, :, 0] = True
    whole = TABLES["attention"][name](q, k, v, jnp.array(visible))
    for t in range(3):
        alone = TABLES["attention"]["reference"](q[:, t : t + 1], k, v, jnp.array(visible[:, t]))
        np.testing.assert_allclose(whole[:, t : t + 1], alone, atol=1e-5)


@pytest.mark.slow
def test_later_blocks_do_not_reach_earlier_ones():
    config = dataclasses.replace(SPARSE, block_causal=4)
    model = random_model(config, sharding.parse_mesh("1x1"))
    tokens = np.arange(12)[None] + 1
    other = tokens.copy()
    other[0, 8:] = 77
    seen = jnp.ones((1, 12), bool)
    a, b = (forward(model, jnp.array(x), seen) for x in (tokens, other))
    np.testing.assert_array_equal(a[:, :8], b[:, :8])
    assert not np.allclose(a[:, 8:], b[:, 8:])
