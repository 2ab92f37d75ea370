"""Rows: where canvases end, padding, packing, and the order of batches."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jdllm.model.config import NAMED
from jdllm.runtime import sharding
from jdllm.train.objective import HIDDEN
from jdllm.training.encode import Texts
from jdllm.training.rows import (
    Layout,
    Order,
    Padding,
    choose_padding,
    make_rows,
    pack,
    parse_padding,
)

EOS = Padding((9,))
CONFIG = NAMED["bundled"]


def texts_of(*pairs: tuple[int, int], end: int = 8) -> Texts:
    """Examples of so many prompt columns (ids 1) and answer columns (ids 2, then an end)."""
    ids = [[1] * p + [2] * (a - 1) + [end] for p, a in pairs]
    learned = [[False] * p + [True] * a for p, a in pairs]
    offsets = np.cumsum([0, *map(len, ids)])
    return Texts(
        np.concatenate(ids).astype(np.uint16),
        np.concatenate(learned),
        offsets,
        np.array([p for p, _ in pairs], np.int32),
    )


def canvases(texts: Texts, layout: Layout, draw: tuple[int, ...] = (0,)):
    """All rows of one source: tokens, learned and example numbers."""
    rows = make_rows(texts, layout, [len(texts.answers)])
    return rows.canvases(*rows.spans(np.arange(len(rows)), draw))


# Canvases


def test_rows_fill_the_canvas_with_learned_padding():
    tokens, learned, example = canvases(texts_of((2, 2), (1, 5)), Layout(8, EOS))
    assert tokens.tolist() == [[1, 1, 2, 8, 9, 9, 9, 9], [1, 2, 2, 2, 2, 8, 9, 9]]
    assert learned.tolist() == [[False] * 2 + [True] * 6, [False] + [True] * 7]
    assert example.tolist() == [[0] * 8, [1] * 8]


def test_response_length_ends_a_canvas_after_its_prompt():
    tokens, learned, example = canvases(texts_of((2, 2), (6, 2)), Layout(8, EOS, 3))
    assert tokens.tolist() == [[1, 1, 2, 8, 9, 0, 0, 0], [1] * 6 + [2, 8]]
    assert learned[0].tolist() == [False, False, True, True, True, False, False, False]
    assert example[0].tolist() == [0] * 5 + [HIDDEN] * 3


def test_padded_canvases_end_with_a_whole_block():
    """A block-causal model decodes whole blocks; what ends at its text is not padded up."""
    layout = Layout(10, EOS, 3, block=4)
    _, learned, example = canvases(texts_of((2, 2), (6, 2)), layout)
    assert np.sum(example >= 0, axis=1).tolist() == [8, 10] and learned[0, 4:8].all()
    _, _, example = canvases(
        texts_of((2, 2), (6, 2)), dataclasses.replace(layout, padding=Padding(()))
    )
    assert np.sum(example >= 0, axis=1).tolist() == [4, 8]
    rows = make_rows(texts_of((2, 3), (1, 9)), Layout(64, EOS, block=12, longest=True), [2])
    _, end, width = rows.spans(np.array([0, 1]), (0,))
    assert width == 12 and end.ravel().tolist() == [12, 12]


def test_without_padding_a_canvas_ends_with_its_text():
    tokens, learned, example = canvases(texts_of((2, 2), (1, 5)), Layout(8, Padding(())))
    assert tokens[0].tolist() == [1, 1, 2, 8, 0, 0, 0, 0]
    assert np.sum(example >= 0, axis=1).tolist() == [4, 6] == (learned.sum(1) + [2, 1]).tolist()


def test_rainbow_padding_is_an_eos_and_then_a_cycle():
    layout = Layout(10, Padding((5, 6, 7), first=9))
    tokens, learned, _ = canvases(texts_of((1, 3)), layout)
    assert tokens[0].tolist() == [1, 2, 2, 8, 9, 5, 6, 7, 5, 6] and learned[0, 1:].all()
    ended, _, _ = canvases(texts_of((1, 3), end=9), layout)  # it has its eos already
    assert ended[0].tolist() == [1, 2, 2, 9, 5, 6, 7, 5, 6, 7]


def test_padding_is_chosen_from_unused_ids():
    assert choose_padding("none", CONFIG, 500) == Padding(())
    assert choose_padding("eos", CONFIG, 500) == Padding((CONFIG.pad_id,))
    found = choose_padding("rainbow:3", CONFIG, CONFIG.vocab - 4)
    assert found == Padding(tuple(range(CONFIG.vocab - 4, CONFIG.vocab - 1)), CONFIG.eos_id)
    with pytest.raises(ValueError, match="needs 7 ids .* this model has 4: use rainbow:4"):
        choose_padding("rainbow", CONFIG, CONFIG.vocab - 4)
    for wrong in ("rainbow:0", "rainbow:x", "eos:2", "pad"):
        with pytest.raises(ValueError, match="must be eos, none or rainbow:K"):
            parse_padding(wrong)


def test_grouped_batches_end_with_their_longest():
    layout = Layout(64, EOS, longest=True)
    rows = make_rows(texts_of((2, 3), (1, 9), (4, 30)), layout, [3])
    _, end, width = rows.spans(np.array([0, 1]), (0,))
    assert width == 16 and end.ravel().tolist() == [16, 16]
    _, end, width = rows.spans(np.array([0, 2]), (0,))
    assert width == 40 and end.ravel().tolist() == [40, 40]


def test_cutoff_ends_all_responses_with_that_of_one_row():
    texts, layout = texts_of((2, 2), (1, 5), (3, 4)), Layout(9, EOS, cutoff=True)
    seen = collections.Counter()
    for step in range(30):
        tokens, learned, example = canvases(texts, layout, (0, step))
        lengths = learned.sum(1)
        assert len(set(lengths)) == 1
        seen[int(lengths[0])] += 1
        again, _, _ = canvases(texts, layout, (0, step))
        np.testing.assert_array_equal(tokens, again)
    assert set(seen) == {2, 5, 4}
    assert (np.sum(example >= 0, axis=1) - learned.sum(1)).tolist() == [2, 1, 3]


# Packing


def test_packed_rows_hold_whole_examples():
    pairs = ((2, 3), (1, 2), (3, 4), (1, 1), (2, 6))
    texts = texts_of(*pairs)
    tokens, learned, example = canvases(texts, Layout(10, EOS, packing=True))
    assert sorted(np.unique(example[example >= 0]).tolist()) == [0, 1, 2, 3, 4]
    for number, (prompt, answer) in enumerate(pairs):
        (row,) = np.flatnonzero((example == number).any(1))
        where = np.flatnonzero(example[row] == number)
        assert len(where) == prompt + answer and (np.diff(where) == 1).all()
        assert tokens[row, where].tolist() == [1] * prompt + [2] * (answer - 1) + [8]
        assert learned[row, where].tolist() == [False] * prompt + [True] * answer
    assert not learned[example < 0].any()


def test_packed_examples_are_padded_to_whole_blocks():
    _, learned, example = canvases(texts_of((2, 3), (1, 2)), Layout(16, EOS, packing=True, block=4))
    assert example[0].tolist() == [0] * 8 + [1] * 4 + [HIDDEN] * 4
    assert learned[0, 5:8].all()
    bare = Layout(16, Padding(()), packing=True, block=4)
    _, _, example = canvases(texts_of((2, 3), (1, 2)), bare)
    assert np.count_nonzero(example >= 0) == 8


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_packing_loses_nothing(sizes):
    rows = pack(np.array(sizes), 20)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 20 for row in rows)
    assert len(rows) <= 2 * -(-sum(sizes) // 20)


def test_a_packed_batch_is_placed_like_its_rows():
    texts = texts_of((2, 3), (1, 2), (3, 4), (1, 1), (2, 6), (4, 5))
    rows = make_rows(texts, Layout(10, EOS, packing=True), [6])
    index = np.arange(len(rows))[: 2 * (len(rows) // 2)].reshape(1, -1)
    by_row = NamedSharding(sharding.parse_mesh("2x1"), PartitionSpec(None, "data"))
    batch = rows.place(index, np.zeros_like(index), by_row)
    tokens, learned, example = rows.canvases(*rows.spans(index[0], (0,)))
    assert batch.packed
    np.testing.assert_array_equal(batch.tokens[0], tokens)
    np.testing.assert_array_equal(batch.learned[0], learned)
    np.testing.assert_array_equal(batch.example[0], example)


def test_rows_are_placed_where_they_are_needed():
    """Rows of two micro-batches over two devices of the data axis and two others."""
    rows = make_rows(texts_of((2, 2), (1, 5), (3, 1)), Layout(8, EOS), [3])
    index, visit = np.array([[0, 2], [1, 1]]), np.array([[0, 0], [0, 1]])
    by_row = NamedSharding(sharding.parse_mesh("2x2"), PartitionSpec(None, "data"))
    batch = rows.place(index, visit, by_row)
    tokens, learned, example = rows.canvases(*rows.spans(np.arange(3), (0,)))
    for ours, stored in (
        (batch.tokens, tokens), (batch.learned, learned), (batch.example, example),
        (batch.visit, None),
    ):  # fmt: skip
        np.testing.assert_array_equal(ours, visit if stored is None else stored[index])
        assert {part.data.shape[1] for part in ours.addressable_shards} == {1}


# The order of batches


def taken(order: Order, steps: range) -> np.ndarray:
    return np.concatenate([np.stack(order.at(step)) for step in steps], axis=1)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_an_epoch_is_a_permutation(rows, size, seed):
    order = Order((rows,), size, seed)
    for epoch in range(2):
        index, visit = taken(order, range(epoch * order.steps, (epoch + 1) * order.steps))
        assert len(index) == order.steps * size and index.min() >= 0 and index.max() < rows
        counts = np.bincount(index, minlength=rows)
        if rows >= size:
            assert counts.max() == 1 and counts.sum() == rows - rows % size
            assert set(visit) == {epoch}
        else:  # goes on in the rows, each as often as any other
            assert len(set(zip(index, visit, strict=True))) == len(index)
            all_counts = np.bincount(taken(order, range(epoch + 1))[0], minlength=rows)
            assert all_counts.max() - all_counts.min() <= 1


def test_batches_are_a_function_of_the_step():
    order = Order((20,), 6, 0)
    forward = {step: order.at(step)[0].tolist() for step in range(12)}
    backward = {step: order.at(step)[0].tolist() for step in reversed(range(12))}
    assert forward == backward
    assert forward[0] != forward[3] != forward[6]  # another epoch, another order
    assert forward[0] != Order((20,), 6, 1).at(0)[0].tolist()


def test_shares_are_kept_and_a_large_source_is_gone_through():
    """3 : 1 of 90 and 10 rows: 30 and 10 per epoch, another third of the large one each time."""
    order = Order((90, 10), 8, 0, shares=(3.0, 1.0))
    assert order.taken == (30, 10) and order.steps == 5
    large = []
    for epoch in range(3):
        index, visit = taken(order, range(5 * epoch, 5 * epoch + 5))
        small = index >= 90
        assert sorted(index[small]) == list(range(90, 100)) and set(visit[small]) == {epoch}
        assert set(visit[~small]) == {0}
        assert 0 < small[:20].sum() < 10  # mixed
        large += index[~small].tolist()
    assert sorted(large) == list(range(90))


def test_without_shares_every_row_of_all_sources_is_taken():
    order = Order((5, 7), 4, 0)
    index, _ = taken(order, range(3))
    assert sorted(index) == list(range(12))


def test_grouped_batches_are_of_alike_lengths():
    lengths = np.random.default_rng(0).integers(1, 100, 400)
    plain = Order((400,), 8, 0)
    grouped = dataclasses.replace(plain, lengths=lengths)
    found, _ = taken(grouped, range(50))
    assert sorted(found) == list(range(400))
    spread = np.ptp(lengths[found].reshape(-1, 8), axis=1).mean()
    loose = np.ptp(lengths[taken(plain, range(50))[0]].reshape(-1, 8), axis=1).mean()
    assert spread < loose / 10
    means = lengths[found].reshape(-1, 8).mean(1)
    assert (np.diff(means) < 0).any()  # batches come in any order
