"""Unmasking and stop rules on their own, at the edges that no recorded run reaches."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.stop import EosFill, EosStop, Look, NoStop
from jdllm.unmask import (
    Argmax,
    Factor,
    Probability,
    Quota,
    Random,
    Threshold,
    Unmasker,
    View,
    split_quota,
)

MASK = 9


def odds(p: list[float]) -> jnp.ndarray:
    with np.errstate(divide="ignore"):
        values = np.log(np.array(p)) - np.log1p(-np.array(p))
    return jnp.array(values, jnp.float32)[None]


def view(
    masked: list[bool], quota: int = 1, logits=None, ids=None, settled=None, share: float = 1.0
) -> View:
    """One row; no draws, no floor."""
    N = len(masked)
    return View(
        logits=jnp.zeros((1, N, 10)) if logits is None else logits,
        ids_BN=jnp.where(jnp.array([masked]), MASK, 0) if ids is None else jnp.array([ids]),
        masked_BN=jnp.array([masked]),
        settled_BN=jnp.array([settled or [False] * N]),
        quota_B=jnp.array([quota]),
        share_B=jnp.array([share]),
        floor_B=jnp.array([-jnp.inf]),
        draw=lambda shape: jnp.zeros((1, *shape)),
    )


def chosen(selection, p, masked=None, quota=1) -> list[int]:
    seen = view([True] * len(p) if masked is None else masked, quota)
    score = odds(p)
    return np.flatnonzero(selection(score, Probability().value(score), seen)[0]).tolist()


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


def test_confidence_does_not_saturate():
    """Both probabilities round to 1 in float32, and still the larger one ranks first."""
    logits = jnp.array([[[40.0, 0.0], [60.0, 0.0]]])
    values = Probability()(logits, jnp.zeros((1, 2), jnp.int32), lambda shape: jnp.zeros(shape))
    np.testing.assert_allclose(values[0], [40.0, 60.0])
    assert chosen(Quota(), [0.5, 0.5], quota=1) == [0]
    picked = Quota()(values, values, view([True, True], 1))
    assert np.flatnonzero(picked[0]).tolist() == [1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_log_odds_are_those_of_the_softmax(seed: int):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(1, 4, 10))
    ids = rng.integers(0, 10, (1, 4))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p = np.take_along_axis(p, ids[..., None], -1)[..., 0]
    got = Probability()(jnp.array(logits, jnp.float32), jnp.array(ids), lambda shape: jnp.ones(()))
    np.testing.assert_allclose(got, np.log(p / (1 - p)), atol=2e-4)


def test_suppressed_ids_rank_last_but_are_still_taken():
    logits = jnp.array([[[0.0, 5.0, 1.0], [2.0, 1.0, 0.0]]])
    rule = Unmasker(Argmax((MASK,)), Probability(suppressed=(1,)), Quota())
    first, _ = rule(view([True, True], 1, logits), {})
    assert first.candidate_BN.tolist() == [[1, 0]]
    assert first.ids_BN.tolist() == [[MASK, 0]]
    both, _ = rule(view([True, True], 2, logits), {})
    assert both.ids_BN.tolist() == [[1, 0]]


def test_forbidden_and_mask_ids_are_never_predicted():
    logits = jnp.zeros((1, 1, 10)).at[0, 0, MASK].set(9.0).at[0, 0, 4].set(8.0).at[0, 0, 2].set(7.0)
    rule = Unmasker(Argmax((MASK,)), Probability(), Quota(), forbidden=(4,))
    assert rule(view([True], 1, logits), {})[0].ids_BN.tolist() == [[2]]


@pytest.mark.parametrize("selection", [Quota(), Threshold(0.9), Factor(1.0)])
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_worthless_confidences_still_make_progress(selection, value):
    values = jnp.full((1, 4), value, jnp.float32)
    seen = view([False, True, False, True], 1)
    got = np.flatnonzero(selection(values, values, seen)[0]).tolist()
    assert got and set(got) <= {1, 3}


def test_random_confidence_keeps_the_order_of_its_draws():
    draws = jnp.array([[0.1, 0.9, 0.0, 0.5]])
    values = Random()(jnp.zeros((1, 4, 3)), jnp.zeros((1, 4), jnp.int32), lambda shape: draws)
    assert np.argsort(values[0]).tolist() == [2, 0, 3, 1]


@given(st.integers(0, 70), st.integers(1, 40))
def test_quotas_sum_to_the_masks_remainder_first(masks: int, steps: int):
    parts = [int(split_quota(jnp.array([masks]), steps, jnp.array(i))[0]) for i in range(steps)]
    assert sum(parts) == masks
    assert parts == sorted(parts, reverse=True) and max(parts) - min(parts) <= 1
    assert int(split_quota(jnp.array([masks]), steps, jnp.array(steps))[0]) == 0


def look(tokens: list[int], prompt: int, block: tuple[int, int], **facts) -> Look:
    columns = jnp.arange(len(tokens))[None]
    none = jnp.zeros(columns.shape, bool)
    known = {
        "generated_BT": columns >= prompt,
        "block_BT": (columns >= block[0]) & (columns < block[1]),
        "mask_id": MASK,
        "opening": False,
        "closing": False,
        "nfe_B": jnp.array([1]),
        "candidates_BT": jnp.full(columns.shape, -1),
        "written_BT": none,
    }
    return Look(**known | facts)


def run(stop, tokens, prompt, block, opening=False, **facts):
    canvas = jnp.array([tokens])
    seen = look(tokens, prompt, block, opening=opening, **facts)
    after, done, _ = stop(canvas, seen, stop.start(canvas))
    return after[0].tolist(), bool(done[0])


def test_eos_stop_waits_for_the_masks_before_the_end():
    stop = EosStop(eos_id=1, end_ids=(1, 2))
    assert run(stop, [1, 5, 5, 2, MASK, 7], 1, (1, 6)) == ([1, 5, 5, 2, 1, 1], True)
    assert run(stop, [1, 5, MASK, 2, MASK, 7], 1, (1, 6)) == ([1, 5, MASK, 2, MASK, 7], False)
    assert run(stop, [1, 5, 5, 5, 5, 5], 1, (1, 6)) == ([1, 5, 5, 5, 5, 5], False)


def test_eos_fill_overwrites_and_ends_with_the_block():
    stop = EosFill(eos_id=1)
    assert run(stop, [5, MASK, 1, 7, MASK, 7], 1, (1, 4)) == ([5, MASK, 1, 1, 1, 1], False)
    assert run(stop, [5, 6, 1, 7, MASK, 7], 1, (1, 4)) == ([5, 6, 1, 1, 1, 1], True)
    assert run(stop, [5, 6, 1, 7, MASK, 7], 1, (1, 4), True) == ([5, 6, 1, 7, MASK, 7], True)
    assert run(stop, [1, 6, 5, 7, 7, 7], 1, (1, 4)) == ([1, 1, 1, 1, 1, 1], True)


def test_no_stop_never_stops():
    assert run(NoStop(), [1, 1, 1], 1, (1, 3)) == ([1, 1, 1], False)
