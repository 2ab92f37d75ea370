"""Selections: which positions go, at the edges that no recorded run reaches."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm import DecodeConfig
from jdllm.unmask import (
    Allowance,
    EntropyBound,
    Factor,
    Hierarchy,
    Probability,
    Quota,
    Share,
    Threshold,
)
from tests.support import oracle
from tests.support.one_row import view

N = 6


def chosen(selection, values: list[float], masked=None, quota=1, **facts) -> list[int]:
    """Positions that are picked; scores are the values themselves."""
    seen = view([True] * len(values) if masked is None else masked, quota, **facts)
    score = jnp.array([values], jnp.float32)
    return np.flatnonzero(selection(score, score, seen)[0]).tolist()


def test_quota_takes_the_best_and_the_lowest_index_on_ties():
    assert chosen(Quota(), [0.2, 0.9, 0.5, 0.9], quota=1) == [1]
    assert chosen(Quota(), [0.2, 0.9, 0.5, 0.9], quota=3) == [1, 2, 3]
    assert chosen(Quota(), [0.5] * 5, quota=2) == [0, 1]
    assert chosen(Quota(), [0.5] * 5, [False, True, False, True, True], quota=9) == [1, 3, 4]
    assert chosen(Quota(), [0.5] * 5, quota=0) == []


def test_threshold_keeps_what_equals_it_and_always_the_best():
    assert chosen(Threshold(0.5), [0.5, 0.4, 0.6]) == [0, 2]
    assert chosen(Threshold(0.9), [0.5, 0.4, 0.6]) == [2]
    assert chosen(Threshold(0.9), [0.5, 0.4, 0.6], [False] * 3) == []
    assert chosen(Threshold(1.0), [1.0, 0.3, 1.0]) == [0, 2]
    assert chosen(Threshold(0.0), [0.1, 0.2]) == [0, 1]


def test_threshold_above_leaves_what_equals_it():
    assert chosen(Threshold(0.5, "above"), [0.5, 0.75, 0.6]) == [1, 2]
    assert chosen(Threshold(1.0, "above"), [1.0, 0.3, 1.0]) == [0]  # nobody passes: the best one


def test_threshold_slack_takes_near_ties_of_the_best():
    """min(best - 1e-5, threshold): below the threshold, 1e-5 decides; above it, the threshold."""
    slack = Threshold(0.9, "slack")
    assert chosen(slack, [0.5, 0.5 - 0.9e-5, 0.5 - 1.2e-5]) == [0, 1]
    assert chosen(slack, [0.9 - 0.5e-5, 0.9 + 0.5e-5, 0.3]) == [0, 1]
    assert chosen(slack, [0.9, 0.95, 0.9 - 2e-5]) == [0, 1]
    assert chosen(slack, [0.9] * 3, [False] * 3) == []


def test_threshold_has_a_floor_on_the_tokens_of_a_step():
    """LLaDA2.0: those above the threshold, or the schedule's number of the best if fewer are."""
    rule = Threshold(0.5, "above")
    assert chosen(rule, [0.9, 0.2, 0.3, 0.6], quota=3) == [0, 2, 3]
    assert chosen(rule, [0.9, 0.7, 0.3, 0.6], quota=2) == [0, 1, 3]
    assert chosen(rule, [0.4, 0.2], quota=0) == []
    assert chosen(rule, [0.4, 0.2], quota=5) == [0, 1]


def test_a_bar_from_outside_raises_the_threshold():
    floor = jnp.array([0.8])
    assert chosen(Threshold(0.5), [0.9, 0.7, 0.8], floor_B=floor) == [0, 2]
    assert chosen(Hierarchy(0.5, 0.95), [0.9, 0.7, 0.85], floor_B=floor) == [0, 2]
    assert chosen(Threshold(0.9), [0.85, 0.95], floor_B=floor) == [1]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.9, 0.8, 0.1], [0, 1, 2]),  # a failure at the last rank is overlooked
        ([0.9, 0.1, 0.05], [0]),
        ([0.2], [0]),
        ([0.99, 0.98, 0.2, 0.1], [0, 1]),
        ([0.99, 0.98, 0.97, 0.96], [0, 1, 2, 3]),
    ],
)
def test_factor_by_hand(p: list[float], expected: list[int]):
    assert chosen(Factor(1.0), p) == expected
    assert chosen(Factor(1.0), p, [False] * len(p)) == []


def test_hierarchy_takes_the_best_of_every_run():
    rule, masked = Hierarchy(0.9, 0.4), [True, True, False, True, True, True]
    assert chosen(rule, [0.5, 0.6, 0.0, 0.7, 0.8, 0.5], masked) == [1, 4]
    assert chosen(rule, [0.5, 0.6, 0.0, 0.95, 0.97, 0.9], masked) == [1, 3, 4]
    assert chosen(rule, [0.3, 0.4, 0.0, 0.7, 0.8, 0.5], masked) == [4]  # above low, not at it
    assert chosen(rule, [0.3, 0.2, 0.0, 0.1, 0.1, 0.1], masked) == [0]  # the best of all goes
    assert chosen(rule, [0.5] * 6, masked) == [0, 3]


def test_entropy_bound_counts_the_token_that_would_reach_it():
    rule = EntropyBound(0.5)
    assert chosen(rule, [-0.25, -0.125, -0.25]) == [0, 1]  # 0.125, 0.375, 0.625
    assert chosen(rule, [-0.25, -0.25, -0.25]) == [0]  # the second makes it 0.5: not under
    assert chosen(rule, [-2.0, -3.0]) == [0]
    assert chosen(rule, [-0.25, -0.125], [True, False]) == [0]


def test_allowance_takes_the_sure_ones_of_the_quota():
    rule = Allowance(0.5)
    assert chosen(rule, [0.9, 0.8, 0.7], quota=2) == [0, 1]
    assert chosen(rule, [0.9, 0.4, 0.5], quota=3) == [0, 2]
    assert chosen(rule, [0.3, 0.4, 0.1], quota=3) == [1]


def test_share_takes_every_mask_by_itself():
    draws = [0.1, 0.5, 0.3, 0.2]
    assert chosen(Share(), draws, share_B=jnp.array([0.3])) == [0, 3]
    assert chosen(Share(), draws, [False, True, True, True], share_B=jnp.ones(1)) == [1, 2, 3]


sixteenths = st.integers(0, 16).map(lambda n: n / 16)  # exact, so that edges and ties come up
PAIRS = {
    "at_least": ({"threshold": 0.5}, Threshold(0.5)),
    "above": ({"threshold": 0.5, "edge": "above"}, Threshold(0.5, "above")),
    "slack": ({"threshold": 0.5, "edge": "slack"}, Threshold(0.5, "slack")),
    "quota": ({"rule": "quota"}, Quota()),
    "factor": ({"rule": "factor", "factor": 1.0}, Factor(1.0)),
    "hierarchy": (
        {"rule": "hierarchy", "threshold": 0.75, "low_threshold": 0.25},
        Hierarchy(0.75, 0.25),
    ),
    "allowance": ({"rule": "allowance", "threshold": 0.5}, Allowance(0.5)),
    "entropy_bound": (
        {"rule": "entropy_bound", "remasking": "entropy", "entropy_bound": 0.75},
        EntropyBound(0.75),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(sixteenths, min_size=N, max_size=N),
    masked=st.lists(st.booleans(), min_size=N, max_size=N),
    quota=st.integers(0, N),
    floor=st.sampled_from([-np.inf, 0.6875]),
)
def test_selections_equal_plain_ones(name, values, masked, quota, floor):
    options, selection = PAIRS[name]
    config = DecodeConfig(**options)
    sign = -1 if config.remasking == "entropy" else 1
    c = sign * np.array(values)
    open_ = np.flatnonzero(masked).tolist()
    facts = {"floor_B": jnp.array([floor])}
    expected = oracle.select(c, open_, config, quota, floor)
    assert chosen(selection, c.tolist(), masked, quota, **facts) == sorted(expected)


def test_confidence_does_not_saturate():
    """Both probabilities round to 1 in float32, and still the larger one ranks first."""
    logits = jnp.array([[[40.0, 0.0], [60.0, 0.0]]])
    values = Probability()(logits, jnp.zeros((1, 2), jnp.int32), lambda shape: jnp.zeros(shape))
    np.testing.assert_allclose(values[0], [40.0, 60.0])
    assert Probability().value(values)[0].tolist() == [1.0, 1.0]
    assert chosen(Quota(), values[0].tolist(), quota=1) == [1]


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("selection", [pair[1] for pair in PAIRS.values()], ids=PAIRS)
def test_worthless_confidences_still_make_progress(selection, value):
    got = chosen(selection, [value] * 4, [False, True, False, True], 1)
    assert got and set(got) <= {1, 3}
