"""LoRA's factors beside weights: names, first values, products, dropout, probes, meshes; int8."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.model import linear, lora, quantise
from jdllm.model.config import NAMED, MoEConfig
from jdllm.model.linear import Module
from jdllm.model.lora import Adapter, Factors, LoraConfig
from jdllm.model.mask import Mask
from jdllm.model.model import Model, forward, named
from jdllm.model.weights import PRODUCTS, dense, product
from jdllm.runtime import sharding
from jdllm.store import checkpoint
from jdllm.store.fingerprint import fingerprint

TINY = dataclasses.replace(NAMED["tiny"], embed=32, mlp=48, vocab=64, head_dim=8, mask_id=63,
                           eos_id=62, pad_id=62, stop_ids=(62,))  # fmt: skip
MOE = MoEConfig(experts=4, top_k=2, expert_mlp=16, shared_mlp=16, dense_layers=(0,))
CONFIGS = {
    "multi-head": dataclasses.replace(TINY, kv_heads=4),
    "grouped": TINY,
    "experts": dataclasses.replace(TINY, moe=MOE),
}
ONE_BY_DEFAULT = [
    pytest.param(name, marks=[] if name == "experts" else pytest.mark.slow) for name in CONFIGS
]
EVERYTHING = "all,shared,experts,router"
KEY = jax.random.key(3)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 12)), jnp.int32)
VISIBLE = jnp.ones(TOKENS.shape, bool)
run = jax.jit(forward)


def mesh(text: str = "1x1") -> jax.sharding.Mesh:
    return sharding.parse_mesh(text)


def modules_of(model: Model) -> dict[str, Module]:
    return linear.modules(named(model))


def with_factors(model: Model, targets: str, rank: int = 3, scale: float = 2.0) -> Model:
    """With random factors, B too, of about the weights' size, in place."""
    own = modules_of(model)
    names = lora.find(own, targets)
    found = lora.initial(own, names, rank, scale, KEY, model.mesh)
    factors = {
        name: dataclasses.replace(f, b=jax.random.normal(jax.random.key(i), f.b.shape) / rank)
        for i, (name, f) in enumerate(found.items())
    }
    return dataclasses.replace(model, adapter=Adapter(factors))


def merged(model: Model) -> Model:
    """The same function without an adapter."""
    assert model.adapter
    params = jax.tree.map(
        lambda leaf: leaf.replace(dense(leaf)),
        lora.joined(model.params, model.adapter),
        is_leaf=lambda leaf: hasattr(leaf, "get_metadata"),
    )
    return dataclasses.replace(model, params=params, adapter=None)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: checkpoint.random_model(c, mesh(), seed=1) for name, c in CONFIGS.items()}


# Names


def test_targets_are_groups_and_patterns(models):
    names = list(modules_of(models["experts"]))
    assert names[:5] == [f"layers.0.attention.{part}" for part in ("q", "k", "v", "out")] + [
        "layers.0.mlp.gate"
    ]
    assert lora.find(names, "v,q") == [f"layers.{i}.attention.{x}" for i in (0, 1) for x in "qv"]
    assert lora.find(names, "layers.1.attention.*") == names[7:11]
    assert lora.find(names, "down") == ["layers.0.mlp.down"]
    assert len(lora.find(names, "all")) == 8 + 3
    assert lora.find(names, "experts,router") == [
        f"layers.1.experts.{part}" for part in ("router", "gate", "up", "down")
    ]
    assert set(lora.find(names, EVERYTHING)) == set(names)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("q,querry", "'querry' matches no module"),
        ("atention", "attention"),
        ("layers.9.attention.q", "matches no module"),
        ("", "matches no module"),
    ],
)
def test_targets_that_match_nothing_are_refused(models, targets, words):
    with pytest.raises(ValueError, match=words):
        lora.find(modules_of(models["grouped"]), targets)


def test_a_rank_above_the_width_is_refused(models):
    own = modules_of(models["grouped"])
    with pytest.raises(ValueError, match=r"lora.rank=17 exceeds the width of layers.0.attention.k"):
        lora.initial(own, lora.find(own, "attention"), 17, 1.0, KEY, mesh())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="lora.rank=-1 must be"):
        LoraConfig(rank=-1)
    with pytest.raises(ValueError, match="lora.alpha=0.0 must be"):
        LoraConfig(rank=1, alpha=0.0)
    with pytest.raises(ValueError, match="lora.dropout=1.0 must be"):
        LoraConfig(rank=1, dropout=1.0)
    with pytest.raises(ValueError, match="lora.targets does nothing without lora.rank"):
        LoraConfig(targets="all")
    assert LoraConfig(rank=4).scale == 2
    assert LoraConfig(rank=4, alpha=8, rslora=True).scale == 4
    with pytest.raises(ValueError, match="does not reach layers.1.experts.up"):
        lora.refuse_dropout(["layers.0.mlp.up", "layers.1.experts.up"], 0.1)
    lora.refuse_dropout(["layers.0.mlp.up"], 0.1)


# Values


def test_first_factors_are_those_of_peft(models):
    """A is uniform in +-1/sqrt(inputs), B zero: nothing changes, bit for bit."""
    model = models["multi-head"]
    own = modules_of(model)
    few = lora.initial(own, ["layers.1.attention.out"], 16, 2.0, KEY, mesh())
    many = lora.initial(own, lora.find(own, "all"), 16, 2.0, KEY, mesh())
    name = "layers.1.attention.out"
    np.testing.assert_array_equal(few[name].a, many[name].a)
    assert few[name].a.shape == (4, 8, 16) and few[name].b.shape == (16, 32)
    assert many["layers.0.mlp.up"].b.shape == (16, 48)
    bound = 1 / np.sqrt(32)
    assert 0.9 * bound < np.abs(few[name].a).max() <= bound
    assert np.std(few[name].a) == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert not np.array_equal(many["layers.0.attention.q"].a, many["layers.0.attention.k"].a)
    adapted = dataclasses.replace(model, adapter=Adapter(many))
    wanted = run(model, TOKENS, VISIBLE)
    np.testing.assert_array_equal(run(adapted, TOKENS, VISIBLE), wanted)
    assert fingerprint(adapted) != fingerprint(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_factors_beside_weights_equal_merged_ones(models, name):
    targets = EVERYTHING if name == "experts" else "v,out,gate,down"
    adapted = with_factors(models[name], targets)
    got, wanted = run(adapted, TOKENS, VISIBLE), run(merged(adapted), TOKENS, VISIBLE)
    np.testing.assert_allclose(got, wanted, atol=2e-4)
    assert np.abs(wanted - run(models[name], TOKENS, VISIBLE)).max() > 0.1


def squares(factors: dict[str, Factors], model: Model, whole: bool) -> jax.Array:
    model = dataclasses.replace(model, adapter=Adapter(factors))
    logits = forward(merged(model) if whole else model, TOKENS, VISIBLE)
    return jnp.mean(logits**2)


def test_gradients_reach_the_factors_and_nothing_else(models):
    adapted = with_factors(models["experts"], EVERYTHING)
    assert adapted.adapter
    gradient = jax.jit(jax.grad(squares), static_argnums=2)
    ours, wanted = (gradient(adapted.adapter.factors, adapted, whole) for whole in (False, True))
    for name in wanted:
        for a, b in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(wanted[name]), strict=True):
            assert np.abs(b).max() > 0
            np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max(), err_msg=name)


# Dropout and probes


@jax.jit
def hidden_of(model: Model, tokens_BT: jax.Array) -> jax.Array:
    columns_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    mask = Mask.of(model.config, jnp.ones(tokens_BT.shape, bool))
    return model(model.embed(tokens_BT), columns_BT, mask).hidden


def dropping(model: Model, keys: jax.Array | None, rate: float = 0.5) -> Model:
    assert model.adapter
    return dataclasses.replace(
        model, adapter=dataclasses.replace(model.adapter, dropout=rate, keys=keys)
    )


def test_dropout_belongs_to_the_row_and_the_step(models):
    adapted = with_factors(models["grouped"], "q,v")
    keys = jax.random.split(jax.random.key(0), 2)
    dropped = hidden_of(dropping(adapted, keys), TOKENS)
    plain = hidden_of(adapted, TOKENS)
    assert np.abs(dropped - plain).max() > 1e-2
    np.testing.assert_array_equal(hidden_of(dropping(adapted, None), TOKENS), plain)
    swapped = hidden_of(dropping(adapted, keys[::-1]), TOKENS[::-1])[::-1]
    np.testing.assert_allclose(swapped, dropped, atol=1e-6)
    other = hidden_of(dropping(adapted, jax.random.split(jax.random.key(1), 2)), TOKENS)
    assert np.abs(other - dropped).max() > 1e-2


def test_dropout_keeps_the_mean():
    x, keys = jnp.ones((4, 1000)), jax.random.split(KEY, 4)
    first, second = (lora.drop(x, keys, 0.2, name) for name in ("q", "k"))
    assert set(np.unique(first)) == {0, np.float32(1.25)}
    assert np.mean(first) == pytest.approx(1, abs=0.05)
    assert np.mean(first == second) < 0.8
    assert not np.array_equal(first[0], first[1])


def test_what_is_scattered_looks_random():
    """Every bit is even, neighbours, keys and modules do not agree: within 5 standard errors."""
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = np.stack([np.asarray(lora.scattered(key, (64, 512))) for key in keys])
    size = drawn[0].size
    for bit in range(32):
        even = (drawn >> bit) & 1
        assert abs(even.mean() - 0.5) < 5 * 0.5 / (3 * size) ** 0.5
    low = (drawn < 0.25 * 2**32).astype(float).reshape(3, -1)
    assert (abs(low.mean(1) - 0.25) < 5 * (0.25 * 0.75 / size) ** 0.5).all()
    for step in (1, 2, 512):
        pairs = (low[:, step:] * low[:, :-step]).mean()
        assert abs(pairs - 0.0625) < 5 * (0.0625 / size) ** 0.5
    assert (abs(np.corrcoef(low)[~np.eye(3, dtype=bool)]) < 5 / size**0.5).all()


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("missing", [(), (1,)])
def test_modules_of_a_weight_are_computed_each_for_itself(dropped, missing):
    """All at once where each has factors, one by one otherwise: the same numbers and slopes."""
    rng = np.random.default_rng(0)
    names = tuple(f"layers.0.attention.{part}" for part in "qkv")
    shapes = (6, 2), (2, 3, 4)

    def normal(shape: tuple[int, ...]) -> jax.Array:
        return jnp.array(rng.normal(size=shape), jnp.float32)

    parts = {
        name: Factors(normal(shapes[0]), normal(shapes[1]), 1.5)
        for k, name in enumerate(names)
        if k not in missing
    }
    base, x = (jnp.array(rng.normal(size=s), jnp.float32) for s in ((6, 3, 3, 4), (2, 5, 6)))
    keys = jax.random.split(jax.random.key(1), 2) if dropped else None
    own = linear.linear_of("layers.0.attention.qkv")
    assert own is not None

    def at_once(parts: Any, x: jax.Array) -> jax.Array:
        weight = lora.Adapted(base, parts, names, own, 0.3, keys)
        assert (weight.stacked is None) == bool(missing)
        return product("BTD,DCHK->CBTHK", x, weight)

    def each(parts: Any, x: jax.Array) -> jax.Array:
        found = []
        for k, name in enumerate(names):
            y = jnp.einsum("BTD,DHK->BTHK", x, base[:, k])
            if name in parts:
                z = x if keys is None else lora.drop(x, keys, 0.3, name)
                y += 1.5 * jnp.einsum("BTD,DR,RHK->BTHK", z, parts[name].a, parts[name].b)
            found.append(y)
        return jnp.stack(found)

    change = jnp.array(rng.normal(size=(3, 2, 5, 3, 4)), jnp.float32)
    results = []
    for run in (at_once, each):
        value, pull = jax.vjp(run, parts, x)
        results.append((value, *jax.tree.leaves(pull(change))))
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_probes_show_what_passes_through_the_factors(models):
    adapted = with_factors(models["grouped"], "k,down", scale=2.0)
    columns = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    mask = Mask.of(adapted.config, VISIBLE)

    @jax.jit
    def probe(model: Model) -> dict[str, jax.Array]:
        patterns = ["layers.*.lora_?", "layers.1.attention.kv", "layers.1.attention.q"]
        return model(model.embed(TOKENS), columns, mask, probes=patterns).probes

    found = probe(adapted)
    assert adapted.adapter
    assert set(found) == {"layers.1.attention.kv", "layers.1.attention.q"} | {
        f"{name}.lora_{side}" for name in adapted.adapter.factors for side in "AB"
    }
    narrow, wide = (found[f"layers.1.attention.k.lora_{side}"] for side in "AB")
    assert narrow.shape == (2, 12, 3) and wide.shape == (2, 12, 2, 8)
    b = adapted.adapter.factors["layers.1.attention.k"].b
    np.testing.assert_allclose(wide, jnp.einsum("BTR,RGK->BTGK", narrow, b), atol=1e-5)


# Meshes


@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_the_same_logits_on_a_mesh(models, name):
    adapted = with_factors(models[name], EVERYTHING if name == "experts" else "all")
    wanted = run(adapted, TOKENS, VISIBLE)
    split = checkpoint.random_model(CONFIGS[name], mesh("2x2"), seed=1)
    own = modules_of(split)
    assert adapted.adapter
    ranks = {n: f.rank for n, f in adapted.adapter.factors.items()}
    places = lora.placements(own, ranks, split.mesh)
    factors = {
        n: Factors(
            jax.device_put(f.a, places[n]["a"]), jax.device_put(f.b, places[n]["b"]), f.scale
        )
        for n, f in adapted.adapter.factors.items()
    }
    shards = {s: getattr(factors["layers.0.attention.out"], s) for s in "ab"}
    assert shards["a"].addressable_shards[0].data.shape == (2, 8, 3)  # half of the heads
    assert shards["b"].addressable_shards[0].data.shape == (3, 32)
    got = run(dataclasses.replace(split, adapter=Adapter(factors)), TOKENS, VISIBLE)
    np.testing.assert_allclose(got, wanted, atol=2e-4)


def test_a_mesh_that_does_not_divide_is_refused(models):
    own = modules_of(models["grouped"])
    with pytest.raises(ValueError, match=r"layers.0.attention.q.b: its axis 'heads' of size 4"):
        lora.initial(own, ["layers.0.attention.q"], 2, 1.0, KEY, mesh("1x8"))


# int8


def test_int8_values_are_the_nearest(models):
    weight = named(models["multi-head"])["layers.0.attention.qkv"][...]
    found = quantise.quantise(weight, (0,))
    assert found.values.dtype == jnp.int8 and found.scale.shape == (3, 4, 8)
    assert found.shape == weight.shape == (32, 3, 4, 8)
    step = np.asarray(found.scale)
    assert (np.abs(found.dense() - weight) <= step / 2 + 1e-7).all()
    assert (np.abs(found.values).max(-1) == 127).all()
    zero = quantise.quantise(jnp.zeros((3, 2)), (0,))
    np.testing.assert_array_equal(zero.dense(), np.zeros((3, 2)))
    x = jax.random.normal(KEY, (2, 5, 32))
    got = product("BTD,DCHK->CBTHK", x, found)
    np.testing.assert_allclose(got, product("BTD,DCHK->CBTHK", x, found.dense()), atol=1e-5)


@pytest.mark.parametrize("name", ONE_BY_DEFAULT)
def test_an_int8_base_computes_what_its_weights_say(models, name):
    small = dataclasses.replace(models[name], params=quantise.quantise_params(models[name].params))
    kinds = {type(leaf.get_value()).__name__ for leaf in named(small).values()}
    assert "Quantised" in kinds
    adapted = with_factors(small, EVERYTHING if name == "experts" else "all")
    got, wanted = run(adapted, TOKENS, VISIBLE), run(merged(adapted), TOKENS, VISIBLE)
    np.testing.assert_allclose(got, wanted, atol=5e-4)
    change = np.abs(run(small, TOKENS, VISIBLE) - run(models[name], TOKENS, VISIBLE))
    assert 0 < change.mean() < 0.1


def test_what_is_no_weight_is_refused():
    with pytest.raises(TypeError, match="str is no weight"):
        product("BD,DF->BF", jnp.ones((1, 2)), "text")
    assert all(callable(times) for times in PRODUCTS.values())


def test_gradients_pass_through_int8(models):
    """That of x is what the dense weight gives; a backward pass keeps int8, and not x."""
    found = quantise.quantise(named(models["multi-head"])["layers.0.attention.out"][...], (0, 1))
    x = jax.random.normal(KEY, (2, 5, 4, 8))

    def loss(x: jax.Array, weight: Any) -> jax.Array:
        return jnp.sum(jnp.sin(product("BTHK,HKD->BTD", x, weight)))

    ours, wanted = jax.grad(loss)(x, found), jax.grad(loss)(x, found.dense())
    np.testing.assert_allclose(ours, wanted, atol=1e-5)
    _, back = jax.vjp(lambda x: product("BTHK,HKD->BTD", x, found), x)
    kept = {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(back)}
    assert ((32, 4, 8), "int8") in kept and x.shape not in {shape for shape, _ in kept}
    assert ((32, 4, 8), "float32") not in kept and ((4, 8, 32), "float32") not in kept
