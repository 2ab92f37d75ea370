"""The two rules that are no compositions: insertion and deletion, and speculation."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm import DecodeConfig, decode
from jdllm.parity import make_setup
from jdllm.unmask.indel import InDel
from jdllm.unmask.speculate import Speculate
from jdllm.unmask.view import Verify
from tests.support.one_row import MASK, VOCAB, canvas_view, one_hot, view
from tests.support.tiny_models import TINY

DELETE, SPLIT = 7, 8


@partial(jax.jit, static_argnums=0)
def decide(rule: InDel, ids_BN, prompt_B, logits_BNV, carry):
    """The block after a call."""
    open_BN = ids_BN == MASK
    settled_BN = ~open_BN & (jnp.arange(ids_BN.shape[1]) >= prompt_B[:, None])
    facts = {"ids_BN": ids_BN, "open_BN": open_BN, "settled_BN": settled_BN}
    seen = view([True] * ids_BN.shape[1], logits=logits_BNV, **facts)
    decision, carry = rule(seen, carry)
    return decision.ids_BN, carry


class Editor:
    """A block under JointThresholdInDel, call by call."""

    def __init__(self, ids: list[int], prompt: int = 0, passes: int = 4):
        self.rule = InDel(0.5, 0.5, passes, MASK, DELETE, SPLIT)
        self.ids, self.prompt = ids, prompt
        self.carry = self.rule.start(1, len(ids), 12)

    def call(self, tokens, sharpness: float | list[float] = 9.0) -> list[int]:
        logits = tokens if not isinstance(tokens, list) else one_hot(tokens, sharpness)
        ids_BN, self.carry = decide(
            self.rule, jnp.array([self.ids]), jnp.array([self.prompt]), logits, self.carry
        )
        self.ids = ids_BN[0].tolist()
        return self.ids

    @property
    def open(self) -> bool:
        return bool(self.rule.wants(jnp.array([0]), self.carry)[0])


def test_a_deletion_moves_the_rest_and_leaves_a_mask_at_the_end():
    block = Editor([MASK] * 4)
    assert block.call([1, DELETE, 2, 3]) == [1, 2, 3, MASK]
    assert block.call([1, 2, 3, 4]) == [1, 2, 3, 4] and block.open
    assert block.call([1, 2, 3, 4]) == [1, 2, 3, 4] and not block.open


def test_a_split_puts_a_mask_before_what_stood_there_and_keeps_the_length():
    block = Editor([1, 2, 3, 4])
    assert block.call([1, SPLIT, 3, 4]) == [1, MASK, 2, 3]
    assert block.call([1, 5, 2, 3]) == [1, 5, 2, 3]


def test_the_prompt_is_neither_deleted_nor_split():
    block = Editor([1, 2, MASK, MASK], prompt=2)
    assert block.call([DELETE, SPLIT, 5, 6]) == [1, 2, 5, 6]


def test_as_many_masks_go_as_were_inserted_and_one_more():
    """One mask was inserted: two go, though only one passes the threshold."""
    block = Editor([MASK, 1, MASK, MASK])
    assert block.call([2, SPLIT, 3, 4], [9.0, 9.0, 0.3, 0.2]) == [2, MASK, 1, MASK]
    assert block.call([2, 5, 1, 4], [9.0, 9.0, 9.0, 0.1]) == [2, 5, 1, 4]


def test_the_last_call_writes_no_special_id():
    """The calls without an original mask are used up: the best ordinary token goes instead."""
    block = Editor([1, MASK], passes=1)
    logits = one_hot([1, DELETE]).at[0, 1, 4].set(5.0)
    assert block.call([1, 2]) == [1, 2]
    block.ids = [1, MASK]
    assert block.call(logits) == [1, 4]
    assert block.call([1, 4]) == [1, 4] and not block.open


def test_a_block_that_comes_back_takes_something_untried():
    """Position 0 flips between 1 and 2; seen before, it takes the best token not yet written."""
    block = Editor([1, 3], passes=8)
    third = one_hot([2, 3]).at[0, 0, 5].set(6.0)
    assert block.call([2, 3]) == [2, 3]
    assert block.call([1, 3]) == [1, 3]
    assert block.call(third) == [5, 3]


@pytest.mark.parametrize("passes", [0, 1, 4])
def test_it_ends_whatever_the_model_says(passes: int):
    block = Editor([MASK] * 4, passes=passes)
    calls = 0
    while block.open:
        block.call([[SPLIT, 1, DELETE, MASK], [2, SPLIT, MASK, 3]][calls % 2])
        calls += 1
        assert calls <= 4 + passes + 2
    assert not {MASK, DELETE, SPLIT} & set(block.ids)


def speculated(
    draft: list[int],
    verifier: list[int],
    weight: float = 0.0,
    ids: list[int] | None = None,
) -> list[int]:
    """The columns after a call; the verifier's logits are a little sharper."""
    calls = []

    def judge(drafts_BN, cache):
        calls.append(drafts_BN.tolist())
        return one_hot(verifier, 12.0), cache + 1

    ids = ids or [MASK] * len(draft)
    seen = canvas_view(ids, 0, one_hot(draft), verify=Verify(VOCAB, judge))
    decision, carry = Speculate((MASK,), weight)(seen, {"verifier": 0})
    assert carry["verifier"] == 1  # asked once; the draft completes what stands already
    assert calls == [[[d if i == MASK else i for d, i in zip(draft, ids, strict=True)]]]
    return decision.ids_BN[0].tolist()


def test_the_longest_agreed_prefix_is_kept():
    assert speculated([1, 2, 3, 4], [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert speculated([1, 2, 3, 4], [1, 2, 5, 4]) == [1, 2, MASK, MASK]


def test_the_first_mask_always_goes_and_counts_as_agreed():
    assert speculated([1, 2, 3, 4], [5, 2, 3, 6]) == [1, 2, 3, MASK]
    assert speculated([1, 2, 3], [5, 6, 7], ids=[4, MASK, MASK]) == [4, 2, MASK]


def test_the_weight_mixes_both_models():
    assert speculated([1, 2, 3], [4, 5, 6], weight=1.0) == [1, 2, 3]
    assert speculated([1, 2, 3], [4, 5, 6], weight=0.5) == [1, MASK, MASK]  # 4.5 against 6
    assert speculated([1, 2, 3], [4, 5, 6], weight=0.6) == [1, 2, 3]  # 5.4 against 4.8


def test_draft_and_target_share_their_noise_unless_told_otherwise():
    """Noise that makes the draft token 6 makes the target 6 too; a greedy target keeps 1."""
    u = jnp.full((1, 3, VOCAB), 0.5).at[:, :, 6].set(1 - 1e-7)
    noise = {"noise": 2.0}

    def run(**facts) -> list[int]:
        logits = one_hot([1, 1, 1])
        judge = Verify(VOCAB, lambda drafts, cache: (logits, cache))
        seen = canvas_view([MASK] * 3, 0, logits, verify=judge, draw=lambda shape: u)
        return (
            Speculate((MASK,), 0.5, **noise, **facts)(seen, {"verifier": 0})[0].ids_BN[0].tolist()
        )

    assert run() == [6, 6, 6]
    assert run(greedy_target=True) == [6, MASK, MASK]


def test_only_ids_that_both_models_know_are_drawn():
    logits = one_hot([8, 8]).at[0, :, 2].set(3.0)
    judge = Verify(6, lambda drafts, cache: (one_hot([2, 2]), cache))
    seen = canvas_view([MASK, MASK], 0, logits, verify=judge)
    decision, _ = Speculate((MASK,), 0.5)(seen, {"verifier": 0})
    assert decision.ids_BN[0].tolist() == [2, 2]


def filtered(row: np.ndarray, top_p: float | None, top_k: int | None) -> np.ndarray:
    """A position's logits with only the likeliest: top_p with the one over the line, then top_k."""
    order = np.argsort(-row, kind="stable")
    if top_p is not None:
        p = np.exp(row - row.max())[order]
        over = np.cumsum(p / p.sum()) > top_p
        row[order[1:][over[:-1]]] = -1e30
    if top_k is not None:
        row[order[top_k:]] = -1e30
    return row


def plain_speculation(
    draft: np.ndarray, verifier: np.ndarray, u: np.ndarray, weight: float, copied: bool, facts: Any
) -> list[int]:
    """The longest agreed prefix, then masks; apd's own, or with both sides drawn alike."""
    heat, divides = facts.get("temperature", 0.0), facts["sampling"] == "categorical"

    def drawn(logits: np.ndarray) -> np.ndarray:
        logits = logits / heat if heat and divides else logits.copy()
        logits = np.stack([filtered(row, facts.get("top_p"), facts.get("top_k")) for row in logits])
        scale = 1.0 if heat and divides and not copied else heat
        return (logits - scale * np.log(-np.log(u)))[:, :MASK].argmax(-1)

    mixed = weight * draft + (1 - weight) * verifier
    target = mixed[:, :MASK].argmax(-1) if copied else drawn(mixed)
    tokens = drawn(draft).tolist()
    agreed = [i == 0 or t == d for i, (t, d) in enumerate(zip(target, tokens, strict=True))]
    count = agreed.index(False) if False in agreed else len(tokens)
    return tokens[:count] + [MASK] * (len(tokens) - count)


@pytest.mark.parametrize("parity", ["none", "apd"])
@pytest.mark.parametrize(
    "facts",
    [
        {"sampling": "categorical", "temperature": 0.4},
        {"sampling": "categorical", "temperature": 1.7, "top_p": 0.7},
        {"sampling": "categorical", "temperature": 0.6, "top_p": 0.9, "top_k": 3},
        {"sampling": "gumbel", "temperature": 0.7, "top_k": 4},
        {"sampling": "categorical", "top_p": 0.5},
    ],
    ids=str,
)
def test_speculation_at_a_temperature_equals_its_twin(parity: Any, facts: dict[str, Any]):
    """The verifier is mixed with logits as they are, whatever the draft was drawn from."""
    model = dataclasses.replace(TINY, vocab=VOCAB, mask_id=MASK, eos_id=8, pad_id=8, stop_ids=(8,))
    config = DecodeConfig(rule="verify", verify=decode.Verify(0.6), parity=parity, **facts)
    rule = make_setup(config.resolve(model=model), model).unmask
    lengths = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        draft = rng.normal(0, 2, (5, VOCAB))
        verifier = draft + rng.normal(0, 1, (5, VOCAB))
        draft[:, MASK] = verifier[:, MASK] = -9.0
        u = rng.uniform(size=(5, VOCAB))
        judge = Verify(VOCAB, lambda ids, cache, v=verifier: (jnp.array(v, jnp.float32)[None], 0))
        drawn = jnp.array(u, jnp.float32)[None]
        logits = jnp.array(draft, jnp.float32)[None]
        seen = canvas_view([MASK] * 5, 0, logits, verify=judge, draw=lambda shape, u=drawn: u)
        ours = rule(seen, {"verifier": 0})[0].ids_BN[0].tolist()
        expected = plain_speculation(draft, verifier, u, 0.6, parity == "apd", facts)
        assert ours == expected
        lengths.add(expected.index(MASK) if MASK in expected else 5)
    assert len(lengths) > 2


def test_a_temperature_of_apd_divides_the_logits_and_scales_the_noise():
    """Of its leftright too; everywhere else, dividing, it leaves the noise alone."""
    rng = np.random.default_rng(0)
    logits, u = rng.normal(0, 2, (6, VOCAB)), rng.uniform(size=(6, VOCAB))
    model = dataclasses.replace(TINY, vocab=VOCAB, mask_id=MASK)
    seen = canvas_view(
        [MASK] * 6, 0, jnp.array(logits, jnp.float32)[None], quota=6,
        draw=lambda shape: jnp.array(u, jnp.float32)[None],
    )  # fmt: skip
    options: dict[str, Any] = {"rule": "quota", "remasking": "leftright", "tokens_per_step": 6}
    cases: list[tuple[Any, float]] = [("apd", 0.3), ("none", 1.0)]
    found = []
    for parity, scale in cases:
        config = DecodeConfig(
            sampling="categorical", temperature=0.3, parity=parity, cache="none", **options
        ).resolve(model=model)
        tokens = make_setup(config, model).unmask(seen, {})[0].ids_BN[0].tolist()
        noisy = logits / 0.3 - scale * np.log(-np.log(u))
        assert tokens == noisy[:, :MASK].argmax(-1).tolist()
        found.append(tokens)
    assert found[0] != found[1]
