"""Candidates, confidences, schedules, credit and editing, against plain versions of them."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.parity.sglang import LateEdit
from jdllm.unmask import (
    Argmax,
    CarryOver,
    Columns,
    Credit,
    Each,
    Edit,
    Gumbel,
    Leftmost,
    Margin,
    Masks,
    NegativeEntropy,
    Pace,
    Probability,
    Quota,
    Random,
    Tempered,
    Threshold,
    Timesteps,
    Unmasker,
    Warp,
    split_quota,
)
from jdllm.unmask.schedule import linspace
from tests.support.one_row import MASK, VOCAB, canvas_view, one_hot, view
from tests.support.oracle import times
from tests.support.plain_model import softmax

FEW = {"max_examples": 40, "deadline": None, "derandomize": True}
seeds = st.integers(0, 10_000)


def no_draw(shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros((1, *shape))


def random_logits(seed: int, positions: int = 4, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=scale, size=(1, positions, VOCAB))


# Candidates


def test_forbidden_and_mask_ids_are_never_predicted():
    logits = jnp.zeros((1, 1, 10)).at[0, 0, MASK].set(9.0).at[0, 0, 4].set(8.0).at[0, 0, 2].set(7.0)
    rule = Unmasker(Argmax((MASK,)), Probability(), Quota(), forbidden=(4,))
    assert rule(view([True], 1, logits=logits), {})[0].ids_BN.tolist() == [[2]]


def test_the_lowest_token_wins_ties():
    logits = jnp.zeros((1, 2, VOCAB)).at[0, 1, jnp.array([4, 7])].set(1.0)
    assert Argmax((0,))(logits, no_draw).tolist() == [[1, 4]]


def plain_warp(
    row: np.ndarray, temperature: float, top_p: float, top_k: int, top_k_first: bool = False
) -> list[int]:
    """Ids that are kept: in order of falling logits, until the line is crossed."""
    row = row / (temperature or 1.0)
    order = sorted(range(len(row)), key=lambda i: -row[i])
    order = order[:top_k] if top_k_first else order
    p, kept, mass = softmax(row[order]), [], 0.0
    for i, share in zip(order, p, strict=True):
        if mass <= top_p:
            kept.append(i)
        mass += share
    return sorted(kept[:top_k])


@settings(**FEW)
@given(
    seeds,
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.integers(1, 10),
    st.booleans(),
)
def test_warp_equals_a_plain_sort(
    seed: int, temperature: float, top_p: float, top_k: int, top_k_first: bool
):
    logits, how = random_logits(seed, 1), (temperature, top_p, top_k, top_k_first)
    warped = np.asarray(Warp(*how)(jnp.array(logits, jnp.float32)))[0, 0]
    kept = plain_warp(logits[0, 0], *how)
    assert np.flatnonzero(warped > -1e30).tolist() == kept
    np.testing.assert_allclose(warped[kept], logits[0, 0, kept] / (temperature or 1), rtol=1e-5)


def test_the_order_of_the_filters_tells():
    """Half the mass of 0.4, 0.3, 0.2, 0.1 takes two tokens; of the best two's it takes one."""
    logits = jnp.log(jnp.array([[[0.4, 0.3, 0.2, 0.1]]]))
    for top_k_first, kept in ((False, [0, 1]), (True, [0])):
        warped = Warp(1.0, top_p=0.5, top_k=2, top_k_first=top_k_first)(logits)[0, 0]
        assert np.flatnonzero(warped > -1e30).tolist() == kept


def test_warp_keeps_ties_with_the_last_token():
    logits = jnp.array([[[2.0, 1.0, 1.0, 0.0]]])
    assert (Warp(top_k=2)(logits)[0, 0] > -1e30).tolist() == [True, True, True, False]
    assert (Warp(top_p=0.7)(logits)[0, 0] > -1e30).tolist() == [True, True, True, False]
    assert Warp(top_p=1.0, top_k=9)(logits).tolist() == logits.tolist()


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 0.1}])
def test_warp_leaves_a_token_to_take(how: dict[str, Any]):
    """Also where [MASK] alone is within the filter: then [MASK] and the best of the others stay."""
    logits = jnp.array([[[0.0, 2.0, 9.0, 1.0]]])
    warped = Warp(**how, excluded=(2,))(logits)
    assert (warped[0, 0] > -1e30).tolist() == [False, True, True, False]
    assert Argmax((2,))(warped, no_draw).tolist() == [[1]]
    assert (Warp(**how)(logits)[0, 0] > -1e30).tolist() == [False, False, True, False]


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = p / p.sum() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_gumbel_agrees_with_the_float64_rule():
    """Frequencies of 20 000 draws over 8 tokens against the reference's rule in float64.

    By that rule token i wins with probability softmax(logits / T). The chi-square statistic has 7
    degrees of freedom; 24.3 is its 0.001 quantile. A temperature off by 10 % would exceed it.
    """
    temperature, n = 0.7, 20_000
    logits = np.random.default_rng(0).normal(size=8)

    def statistic(t: float) -> float:
        u = jax.random.uniform(jax.random.key(1), (1, n, 9))
        tiled = jnp.broadcast_to(jnp.append(logits, -jnp.inf), (1, n, 9))
        ids = np.asarray(Gumbel((8,), temperature=t)(tiled, lambda shape: u))[0]
        return chi_square(np.bincount(ids, minlength=8), softmax(logits / temperature))

    assert statistic(temperature) < 24.3
    assert statistic(temperature * 1.1) > 24.3


def test_warped_gumbel_draws_from_the_filtered_softmax():
    """Categorical sampling: logits / T, top_p, top_k, then a draw; 20 000 of them, as above."""
    warp, n = Warp(0.7, 0.9, 5), 20_000
    logits = np.random.default_rng(2).normal(size=VOCAB)
    kept = plain_warp(logits, 0.7, 0.9, 5)
    assert len(kept) == 5
    u = jax.random.uniform(jax.random.key(2), (1, n, VOCAB))
    warped = warp(jnp.array(logits, jnp.float32)[None, None])
    ids = np.asarray(Gumbel((), 1.0)(jnp.broadcast_to(warped, u.shape), lambda shape: u))[0]
    assert set(ids) == set(kept)
    counts = np.bincount(ids, minlength=VOCAB)[kept]
    assert chi_square(counts, softmax(logits[kept] / 0.7)) < 18.5  # 4 degrees, 0.001
    assert chi_square(counts, softmax(logits[kept] / 0.77)) > 18.5


# Confidences


@settings(**FEW)
@given(seeds)
def test_confidences_equal_plain_ones(seed: int):
    logits = random_logits(seed)
    given_logits, p = jnp.array(logits, jnp.float32), softmax(logits)
    ids = np.random.default_rng(seed).integers(0, VOCAB, (1, 4))
    own = np.take_along_axis(p, ids[..., None], -1)[..., 0]
    odds = Probability()(given_logits, jnp.array(ids), no_draw)
    np.testing.assert_allclose(odds, np.log(own / (1 - own)), atol=2e-4)
    np.testing.assert_allclose(Probability().value(odds), own, atol=1e-6)
    ordered = np.sort(p, -1)
    margin = Margin()(given_logits, jnp.array(ids), no_draw)
    np.testing.assert_allclose(margin, ordered[..., -1] - ordered[..., -2], atol=1e-6)
    entropy = -NegativeEntropy()(given_logits, jnp.array(ids), no_draw)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), atol=1e-5)
    left = Leftmost()(given_logits, jnp.array(ids), no_draw)
    assert left.tolist() == [[0, -1, -2, -3]]


def test_suppressed_ids_rank_last_but_are_still_taken():
    logits = jnp.array([[[0.0, 5.0, 1.0], [2.0, 1.0, 0.0]]])
    rule = Unmasker(Argmax((MASK,)), Probability(suppressed=(1,)), Quota())
    first, _ = rule(view([True, True], 1, logits=logits), {})
    assert first.candidate_BN.tolist() == [[1, 0]]
    assert first.ids_BN.tolist() == [[MASK, 0]]
    both, _ = rule(view([True, True], 2, logits=logits), {})
    assert both.ids_BN.tolist() == [[1, 0]]


def test_random_confidence_keeps_the_order_of_its_draws():
    draws = jnp.array([[0.1, 0.9, 0.0, 0.5]])
    values = Random()(jnp.zeros((1, 4, 3)), jnp.zeros((1, 4), jnp.int32), lambda shape: draws)
    assert np.argsort(values[0]).tolist() == [2, 0, 3, 1]


def test_tempered_draws_positions_without_replacement():
    """Dream's alg_temp: the best two of confidence / T + Gumbel noise are a draw of two positions.

    20 000 draws of ordered pairs, P(i, j) = p_i p_j / (1 - p_i) with p = softmax(confidence / T);
    of 4 positions there are 12 pairs, 11 degrees of freedom, 0.001 quantile 31.3. A temperature off
    by 10 % would exceed it.
    """
    n, temperature = 20_000, 0.3
    logits = jnp.log(jnp.array([0.9, 0.75, 0.6, 0.2]))
    pair = jnp.stack([logits, jnp.log1p(-jnp.exp(logits))], -1)  # token 0 has these probabilities
    u = jax.random.uniform(jax.random.key(3), (n, 4))
    confidence = Tempered(Probability(), temperature)
    tiled = jnp.broadcast_to(pair, (n, 4, 2))
    score = confidence(tiled, jnp.zeros((n, 4), jnp.int32), lambda shape: u)
    order = np.argsort(-np.asarray(score), axis=1)
    counts = np.zeros((4, 4))
    np.add.at(counts, (order[:, 0], order[:, 1]), 1)

    def statistic(t: float) -> float:
        p = softmax(np.exp(np.asarray(logits, np.float64)) / t)
        expected = p[:, None] * p[None] / (1 - p[:, None])
        pairs = ~np.eye(4, dtype=bool)
        return chi_square(counts[pairs], expected[pairs])

    assert statistic(temperature) < 31.3
    assert statistic(temperature * 1.1) > 31.3


# Schedules


def pace(opened_B: jnp.ndarray, open_B: jnp.ndarray, step: int) -> Pace:
    """Of rows that are all at a step of their first block."""
    return Pace(opened_B, open_B, jnp.full_like(open_B, step), jnp.zeros_like(open_B))


def quotas(schedule, masks: int, steps: int) -> list[int]:
    """What a block gives up step by step, where every step takes its quota."""
    left, taken = jnp.array([masks]), []
    for step in range(steps):
        quota = int(schedule(pace(jnp.array([masks]), left, step))[0][0])
        taken.append(quota)
        left = left - min(quota, int(left[0]))
    return taken


@pytest.mark.parametrize(
    ("steps", "head", "tail"),
    [
        (256, [0, 1, 1, 1], [1, 1, 1, 2]),
        (128, [1, 2, 2, 2], [2, 2, 2, 3]),
        (64, [3, 4, 4, 4], [4, 4, 4, 5]),
        (32, [7, 8, 8, 8], [8, 8, 8, 9]),
    ],
)
def test_dreams_truncation_over_256_masks(steps: int, head: list[int], tail: list[int]):
    """The recorded quotas of the reference: the first step gives one less, the last one more."""
    taken = quotas(Timesteps(steps, 1e-3), 256, steps)
    assert taken[:4] == head and taken[-4:] == tail
    assert set(taken[1:-1]) == {head[1]}
    assert sum(taken) == 256


@pytest.mark.parametrize(("steps", "eps"), [(1, 1e-3), (2, 1e-3), (7, 0.5), (12, 1e-3)])
def test_dreams_shares_follow_its_times(steps: int, eps: float):
    t = np.linspace(1, eps, steps + 1)
    expected = np.append(1 - t[1:-1] / t[:-2], 1.0)
    np.testing.assert_allclose(Timesteps(steps, eps).shares(), expected, rtol=1e-5)


def test_dreams_times_are_those_of_torch_to_the_last_bit():
    """The digest of torch.linspace(1, 1e-3, steps + 1), version 2.13 on a CPU, for all schedules.

    Bits count: the share of a step is truncated.
    """
    seen = hashlib.sha256()
    for steps in range(1, 4097):
        seen.update(linspace(1e-3, steps).tobytes())
    expected = "54ba5c72d1cd07ee78b78a521d243975f30232a3eafbe1fa3deec4723267b9fc"
    assert seen.hexdigest() == expected


@settings(**FEW)
@given(st.integers(1, 4096), st.sampled_from([1e-3, 1e-5, 0.05, 0.5]))
def test_dreams_times_equal_their_twin(steps: int, eps: float):
    np.testing.assert_array_equal(linspace(eps, steps), times(steps, eps))


def test_dreams_mean_couples_rows():
    masks = jnp.array([8, 4])
    apart = Timesteps(4, 1e-3)(pace(masks, masks, 1))[0]
    coupled = Timesteps(4, 1e-3, mean=True)(pace(masks, masks, 1))[0]
    assert apart.tolist() == [2, 1] and coupled.tolist() == [1, 1]
    filled = jnp.array([8, 4, 0, 0])  # with rows that a mesh needs: they do not count
    assert Timesteps(4, 1e-3, mean=True)(pace(filled, filled, 1))[0][:2].tolist() == [1, 1]


@settings(**FEW)
@given(st.integers(0, 70), st.integers(1, 40))
def test_quotas_sum_to_the_masks_remainder_first(masks: int, steps: int):
    parts = [int(split_quota(jnp.array([masks]), steps, jnp.array(i))[0]) for i in range(steps)]
    assert sum(parts) == masks
    assert parts == sorted(parts, reverse=True) and max(parts) - min(parts) <= 1
    assert int(split_quota(jnp.array([masks]), steps, jnp.array(steps))[0]) == 0


def test_schedules_by_hand():
    assert quotas(Masks(4), 10, 5) == [3, 3, 2, 2, 0]
    assert quotas(Masks(4), 2, 4) == [1, 1, 0, 0]
    assert quotas(Columns(8, 3), 2, 3) == [3, 3, 2]  # the block's columns, masked or not
    assert quotas(Each(3), 5, 3) == [3, 3, 3]


def test_what_a_step_leaves_is_due_in_the_next():
    due = CarryOver(3)
    opened = jnp.array([7])

    def quota(left: int, step: int) -> int:
        return int(due(pace(opened, jnp.array([left]), step))[0][0])

    assert [quota(7, 0), quota(5, 1)] == [2, 2]  # as planned
    assert quota(6, 1) == 3  # one was left over
    assert quota(6, 2) == 6 and quota(5, 7) == 5  # from the last step on everything is due
    assert quota(4, 1) == 1  # ahead of the plan, but no step is idle
    assert quotas(CarryOver(4), 2, 2) == [1, 1]


# Credit


CREDITS = {facts: jax.jit(Credit(*facts)) for facts in [(0.7, 0.8, 0.2), (2.0, 0.5, 1.0)]}


@settings(**FEW)
@given(seeds, st.sampled_from(list(CREDITS)))
def test_credit_equals_the_dense_matrix(seed: int, facts: tuple[float, float, float]):
    """Logits of six calls while masks vanish, against a matrix [N, V] in float64."""
    alpha, beta, gamma = facts
    rng, fuse = np.random.default_rng(seed), CREDITS[facts]
    base = rng.normal(scale=2, size=(4, VOCAB))
    state, dense = Credit(*facts).start(1, 4, 8), np.zeros((4, VOCAB))
    masked = np.ones(4, bool)
    for call in range(6):
        logits = base + rng.normal(scale=0.7, size=base.shape)
        if call:
            dense *= beta
        p = softmax(logits)
        for i in np.flatnonzero(masked):
            dense[i, p[i].argmax()] += p[i].max() ** gamma
        fused, state = fuse(jnp.array(logits, jnp.float32)[None], jnp.array([masked]), state)
        np.testing.assert_allclose(fused[0], logits + alpha * np.log1p(dense), atol=1e-4)
        masked &= rng.random(4) > 0.2
    assert int(state.calls_B[0]) == 6


def test_credit_does_not_decay_in_the_first_call_and_starts_anew_in_a_block():
    credit, logits = Credit(), one_hot([3, 4])
    rule = Unmasker(Argmax((MASK,)), Probability(), Threshold(2.0), credit=credit)
    carry = rule.start(1, 2, 4)
    _, carry = rule(view([True, False], 1, logits=logits), carry)
    gain = float(softmax(np.asarray(logits, np.float64))[0, 0, 3] ** 0.2)
    np.testing.assert_allclose(carry["credit"].credit_BNS.sum(-1), [[gain, 0]], rtol=1e-6)
    _, carry = rule(view([True, False], 1, logits=logits), carry)
    np.testing.assert_allclose(carry["credit"].credit_BNS.sum(-1), [[gain * 1.8, 0]], rtol=1e-6)
    assert not rule.start(1, 2, 4)["credit"].credit_BNS.any()


# Editing


def edited(edit: Edit, ids: list[int], logits: jnp.ndarray, prompt: int = 0, state=None):
    """The block after a call with threshold 0.5, and whether it wants another one."""
    rule = Unmasker(Argmax((MASK,)), Probability(), Threshold(0.5, "above"), edit=edit)
    carry = {"edit": state or edit.start(1)}
    decision, carry = rule(canvas_view(ids, prompt, logits), carry)
    masks_B = jnp.sum(decision.ids_BN == MASK, axis=1)
    return decision.ids_BN[0].tolist(), bool(rule.wants(masks_B, carry)[0]), carry["edit"]


def test_editing_replaces_what_was_generated_but_not_the_prompt_nor_new_tokens():
    ids, wants, _ = edited(Edit(0.9), [1, 2, MASK, 3], one_hot([5, 6, 7, 8]), prompt=1)
    assert ids == [1, 6, 7, 8] and wants


def test_editing_is_strict():
    """Token 5 has exactly probability 1 in float32, which is not above 1."""
    logits = one_hot([5, 6], 200.0)
    assert edited(Edit(1.0), [1, 2], logits)[0] == [1, 2]
    assert edited(Edit(0.999), [1, 2], logits)[0] == [5, 6]


def test_editing_ends_when_a_clean_call_changes_nothing():
    edit, settle = Edit(0.9), one_hot([5, 6])
    ids, wants, state = edited(edit, [1, 6], settle)
    assert (ids, wants) == ([5, 6], True)
    ids, wants, state = edited(edit, ids, settle, state=state)
    assert (ids, wants) == ([5, 6], False)
    assert bool(state.finished_B[0])


def test_a_call_that_fills_masks_is_not_clean():
    ids, wants, state = edited(Edit(0.9), [MASK, 6], one_hot([5, 6]))
    assert (ids, wants) == ([5, 6], True)
    assert int(state.passes_B[0]) == 0


@pytest.mark.parametrize("late", [False, True])
def test_editing_ends_after_its_passes(late: bool):
    """A block whose token flips for ever: `late` makes one more call, and drops what it says."""
    edit, ids, state, seen = (LateEdit if late else Edit)(0.9, passes=2), [1], None, []
    for token in (5, 6, 5, 6):
        ids, wants, state = edited(edit, ids, one_hot([token]), state=state)
        seen.append((ids[0], wants))
        if not wants:
            break
    assert seen == [(5, True), (6, late)] + [(6, False)] * late


def test_no_pass_at_all():
    ids, wants, _ = edited(Edit(0.9, passes=0), [MASK, 2], one_hot([5, 6]))
    assert (ids, wants) == ([5, 6], False)


def test_the_penalty_discourages_repeating_the_left_neighbour():
    logits = one_hot([5, 5, 5], 2.0).at[0, :, 6].set(1.0)
    assert edited(Edit(1.0), [MASK] * 3, logits)[0][0] == 5
    rule = Unmasker(Argmax((MASK,)), Probability(), Quota(), edit=Edit(1.0, penalty=1.5))
    start = {"edit": Edit(1.0).start(1)}
    decision, _ = rule(canvas_view([5, MASK, MASK], 1, logits, quota=2), start)
    assert decision.ids_BN[0].tolist() == [5, 6, 5]  # the neighbour of the last is a mask
