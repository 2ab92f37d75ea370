"""Routing's Triton kernels, interpreted, against the reference; test_moe.py has that one's twin."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jdllm.kernels import choose
from jdllm.kernels.routing import reference
from jdllm.kernels.routing.reference import Rule
from tests.support.interpreted import interpreted

__all__ = ["interpreted"]
E = 32


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    """Those that the kernel serves: powers of 2 of groups."""
    groups = draw(st.sampled_from([1, 4, 8, E]))
    top_groups = draw(st.integers(1, groups))
    return Rule(
        top_k=draw(st.integers(1, min(9, E // groups * top_groups))),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        expert_bias=draw(st.sampled_from(["none", "selection", "score"])),
        groups=groups,
        top_groups=top_groups,
        renormalise=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rules(), st.sampled_from([3, 40]), st.integers(0, 2**32 - 1))
def test_picks_and_factors(interpreted: None, rule: Rule, T: int, seed: int):
    """More tokens than a tile has, too; parts of the product; a bias or none."""
    rng, D = np.random.default_rng(seed), 128
    x = jnp.asarray(rng.normal(size=(T, D)), jnp.bfloat16)
    router = jnp.asarray(rng.normal(size=(D, E)) * D**-0.5, jnp.float32)
    bias = None if rule.expert_bias == "none" else jnp.asarray(rng.normal(size=E), jnp.float32)
    picks, factors = choose.route(x, router, bias, rule, "routing:fused")
    expected = reference.route(x, router, bias, rule)
    np.testing.assert_array_equal(picks, expected[0])
    np.testing.assert_allclose(factors, expected[1], rtol=1e-4, atol=1e-6)


def test_equal_scores_go_to_the_lower_expert(interpreted: None):
    rule = Rule(3, "sigmoid", groups=4, top_groups=2, renormalise=True)
    x, router = jnp.ones((2, 64), jnp.bfloat16), jnp.zeros((64, E), jnp.float32)
    picks, factors = choose.route(x, router, None, rule, "routing:fused")
    assert picks.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(factors, 1 / 3, rtol=1e-6)


def test_the_gradient_is_the_references(interpreted: None):
    rule, x = Rule(3, "sigmoid", renormalise=True), jnp.ones((2, 64), jnp.bfloat16)

    def slope(kernel: str) -> jax.Array:
        def loss(router: jax.Array) -> jax.Array:
            factors = choose.route(x, router, None, rule, f"routing:{kernel}")[1]
            return jnp.sum(factors * jnp.arange(1.0, 4.0))

        return jax.grad(loss)(router)

    router = jnp.asarray(np.random.default_rng(0).normal(size=(64, E)), jnp.float32)
    np.testing.assert_allclose(slope("fused"), slope("reference"), rtol=1e-4, atol=1e-6)
    assert float(jnp.max(jnp.abs(slope("fused")))) > 0


@pytest.mark.parametrize(
    ("width", "experts", "groups", "kind", "match"),
    [
        (64, 96, 1, jnp.bfloat16, "powers of 2 of experts and groups, not 96"),
        (64, 32, 3, jnp.bfloat16, "powers of 2 of experts and groups, not 3"),
        (64, 40, 1, jnp.bfloat16, "multiples of 64 and 32 experts, not 64 and 40"),
        (96, 32, 1, jnp.bfloat16, "multiples of 64 and 32 experts, not 96 and 32"),
        (64, 32, 1, jnp.float32, "16-bit numbers, not float32"),
    ],
)
def test_what_is_not_served_has_a_reason(
    width: int, experts: int, groups: int, kind: Any, match: str, interpreted: None
):
    x, router = jnp.ones((2, width), kind), jnp.ones((width, experts), jnp.float32)
    with pytest.raises(ValueError, match=match):
        choose.route(x, router, None, Rule(2, groups=groups), "routing:fused")


def test_the_canary_holds_and_a_cpu_alone_is_refused(request: pytest.FixtureRequest):
    with pytest.raises(NotImplementedError, match="it needs a GPU"):
        choose.CHECKS["routing:fused"]()
    request.getfixturevalue("interpreted")
    choose.CHECKS["routing:fused"]()
