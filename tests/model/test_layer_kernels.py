"""The Triton kernels of a layer and of the head, interpreted, against their references."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.kernels import choose, triton_call
from jdllm.kernels.closing import reference as closing
from jdllm.kernels.closing import split as closing_split
from jdllm.kernels.head import reference as head
from jdllm.kernels.mlp import fused as mlp_fused
from jdllm.kernels.mlp import reference as mlp
from jdllm.kernels.norm import fused as norm_fused
from jdllm.kernels.norm import reference as norm
from jdllm.kernels.opening import reference as opening
from jdllm.kernels.opening.reference import Projection
from jdllm.kernels.quantised import KINDS, quantise
from jdllm.kernels.rotary import reference as rotary
from jdllm.kernels.rotary.reference import Facts, Target
from jdllm.model.config import NAMED, ModelConfig
from jdllm.model.mask import Mask
from jdllm.model.model import Model
from jdllm.model.quantise import quantise_params
from jdllm.runtime import sharding
from jdllm.store import checkpoint
from tests.support.interpreted import interpreted

__all__ = ["interpreted"]
OURS = {
    "norm": "fused", "opening": "split", "rotary": "fused", "mlp": "fused", "closing": "split",
    "head": "fused",
}  # fmt: skip


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    found = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(found, jnp.bfloat16)


def ours(operation: str, *given: Any, **facts: Any) -> Any:
    return choose.run(operation, f"{operation}:{OURS[operation]}", *given, **facts)


def assert_close(found: Any, expected: Any, rounding: float = 0.01) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("operation", OURS)
def test_canaries_hold_and_a_cpu_alone_is_refused(operation: str, request: Any):
    check = choose.CHECKS[f"{operation}:{OURS[operation]}"]
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        check()
    request.getfixturevalue("interpreted")
    check()
    for name, one in choose.CHECKS.items():
        if name.startswith(operation) and name.endswith("in 8 bits"):
            one()


@pytest.mark.parametrize("shape", [(1, 3, 384), (2, 2, 256)])
def test_sum_and_norm(shape: tuple[int, ...], interpreted: None):
    x, branch, scale = normal(0, *shape), normal(1, *shape), normal(2, shape[-1])
    total, normed = ours("norm", x, branch, scale, eps=1e-5)
    expected = norm.add_norm(x, branch, scale, 1e-5)
    np.testing.assert_array_equal(total, expected[0])
    assert_close(normed, expected[1])


@pytest.mark.parametrize("width", [None, 32])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_heads_are_normed_turned_and_written(
    width: int | None, by_row: bool, grouped: bool, interpreted: None
):
    """The memory of other columns stays, a column that is not there is dropped."""
    B, T, H, G, K = 2, 3, 4, 2 if grouped else 4, 64
    packed = (normal(0, B, T, 3, H, K),)
    if grouped:
        packed = normal(0, B, T, H, K), normal(1, B, T, 2, G, K)
    norms = (normal(2, K), normal(3, K)) if grouped else ()
    facts = Facts(1e4, width, 1e-5 if grouped else None, by_row)
    positions = jnp.array([[3, 4, 5], [90, 91, 92]], jnp.int32)
    shape, places = ((B, 8, G, K), [[2, 3, 8], [0, 1, 7]])
    if not by_row:  # pages of 4 columns: 12 in all
        shape, places = (3, 4, G, K), [[2, 3, 12], [9, 10, 4]]
    target = Target(normal(4, *shape), normal(5, *shape), jnp.array(places, jnp.int32))
    found = ours("rotary", packed, norms, positions, target, facts=facts)
    assert_close(found, rotary.turn(packed, norms, positions, target, facts))
    flat = np.asarray(found[1]).reshape(-1, G, K)
    rows = jnp.array(places) + 8 * by_row * jnp.arange(B)[:, None]
    fresh = np.unique(rows[(rows < len(flat)) & (jnp.array(places) < (8 if by_row else 12))])
    old = np.delete(np.asarray(target.keys).reshape(-1, G, K), fresh, axis=0)
    np.testing.assert_array_equal(np.delete(flat, fresh, axis=0), old)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("rows", [1, 5])
def test_inputs_become_queries_and_columns(
    rows: int, grouped: bool, biased: bool, interpreted: None
):
    """Parts are rounded as one product is; more rows than a tile has; in pages, too."""
    B, T, D, H, G, K = rows, 9, 256, 4, 2 if grouped else 4, 64
    shapes = [(D, H, K), (D, 2, G, K)] if grouped else [(D, 3, H, K)]
    maps = tuple(
        Projection(normal(i, *size, scale=D**-0.5), normal(i + 2, *size[1:]) if biased else None)
        for i, size in enumerate(shapes)
    )
    norms = (normal(5, K), normal(6, K)) if grouped else ()
    x, positions = normal(7, B, T, D), jnp.broadcast_to(jnp.arange(3, 3 + T), (B, T))
    facts = Facts(1e4, None, 1e-5 if grouped else None, by_row=not biased)
    rows_or_pages = (B, 16, G, K) if facts.by_row else (4 * B, 4, G, K)
    places = positions + (0 if facts.by_row else 16 * jnp.arange(B)[::-1, None])
    target = Target(normal(8, *rows_or_pages), normal(9, *rows_or_pages), places)
    found = ours("opening", x, maps, norms, positions, target, facts=facts)
    assert_close(found, opening.project(x, maps, norms, positions, target, facts), 0.03)
    with pytest.raises(NotImplementedError, match="140 rows are more than 128"):
        choose.PREFERRED["opening:split"](normal(0, 4, 35, D), maps)


def narrow(weight: jax.Array, kind: str) -> Any:
    return quantise(weight, (0,), kind)


@pytest.mark.parametrize(
    ("rows", "grouped", "kind"), [(1, True, "int8"), (5, False, "int8"), (5, True, "fp8")]
)
def test_inputs_become_queries_and_columns_by_weights_in_8_bits(
    rows: int, grouped: bool, kind: str, interpreted: None
):
    B, T, D, H, G, K = rows, 9, 512, 4, 2 if grouped else 4, 64
    shapes = [(D, H, K), (D, 2, G, K)] if grouped else [(D, 3, H, K)]
    biases = [normal(i + 2, *size[1:]) if grouped else None for i, size in enumerate(shapes)]
    weights = [narrow(normal(i, *size, scale=D**-0.5), kind) for i, size in enumerate(shapes)]
    maps = tuple(map(Projection, weights, biases))
    x, positions = normal(7, B, T, D), jnp.broadcast_to(jnp.arange(3, 3 + T), (B, T))
    target = Target(normal(8, B, 16, G, K), normal(9, B, 16, G, K), positions)
    given, facts = (x, maps, (), positions, target), Facts(1e4, None, None)
    assert_close(ours("opening", *given, facts=facts), opening.project(*given, facts), 0.03)
    with pytest.raises(NotImplementedError, match="in 8 bits it is not measured"):
        choose.PREFERRED["opening:split"](*given)
    if grouped:  # queries in 8 bits, keys and values in 16
        mixed = (maps[0], Projection(normal(1, *shapes[1]), biases[1]))
        with pytest.raises(ValueError, match="weights of one kind"):
            ours("opening", x, mixed, (), positions, target, facts=facts)


@pytest.mark.parametrize(("rows", "kind"), [(3, "int8"), (40, "fp8")])
def test_layers_with_weights_in_8_bits(rows: int, kind: str, interpreted: None):
    """The inner numbers and what closes a branch; the gradient of inputs is the reference's."""
    x, total, scale = normal(0, 1, rows, 512), normal(1, 1, rows, 128), normal(2, 128)
    gate_up = narrow(normal(3, 512, 2, 128, scale=512**-0.5), kind)
    down = narrow(normal(4, 512, 128, scale=512**-0.5), kind)
    assert_close(ours("mlp", x, gate_up), mlp.gated(x, gate_up), 0.02)
    given = x, down, total, scale
    assert_close(ours("closing", *given, eps=1e-5), closing.close(*given, 1e-5), 0.02)

    def slope(run: Callable[..., jax.Array]) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(jnp.square(run(x, gate_up)).astype(jnp.float32)))(x)

    def by_name(x: jax.Array, weight: Any) -> jax.Array:
        return ours("mlp", x, weight)

    assert_close(slope(by_name), slope(mlp.gated), 0.05)
    for operation, arrays in (("mlp", (x, gate_up)), ("closing", given)):
        with pytest.raises(NotImplementedError, match="in 8 bits it is not measured"):
            choose.PREFERRED[f"{operation}:{OURS[operation]}"](*arrays)


def test_odd_heads_stand_alone(interpreted: None):
    """Of 3 heads of 32 channels no tile of columns is made."""
    maps, places = (Projection(normal(0, 128, 3, 3, 32), None),), jnp.zeros((1, 2), jnp.int32)
    target = Target(normal(1, 1, 4, 3, 32), normal(2, 1, 4, 3, 32), places)
    given = normal(3, 1, 2, 128), maps, (), places, target
    with pytest.raises(ValueError, match="outputs in multiples of 64, not 288"):
        ours("opening", *given, facts=Facts(1e4, None, None))


def test_gate_and_up(interpreted: None):
    x, weight = normal(0, 1, 20, 128), normal(1, 128, 2, 128, scale=128**-0.5)
    assert_close(ours("mlp", x, weight), mlp.gated(x, weight), 0.02)


@pytest.mark.parametrize("inner", [256, 768])
def test_closing_product(inner: int, interpreted: None):
    given = normal(0, 1, 5, inner), normal(1, inner, 128, scale=inner**-0.5)
    given = *given, normal(2, 1, 5, 128), normal(3, 128)
    assert_close(ours("closing", *given, eps=1e-5), closing.close(*given, 1e-5), 0.02)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
def test_best_tokens_with_and_without_noise(tied: bool, sampled: bool, interpreted: None):
    """Whole numbers, which tie; an id that is not usable, one that is not counted."""
    B, N, D, V = 2, 3, 64, 300
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.integers(-1, 2, (B, N, D)), jnp.bfloat16)
    table = jnp.asarray(rng.integers(-1, 2, (V, D)), jnp.bfloat16)
    usable, counted = jnp.arange(V) != 7, jnp.arange(V) != 9
    given = hidden, table if tied else table.T, usable, counted
    noise = noise_of(B, N, V) if sampled else None
    found = ours("head", *given, noise, tied=tied)
    expected = head.search(*given, noise, tied=tied)
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert_close(found, expected, 1e-4)
    assert_close(head.search(*given, noise, tied=tied, chunk=128), expected, 1e-4)


def noise_of(rows: int, positions: int, vocab: int) -> head.Noise:
    data = jax.random.key_data(jax.vmap(jax.random.key)(jnp.arange(rows)))
    shape = rows, positions
    offset = jnp.broadcast_to(jnp.arange(positions, dtype=jnp.uint32) * vocab, shape)
    keys = jnp.broadcast_to(data[:, None], (*shape, 2))
    return head.Noise(keys, offset, jnp.full(shape, 0.7), jnp.full(shape, 1.3))


def test_draws_are_those_of_jax():
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    expected = jax.vmap(lambda key: jax.random.uniform(key, (3, 50)))(keys)
    noise = noise_of(2, 3, 50)
    np.testing.assert_array_equal(head.uniform(noise, jnp.arange(50)), expected)
    np.testing.assert_array_equal(head.uniform(noise, jnp.arange(9, 20)), expected[..., 9:20])


def test_sampled_tokens_follow_the_softmax():
    """Noise of scale 1 draws from the softmax of the logits divided by the heat."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    noise, all_V = noise_of(1, 20_000, 4), jnp.ones(4, bool)
    noise = noise._replace(scale=jnp.ones_like(noise.scale), heat=jnp.full_like(noise.heat, 2.0))
    rows = jnp.broadcast_to(logits, (1, 20_000, 4))
    found = head.of_logits(rows, all_V, all_V, jnp.arange(4), noise)
    shares = jnp.bincount(found.ids.ravel(), length=4) / 20_000
    np.testing.assert_allclose(shares, jax.nn.softmax(logits / 2), atol=0.015)
    own = jnp.exp(found.own - jnp.logaddexp(found.own, found.rest))
    np.testing.assert_allclose(own, jax.nn.softmax(logits / 2)[found.ids], rtol=1e-5)


GRADIENTS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "norm": (lambda *given: norm.add_norm(*given, eps=1e-5), ((1, 3, 128), (1, 3, 128), (128,))),
    "mlp": (mlp.gated, ((1, 3, 128), (128, 2, 128))),
    "closing": (
        lambda *given: closing.close(*given, eps=1e-5),
        ((1, 3, 256), (256, 128), (1, 3, 128), (128,)),
    ),
}


@pytest.mark.parametrize("operation", GRADIENTS)
def test_gradients_are_the_references(operation: str, interpreted: None):
    reference, shapes = GRADIENTS[operation]
    given = [normal(i, *shape, scale=0.3) for i, shape in enumerate(shapes)]
    facts = {} if operation == "mlp" else {"eps": 1e-5}

    def total(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: sum(
            jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(run(*given))
        )

    places = tuple(range(len(given)))
    found = jax.grad(total(lambda *x: ours(operation, *x, **facts)), places)(*given)
    assert_close(found, jax.grad(total(reference), places)(*given))


@pytest.mark.parametrize(
    ("operation", "given", "reason"),
    [
        ("norm", ((1, 2, 32768), (1, 2, 32768), (32768,)), "more than 16384"),
        ("mlp", ((1, 8, 96), (96, 2, 128)), "multiples of 128, not 96"),
        ("closing", ((1, 8, 128), (128, 128), (1, 8, 128), (128,)), "multiples of 256, not 128"),
        ("head", ((1, 2, 48), (48, 100), (100,), (100,)), "multiples of 64, not 48"),
    ],
)
def test_what_they_do_not_serve(operation: str, given: Any, reason: str, interpreted: None):
    arrays = [jnp.ones(shape, jnp.bfloat16) for shape in given]
    facts = {} if operation in ("mlp", "head") else {"eps": 1e-5}
    with pytest.raises(ValueError, match=reason):
        ours(operation, *arrays, **facts)
    with pytest.raises(ValueError, match="16-bit numbers, not float32"):
        ours(operation, *(x.astype(jnp.float32) for x in arrays), **facts)


@pytest.mark.parametrize(
    ("operation", "given", "facts"),
    [
        ("mlp", ((1, 8, 128), (128, 2, 512)), {}),
        ("closing", ((1, 8, 256), (256, 512), (1, 8, 512), (512,)), {"eps": 1e-5}),
    ],
)
def test_layers_too_narrow_to_go_round_are_left_to_xla(
    operation: str, given: Any, facts: Any, interpreted: None, monkeypatch: pytest.MonkeyPatch
):
    """Where they pay they come first; where they do not, the reference does, unless by name."""
    arrays = [jnp.ones(shape, jnp.bfloat16) for shape in given]
    module = {"mlp": mlp_fused, "closing": closing_split}[operation]
    monkeypatch.setattr(choose, "_made", {})
    name = OURS[operation]
    for fewest, kernel in ((0, "auto"), (4096, "auto"), (4096, f"{operation}:{name}")):
        monkeypatch.setattr(module, "FEWEST", fewest)
        choose.run(operation, kernel, *arrays, **facts)
    found = [made for made in choose._made if made.operation == operation]
    first, second = found  # the third is the first once more
    assert first.chosen == name and not first.refused
    (refused, reason), *_ = second.refused
    assert (second.chosen, refused) == ("reference", name)
    assert "8 tiles of columns" in reason or "512 columns are fewer" in reason


@pytest.mark.parametrize("operation", ["norm", "mlp", "closing"])
def test_many_rows_are_left_to_xla_unless_by_name(operation: str, interpreted: None):
    """They are served by name, and rightly: more rows than a tile has, and some left over."""
    x, total, scale = normal(0, 5, 15, 256), normal(1, 5, 15, 128), normal(2, 128)
    given: dict[str, tuple[Any, ...]] = {
        "norm": (total, normal(3, 5, 15, 128), scale),
        "mlp": (x, normal(4, 256, 2, 128, scale=256**-0.5)),
        "closing": (x, normal(5, 256, 128, scale=256**-0.5), total, scale),
    }
    with pytest.raises(NotImplementedError, match="75 rows are more than (32|64)"):
        choose.PREFERRED[f"{operation}:{OURS[operation]}"](*given[operation])
    facts = {} if operation == "mlp" else {"eps": 1e-5}
    found = ours(operation, *given[operation], **facts)
    expected = choose.TABLES[operation]["reference"](*given[operation], **facts)
    assert_close(found, expected, 0.02)


@pytest.fixture(scope="module")
def small() -> Model:
    config: ModelConfig = dataclasses.replace(
        NAMED["tiny"], embed=128, mlp=256, heads=4, kv_heads=4, head_dim=64, dtype="bfloat16"
    )
    return checkpoint.random_model(config, sharding.parse_mesh("1x1"), 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "weights"),
    [*((name, "bf16") for name in OURS), *itertools.product(("opening", "mlp", "closing"), KINDS)],
)
def test_a_model_over_its_cache(operation: str, weights: str, small: Model, interpreted: None):
    """One call of the whole model by each kernel: hidden states, keys and best tokens."""
    if weights in KINDS:
        small = dataclasses.replace(small, params=quantise_params(small.params, weights))
    tokens = jnp.arange(12).reshape(2, 6)
    columns = jnp.broadcast_to(jnp.arange(6, 12), (2, 6))
    slots = columns.at[1, 5].set(16)  # beyond the cache: dropped

    def call(kernel: str) -> Any:
        model = dataclasses.replace(small, kernel=kernel)
        cache = jax.tree.map(jnp.ones_like, model.empty_cache(2, 16)).at(slots)
        mask = Mask.of(model.config, jnp.array([12, 16]))
        out = model(model.embed(tokens), columns, mask, cache)
        assert out.cache is not None
        return out.hidden, out.cache.keys, out.cache.values, model.best(out.hidden).rest

    forced = f"{operation}:{OURS[operation]}"
    found, expected = (jax.jit(call, static_argnums=0)(name) for name in (forced, "reference"))
    assert_close(found, expected, 0.05)


def test_equal_calls_of_a_kernel_are_lowered_once(interpreted: None):
    x, scale = normal(0, 1, 3, 384), normal(1, 384)

    def twice(x: jax.Array) -> jax.Array:
        for _ in range(2):
            x, _ = norm_fused.add_norm(x, x, scale, 1e-5)
        return x

    text = jax.jit(twice).lower(x).as_text()
    assert text.count("stablehlo.custom_call @xla_") == 1
    assert_close(jax.jit(twice)(x), 4 * x, 0.02)


def test_a_canary_is_one_program(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setattr(triton_call, "_errors", {})
    x = triton_call.normal(0, (4, 128))
    jax.config.update("jax_log_compiles", True)  # of all threads: a canary has its own
    try:
        triton_call.canary("same", lambda x: x @ x.T, lambda x: x @ x.T, x)
    finally:
        jax.config.update("jax_log_compiles", False)
    found = [one for one in caplog.messages if one.startswith("Finished XLA compilation")]
    assert len(found) == 1
