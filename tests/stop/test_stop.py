"""Stop rules, one canvas at a time, by hand."""

from typing import Any

import jax.numpy as jnp
import pytest

from jdllm.stop import (
    Budget,
    EosAnywhere,
    EosBlock,
    EosFill,
    EosReturn,
    EosStop,
    NoStop,
    Stable,
    Stops,
)
from tests.support.one_row import MASK, stop_view


def run(stop, tokens: list[int], prompt: int, block: tuple[int, int], **facts):
    """The canvas and whether the row ends, after one call of the rule."""
    verdict = stop(stop_view(tokens, prompt, block, **facts), stop.start(jnp.array([tokens])))
    assert not verdict.leave_block_B[0]
    return verdict.tokens_BT[0].tolist(), bool(verdict.end_row_B[0])


def written(tokens: list[int], columns: list[int]) -> jnp.ndarray:
    return jnp.array([[i in columns for i in range(len(tokens))]])


def test_eos_stop_waits_for_the_masks_before_the_end():
    stop = EosStop(eos_id=1, end_ids=(1, 2))
    assert run(stop, [1, 5, 5, 2, MASK, 7], 1, (1, 6)) == ([1, 5, 5, 2, 1, 1], True)
    assert run(stop, [1, 5, MASK, 2, MASK, 7], 1, (1, 6)) == ([1, 5, MASK, 2, MASK, 7], False)
    assert run(stop, [1, 5, 5, 5, 5, 5], 1, (1, 6)) == ([1, 5, 5, 5, 5, 5], False)


def test_eos_stop_waits_for_the_block_where_tokens_may_be_edited():
    stop, tokens = EosStop(1, (1, 2), after_block=True), [5, 5, 2, 7, MASK, MASK]
    assert run(stop, tokens, 1, (1, 4)) == (tokens, False)
    assert run(stop, tokens, 1, (1, 4), closing=True) == ([5, 5, 2, 1, 1, 1], True)


def test_eos_fill_overwrites_and_ends_with_the_block():
    stop = EosFill(eos_id=1)
    assert run(stop, [5, MASK, 1, 7, MASK, 7], 1, (1, 4)) == ([5, MASK, 1, 1, 1, 1], False)
    assert run(stop, [5, 6, 1, 7, MASK, 7], 1, (1, 4)) == ([5, 6, 1, 1, 1, 1], True)
    opening = run(stop, [5, 6, 1, 7, MASK, 7], 1, (1, 4), opening=True)
    assert opening == ([5, 6, 1, 7, MASK, 7], True)
    assert run(stop, [1, 6, 5, 7, 7, 7], 1, (1, 4)) == ([1, 1, 1, 1, 1, 1], True)


def test_eos_fill_writes_over_the_prompt_as_well():
    """dInfer's port keeps nothing behind the row's first eos; after an opening pass all stays."""
    tokens = [5, 1, 6, 7, MASK, MASK]
    assert run(EosFill(1), tokens, 4, (4, 6)) == ([5, 1, 1, 1, 1, 1], True)
    assert run(EosFill(1), tokens, 4, (4, 6), opening=True) == (tokens, False)


@pytest.mark.parametrize("stop", [EosFill(1), EosAnywhere(1), EosReturn(1), EosBlock(1)], ids=str)
def test_padding_is_no_end(stop):
    """A row among longer ones is filled up with eos; that is not its own."""
    tokens = [5, 6, 7, MASK, 1, 1]
    generated_BT = jnp.array([[False, True, True, True, False, False]])
    for closing in (False, True):
        facts: dict[str, Any] = {"generated_BT": generated_BT, "closing": closing}
        assert run(stop, tokens, 1, (1, 3), **facts) == (tokens, False)


def test_eos_block_looks_when_the_block_is_over():
    tokens = [5, 6, 1, 7, 8, MASK]
    assert run(EosBlock(1), tokens, 1, (1, 4)) == (tokens, False)
    assert run(EosBlock(1), tokens, 1, (1, 4), closing=True) == (tokens, True)
    filled = run(EosBlock(1, fill=True), tokens, 1, (1, 4), closing=True)
    assert filled == ([5, 6, 1, 7, 1, 1], True)
    none = run(EosBlock(1, fill=True), [5, 6, 6, 7, 8, MASK], 1, (1, 4), closing=True)
    assert none == ([5, 6, 6, 7, 8, MASK], False)


def test_eos_block_knows_the_prompt_from_the_answer():
    """An eos in the prompt's tail ends dInfer's aligned block; otherwise the answer counts."""
    tokens = [5, 1, 6, 7, MASK, MASK]
    assert not run(EosBlock(1), tokens, 2, (0, 4), closing=True)[1]
    assert run(EosBlock(1, block_only=True), tokens, 2, (0, 4), closing=True)[1]
    early = [5, 5, 1, 7, 6, 6, MASK]
    assert run(EosBlock(1), early, 2, (4, 6), closing=True)[1]
    assert not run(EosBlock(1, block_only=True), early, 2, (4, 6), closing=True)[1]


def test_eos_block_ignores_an_end_behind_the_block():
    assert not run(EosBlock(1), [5, 6, 6, 7, 1, MASK], 1, (1, 4), closing=True)[1]


def test_eos_return_wants_a_step_that_wrote_an_end():
    tokens = [5, 6, 1, MASK, MASK, MASK]
    assert not run(EosReturn(1), tokens, 1, (0, 4))[1]
    assert run(EosReturn(1), tokens, 1, (0, 4), written_BT=written(tokens, [2]))[1]
    masked = [5, MASK, 1, MASK, MASK, MASK]
    assert not run(EosReturn(1), masked, 1, (0, 4), written_BT=written(masked, [2]))[1]
    assert run(EosReturn(1), masked, 1, (0, 4), closing=True)[1]


def test_eos_return_counts_the_prompts_end_as_the_first():
    tokens = [1, MASK, 1, MASK]
    assert run(EosReturn(1), tokens, 1, (0, 4), written_BT=written(tokens, [2]))[1]


def test_eos_anywhere_counts_the_prompt_and_leaves_masks():
    tokens = [1, MASK, 5, MASK]
    assert run(EosAnywhere(1), tokens, 1, (1, 4)) == (tokens, True)
    assert run(EosAnywhere(1), [5, MASK, 5, MASK], 1, (1, 4)) == ([5, MASK, 5, MASK], False)


def test_no_stop_never_stops():
    assert run(NoStop(), [1, 1, 1], 1, (1, 3)) == ([1, 1, 1], False)


def test_budget_fills_the_block_with_its_last_forward():
    tokens, candidates = [5, MASK, 6, MASK, MASK], jnp.array([[-1, 3, 4, 2, -1]])
    facts = {"candidates_BT": candidates}
    assert run(Budget(2), tokens, 1, (1, 4), **facts) == (tokens, False)
    spent = run(Budget(2), tokens, 1, (1, 4), nfe_B=jnp.array([2]), **facts)
    assert spent == ([5, 3, 6, 2, MASK], True)


def test_budget_counts_each_row_for_itself():
    tokens = jnp.array([[5, MASK], [5, MASK]])
    facts = {"tokens_BT": tokens, "open_BT": tokens == MASK, "nfe_B": jnp.array([3, 2])}
    seen = stop_view([5, MASK], 1, (1, 2), candidates_BT=jnp.array([[-1, 4]]), **facts)
    after, _, done, *_ = Budget(3)(seen, None)
    assert after.tolist() == [[5, 4], [5, MASK]]
    assert done.tolist() == [True, False]


def steps(stop, tokens: list[int], candidates: list[list[int]], block=(1, 4)) -> list[list[int]]:
    """The canvas after each step; predictions change as given."""
    canvas = jnp.array([tokens])
    carry, seen = stop.start(canvas), []
    for now in candidates:
        facts = stop_view(canvas[0].tolist(), 1, block, candidates_BT=jnp.array([now]))
        canvas, _, done, carry, _ = stop(facts, carry)
        assert not done[0]
        seen.append(canvas[0].tolist())
    return seen


def test_stable_fills_what_stays_the_same():
    tokens = [5, MASK, 6, MASK, MASK]
    same, other = [-1, 3, 4, 2, -1], [-1, 3, 4, 7, -1]
    assert steps(Stable(1), tokens, [same, same]) == [tokens, [5, 3, 6, 2, MASK]]
    assert steps(Stable(2), tokens, [same, same]) == [tokens] * 2
    assert steps(Stable(2), tokens, [same, same, other, other]) == [tokens] * 4
    assert steps(Stable(2), tokens, [same] * 3)[-1] == [5, 3, 6, 2, MASK]


def test_stable_asks_masks_only():
    """What stands already may be predicted to be anything."""
    tokens = [5, MASK, 6, 7, MASK]
    assert steps(Stable(1), tokens, [[-1, 3, 4, 2, -1], [-1, 3, 8, 1, -1]])[-1][1] == 3


def test_stable_begins_anew_in_every_block():
    """Predictions for the next block, made in this one, are no step of it."""
    canvas = jnp.array([[5, 6, MASK, MASK]])
    stop, ahead = Stable(1), jnp.array([[-1, 6, 3, 3]])
    carry = stop.start(canvas)
    for block in ((1, 2), (2, 4)):
        facts = stop_view([5, 6, MASK, MASK], 1, block, candidates_BT=ahead)
        canvas, _, _, carry, _ = stop(facts, carry)
    assert canvas[0].tolist() == [5, 6, MASK, MASK]


@pytest.mark.parametrize("order", [1, -1])
def test_stops_combine(order: int):
    """A row ends with the first rule that says so; each sees what those before it wrote."""
    rules = (Stable(1), Budget(9), EosStop(1, (1,)))[::order]
    stop, tokens = Stops(rules), [5, MASK, MASK, MASK]
    canvas = jnp.array([tokens])
    carry = stop.start(canvas)
    facts = stop_view(tokens, 1, (1, 4), candidates_BT=jnp.array([[-1, 3, 1, 2]]))
    canvas, _, done, carry, _ = stop(facts, carry)
    assert canvas[0].tolist() == tokens and not done[0]
    canvas, _, done, *_ = stop(facts, carry)
    filled = [5, 3, 1, 1] if order == 1 else [5, 3, 1, 2]
    assert canvas[0].tolist() == filled and bool(done[0]) == (order == 1)
    assert stop(stop_view(tokens, 1, (1, 4), nfe_B=jnp.array([9])), carry).end_row_B[0]
