"""The grouped experts' Triton kernels, interpreted, against the dense reference."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.kernels import choose
from jdllm.kernels.experts import dense
from jdllm.kernels.quantised import quantise
from tests.support.interpreted import interpreted

__all__ = ["interpreted"]


def draw(T: int, D: int = 128, M: int = 128, E: int = 4, P: int = 2) -> Any:
    """Tokens, weights, picks of which some belong to other devices, and factors."""
    rng = np.random.default_rng(T)
    x, gate_up, down = (rng.normal(size=s) for s in ((T, D), (E, D, 2, M), (E, M, D)))
    picks = np.stack([rng.permutation(E + 2)[:P] - 1 for _ in range(T)])
    floats = (jnp.array(a, jnp.bfloat16) for a in (x, gate_up * D**-0.5, down * M**-0.5))
    return *floats, jnp.array(picks, jnp.int32), jnp.array(rng.random((T, P)), jnp.float32)


def assert_near(found: Any, expected: Any) -> None:
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def wide(arrays: Any) -> Any:
    return [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays]


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_every_token_gets_its_own_experts(tokens: int, kind: str | None, interpreted: None):
    """20 tokens have more pairs of an expert than a tile has rows."""
    x, gate_up, down, picks, weights = draw(tokens)
    held: Any = gate_up, down
    if kind:
        held = quantise(gate_up, (1,), kind), quantise(down, (1,), kind)
        gate_up, down = (weight.dense() for weight in held)
    found = choose.experts(x, held[0], held[1], picks, weights, kernel="experts:grouped")
    assert found.dtype == x.dtype
    exact = wide((x, gate_up, down, picks, weights))
    assert_near(found, dense.experts(exact[0], exact[1], exact[2], exact[3], exact[4]))


def test_gradients(interpreted: None):
    arrays = x, gate_up, down, picks, weights = draw(9)

    def loss(run: Any) -> Any:
        def total(x: Any, gate_up: Any, down: Any, weights: Any) -> jax.Array:
            return jnp.sum(jnp.square(run(x, gate_up, down, picks, weights).astype(jnp.float32)))

        return jax.grad(total, (0, 1, 2, 3))

    forced = loss(partial(choose.experts, kernel="experts:grouped"))
    exact = wide(arrays)
    expected = loss(dense.experts)(*exact[:3], exact[4])
    for one, two in zip(forced(x, gate_up, down, weights), expected, strict=True):
        assert_near(one, two)
