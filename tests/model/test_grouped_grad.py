"""The grouped experts, value and gradient, in jnp: what Triton gets and must give back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.kernels import choose, triton_call
from jdllm.kernels.experts import dense, grouped, grouped_grad
from jdllm.kernels.experts.grouped_grad import PLAIN, backward, forward, sort, work
from tests.support.marks import quick

# T tokens, D, M, E experts, P picks.
SHAPES = [(1, 2, 3, 2, 1), (5, 4, 3, 3, 2), (4, 3, 2, 1, 3)]


def draw(shape: tuple[int, ...], seed: int) -> Any:
    """Tokens, weights, picks of which some belong to other devices, and factors."""
    T, D, M, E, P = shape
    rng = np.random.default_rng(seed)
    x, gate_up, down = (rng.normal(size=s) for s in ((T, D), (E, D, 2, M), (E, M, D)))
    picks = np.stack([rng.permutation(E + 2)[:P] - 1 for _ in range(T)])
    floats = (jnp.array(a, jnp.float32) for a in (x, gate_up, down))
    return *floats, jnp.array(picks, jnp.int32), jnp.array(rng.random((T, P)), jnp.float32)


@pytest.mark.parametrize("shape", quick(range(3), 1))
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_value_and_all_gradients_equal_the_dense_ones(shape: int, seed: int):
    x, gate_up, down, picks, weights = arrays = draw(SHAPES[shape], seed)
    change = jnp.array(np.random.default_rng(seed + 1).normal(size=x.shape), jnp.float32)

    def plain(x: jax.Array, gate_up: jax.Array, down: jax.Array, weights: jax.Array) -> jax.Array:
        return dense.experts(x, gate_up, down, picks, weights)

    expected, pull = jax.vjp(plain, x, gate_up, down, weights)
    found, kept = forward(PLAIN, *arrays)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    found: Any = backward(PLAIN, arrays, kept, change)
    *slopes, of_picks, of_weights = found
    assert of_picks is None
    for one, two in zip([*slopes, of_weights], pull(change), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_rows_that_no_kernel_writes_count_nowhere():
    """Triton leaves them as the memory was: with nan there, nothing changes."""
    arrays = draw((6, 4, 3, 2, 3), 5)
    pairs = sort(arrays[3], 2)
    assert not pairs.here_N.all()

    def spoilt(*words, scatter: bool = False, **options):
        found = PLAIN.times(*words, **options)
        found = jnp.where(pairs.here_N[:, None], found, jnp.nan)
        return jnp.full_like(found, jnp.nan).at[pairs.order_N].set(found) if scatter else found

    def careful(left: jax.Array, right: jax.Array, own, tokens: str):
        left, right = (
            x if side == tokens else jnp.where(pairs.here_N[:, None], x, 0)
            for side, x in (("left", left), ("right", right))
        )
        return PLAIN.outer(left, right, own, tokens)

    change = jnp.ones_like(arrays[0])
    results = []
    for products in (PLAIN, grouped_grad.Products(spoilt, careful)):
        found, kept = forward(products, *arrays)
        results.append([found, *backward(products, arrays, kept, change)])
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 4])
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_tiles_cover_every_pair_of_an_expert_once(shape: tuple[int, ...], rows: int, seed: int):
    picks, E = np.asarray(draw(shape, seed)[3]), shape[3]
    pairs = sort(jnp.array(picks), E)
    plan, seen = work(pairs, rows), []
    for e, first in zip(plan.expert.tolist(), plan.first.tolist(), strict=True):
        last = min(first + rows, int(pairs.starts[e + 1]))
        seen += [(e, int(pairs.order_N[row])) for row in range(first, last)]
    flat = picks.reshape(-1).tolist()
    wanted = sorted((e, pair) for pair, e in enumerate(flat) if 0 <= e < E)
    assert seen == wanted
    tokens = [int(pairs.order_N[row]) // shape[4] for row in range(len(flat))]
    assert pairs.token_N.tolist() == tokens


@pytest.mark.parametrize("number", grouped.SLOPES)
def test_the_canary_sees_a_wrong_gradient_of_each_argument(number, monkeypatch):
    """Right values and other gradients, but for one that is a tenth off."""
    monkeypatch.setattr(triton_call, "_errors", {})
    arrays = draw((4, 3, 2, 3, 2), 1)

    def other(*arrays: jax.Array) -> jax.Array:
        parts = list(arrays)
        parts[number] = jax.lax.stop_gradient(parts[number]) * 0.1 + parts[number] * 0.9
        return dense.experts(*parts)

    for wrong in grouped.SLOPES:
        pair = grouped.slope(other, wrong), grouped.slope(dense.experts, wrong)
        if wrong != number:
            triton_call.canary(f"{number} {wrong}", *pair, *arrays)
            continue
        with pytest.raises(NotImplementedError, match="off by 0.1"):
            triton_call.canary(f"{number} {wrong}", *pair, *arrays)


@pytest.mark.parametrize("widths", [(128, 256), (128, 100)])
def test_training_takes_the_grouped_experts_where_they_serve(widths, monkeypatch):
    assert choose.in_training("auto", "bfloat16", widths) == "auto"  # this machine has no GPU
    monkeypatch.setattr(grouped, "check_training", lambda: None)
    serves = widths == (128, 256)
    expected = "experts:grouped" if serves else "auto"
    assert choose.in_training("auto", "bfloat16", widths) == expected
    assert choose.in_training("auto", "float32", widths) == "auto"
    assert choose.in_training("reference", "bfloat16", widths) == "reference"
