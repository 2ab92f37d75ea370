"""Objectives: machines, families, packing. Every clever path against a plain one."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.model.cache import Cache
from jdllm.model.config import NAMED
from jdllm.model.mask import Mask
from jdllm.model.model import Model
from jdllm.runtime import sharding
from jdllm.store import checkpoint
from jdllm.train import objective as objectives
from jdllm.train import step as train
from jdllm.train.objective import HIDDEN, OBJECTIVES, Batch, Noisy, Objective
from tests.support.marks import quick

PLAIN = dataclasses.replace(
    NAMED["tiny"],
    layers=2, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=48, vocab=64, max_length=64,
    mask_id=63, eos_id=62, pad_id=62, stop_ids=(62, 61),
)  # fmt: skip
SHIFTED = dataclasses.replace(PLAIN, shift_logits=True)
BLOCKS = dataclasses.replace(PLAIN, block_causal=4)
KEY = jax.random.key(5)
SGD = optax.sgd(1.0)


def model_of(config) -> Model:
    return checkpoint.random_model(config, sharding.parse_mesh("1x1"), seed=1)


@pytest.fixture(scope="module")
def plain() -> Model:
    return model_of(PLAIN)


@pytest.fixture(scope="module")
def blocks() -> Model:
    return model_of(BLOCKS)


def document(number: int, prompt: int, response: int, seed: int | None = None) -> dict[str, Any]:
    """Columns of one example: random tokens, a prompt and a response."""
    rng = np.random.default_rng(number if seed is None else seed)
    length = prompt + response
    return {
        "tokens": rng.integers(0, 60, length).astype(np.int32),
        "learned": np.arange(length) >= prompt,
        "example": np.full(length, number, np.int32),
    }


def batch_of(rows: list[list[dict[str, Any]]], columns: int, packed: bool = False) -> Batch:
    """Rows of documents, hidden columns behind them."""
    empty = {"tokens": 0, "learned": False, "example": HIDDEN}

    def row(name: str, documents: list[dict[str, Any]]) -> np.ndarray:
        found = np.concatenate([one[name] for one in documents])
        return np.pad(found, (0, columns - len(found)), constant_values=empty[name])

    arrays = {name: jnp.asarray(np.stack([row(name, one) for one in rows])) for name in empty}
    return Batch(**arrays, visit=jnp.zeros(len(rows), jnp.int32), packed=packed)


@partial(jax.jit, static_argnames="objective")
def loss_and_gradient(params, model, batch, objective):
    """Sums over a batch, not divided, and what the divisor would be."""

    def loss(params):
        noisy = objectives.corrupt(objective, KEY, batch, model.config.mask_id)
        found = objectives.losses(objective, train.all_parameters(params, model), noisy)[0]
        return found, noisy.counts.sum()

    return jax.value_and_grad(loss, has_aux=True)(params)


corrupt = jax.jit(objectives.corrupt, static_argnums=(0, 3))
predict = jax.jit(objectives.predict, static_argnums=0)
losses = jax.jit(objectives.losses, static_argnums=0)


@jax.jit
def logits_of(model: Model, tokens, positions, mask, cache=None):
    """Whole logits, and the cache after the call."""
    out = model(model.embed(tokens), positions, mask, cache)
    return model.logits(out.hidden), out.cache


def close(a, b, rtol: float = 1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(y).max(), 1e-12))


# One loss, whatever the machine


def spread(model: Model, mesh) -> Any:
    """The parameters, copied to where they belong on the mesh."""
    leaves, tree = jax.tree.flatten(model.params)
    places = list(checkpoint.placements(model.config, mesh).values())
    return jax.tree.unflatten(tree, jax.device_put(list(map(np.asarray, leaves)), places))


def curve(model: Model, batch: Batch, objective: Objective, mesh_text: str, parts: int):
    """Losses and parameters of three updates of the whole batch, split over mesh and time."""
    mesh = sharding.parse_mesh(mesh_text)
    state = train.create_state(spread(model, mesh), SGD, mesh)
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    split, key = jax.device_put(split, rows), jax.device_put(KEY, sharding.replicated(mesh))
    found = []
    for visit in range(3):
        seen = dataclasses.replace(split, visit=split.visit + visit)
        state, metrics = train.train_step(
            state, seen, key, frozen=model, objective=objective, optimizer=SGD
        )
        found.append([float(metrics[name]) for name in ("loss", "nll", "gradient_norm")])
    return np.array(found), jax.tree.map(np.asarray, state.trained)


MACHINES = list(itertools.product(("1x1", "2x1", "1x2", "2x2"), (1, 2, 4)))
QUICK = {("plain", "2x2", 2)}


@pytest.mark.parametrize(
    ("kind", "mesh", "parts"),
    [
        pytest.param(kind, *machine, marks=() if (kind, *machine) in QUICK else pytest.mark.slow)
        for kind in ("plain", "blocks", "shifted")
        for machine in MACHINES[1:]
    ],
)
def test_the_curve_does_not_know_the_machine(request, kind, mesh, parts):
    """Rows have unequal responses, so a divisor per micro-batch or device would show."""
    config = {"plain": PLAIN, "blocks": BLOCKS, "shifted": SHIFTED}[kind]
    objective = objectives.choose("auto", config)
    rows = [[document(k, 2 + k % 5, 3 + 2 * k % 17)] for k in range(8)]
    batch, model = batch_of(rows, 24), model_of(config)
    whole, trained = curve(model, batch, objective, "1x1", 1)
    found, other = curve(model, batch, objective, mesh, parts)
    np.testing.assert_allclose(found, whole, rtol=2e-5)
    close(other, trained, rtol=1e-4)


# Families


def test_auto_follows_the_model():
    assert objectives.choose("auto", PLAIN) == OBJECTIVES["llada"]
    assert objectives.choose("auto", SHIFTED) == OBJECTIVES["dream"]
    assert objectives.choose("auto", BLOCKS) == OBJECTIVES["llada2"]
    with pytest.raises(ValueError, match="attends block by block; this one can have llada,"):
        objectives.choose("llada2", PLAIN)
    with pytest.raises(ValueError, match="causal"):
        objectives.choose("auto", dataclasses.replace(PLAIN, causal=True))


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"low": 0.5, "high": 0.4}, "must rise within"),
        ({"low": 0.0}, "must rise within"),
        ({"cart": 1.0}, "cart=1.0"),
        ({"confidence": -1.0}, "confidence=-1.0"),
    ],
)
def test_impossible_objectives_are_refused(wrong, rule):
    with pytest.raises(ValueError, match=rule):
        Objective(**wrong)


def test_cart_is_the_sum_over_what_is_seen():
    """Against the sum as it is written, within each of three documents and what is hidden."""
    p = 0.3
    objective = dataclasses.replace(OBJECTIVES["dream"], cart=p)
    batch = batch_of([[document(0, 3, 8), document(1, 1, 4), document(2, 2, 1)]], 22, packed=True)
    noisy = corrupt(objective, KEY, batch, 63, 0.6)
    masked, example = np.asarray(noisy.masked[0]), np.asarray(batch.example[0])
    assert masked.any()
    for i in np.flatnonzero(masked):
        near = [j for j in range(22) if example[j] == example[i] and not masked[j]]
        want = sum(p * (1 - p) ** (abs(i - j) - 1) for j in near) / 2
        assert noisy.weights[0, i] == pytest.approx(want, rel=1e-5)
    assert not noisy.weights[0][~masked].any()
    assert noisy.counts.sum() == masked.sum()


def test_examples_count_alike():
    """LLaDA's guidelines: a response of 4 columns weighs as much as one of 12."""
    batch = batch_of([[document(0, 2, 4), document(1, 3, 12)]], 24, packed=True)
    noisy = corrupt(OBJECTIVES["llada-examples"], KEY, batch, 63, 0.5)
    assert noisy.counts.sum() == pytest.approx(2)
    for start, end, length in ((0, 6, 4), (6, 21, 12)):
        part = noisy.weights[0, start:end][noisy.masked[0, start:end]]
        np.testing.assert_allclose(part, 1 / 0.5 / length, rtol=1e-6)


def test_shifted_models_predict_a_column_from_the_one_before():
    """With whole logits: row t - 1 predicts token t, and a document's first column itself."""
    model = model_of(SHIFTED)
    objective = dataclasses.replace(OBJECTIVES["llada"], high=0.9)
    batch = batch_of([[document(0, 0, 12)], [document(1, 4, 8)]], 12)
    noisy = corrupt(objective, KEY, batch, 63)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    logits, _ = logits_of(model, noisy.tokens, positions, Mask(jnp.full(2, 12)))
    logits = jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens)
    (found, _), _ = loss_and_gradient(model.params, model, batch, objective)
    np.testing.assert_allclose(found, jnp.sum(nll * noisy.weights), rtol=1e-5)


def clean_prefix_losses(model: Model, noisy: Noisy, length: int, size: int) -> Any:
    """K forwards: every block by itself, noisy, against a cache of the clean ones before it."""
    total, rows = 0.0, len(noisy.tokens)
    cache = Cache.zeros(model.config, rows, length, jnp.dtype(model.dtype))
    for start in range(0, length, size):
        block = slice(start, min(start + size, length))
        columns = jnp.broadcast_to(jnp.arange(length)[block], (rows, block.stop - start))
        mask = Mask(jnp.full(rows, block.stop))
        logits, _ = logits_of(model, noisy.tokens[:, block], columns, mask, cache)
        clean = noisy.targets[:, block]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, clean)
        total += jnp.sum(nll * noisy.weights[:, block])
        _, cache = logits_of(model, clean, columns, mask, cache)
        assert cache is not None
    return total


@pytest.mark.parametrize("length", [16, 15])
def test_two_streams_equal_separate_forwards(blocks, length):
    """Prompts end inside a block and at its edge; the last block is whole or partial."""
    rows = [[document(k, prompt, length - prompt)] for k, prompt in enumerate((6, 4, 1))]
    batch = batch_of(rows, 18)
    noisy = corrupt(OBJECTIVES["llada2"], KEY, batch, 63)
    assert noisy.masked.any(1).all()
    found = losses(OBJECTIVES["llada2"], blocks, noisy)[0]
    np.testing.assert_allclose(found, clean_prefix_losses(blocks, noisy, length, 4), rtol=1e-5)


def test_makers_noise_lies_in_its_band():
    rows = [[document(k, 0, 64)] for k in range(64)]
    noisy = corrupt(OBJECTIVES["llada2"], KEY, batch_of(rows, 64), 63)
    share = np.asarray(noisy.masked.mean(1))
    assert 0.1 < share.min() < 0.4 and 0.7 < share.max() < 0.95 and 0.5 < share.mean() < 0.6
    np.testing.assert_array_equal(noisy.weights, noisy.masked)


def test_complementary_masks_share_a_row_out(plain):
    """Every response column is predicted once, and the pair's loss is the sum of its two."""
    objective = dataclasses.replace(OBJECTIVES["llada"], complementary=True)
    batch = batch_of([[document(0, 3, 9)], [document(1, 2, 7)]], 12)
    pair = corrupt(objective, KEY, batch, 63)
    assert pair.tokens.shape == (4, 12)
    first, second = pair.masked[::2], pair.masked[1::2]
    np.testing.assert_array_equal(first ^ second, batch.learned)
    one = corrupt(OBJECTIVES["llada"], KEY, batch, 63)
    np.testing.assert_array_equal(first, one.masked)
    t = 1e-3 + (1 - 1e-3) * objectives.draws(KEY, batch)[0]
    rest = jnp.where(second, 1 / (1 - t), 0)
    np.testing.assert_allclose(pair.weights[1::2], rest, rtol=1e-4)
    (found, count), _ = loss_and_gradient(plain.params, plain, batch, objective)
    parts = [
        losses(objective, plain, jax.tree.map(lambda x, k=k: x[k::2], pair))[0] for k in range(2)
    ]
    np.testing.assert_allclose(found, sum(parts), rtol=1e-5)
    assert count == 2 * batch.learned.sum()


def test_confidence_adds_the_doubt_of_right_tokens(plain):
    """With whole logits; a wrong best token adds nothing. Chunks make no difference."""
    batch = batch_of([[document(k, 3, 9)] for k in range(4)], 12)
    objective = dataclasses.replace(OBJECTIVES["llada"], confidence=0.7)
    noisy = corrupt(objective, KEY, batch, 63)
    logits = plain.logits(predict(objective, plain, noisy))
    best = jnp.argmax(logits, -1)
    batch = dataclasses.replace(batch, tokens=batch.tokens.at[:, :7].set(best[:, :7]))
    noisy = corrupt(objective, KEY, batch, 63)
    chances = jax.nn.softmax(logits := plain.logits(predict(objective, plain, noisy)))
    doubt = -jnp.sum(chances * jnp.log(chances), -1)
    right = (jnp.argmax(logits, -1) == batch.tokens) & noisy.masked
    assert 0 < right.sum() < noisy.masked.sum()
    with_it, without = (losses(each, plain, noisy)[0] for each in (objective, OBJECTIVES["llada"]))
    np.testing.assert_allclose(with_it - without, 0.7 * jnp.sum(doubt * right), rtol=1e-4)


# Packing


@pytest.mark.parametrize(
    "name",
    quick(["llada", "llada2", "dream", "llada-examples", "blocks"], "llada2"),
)
def test_a_packed_row_is_the_sum_of_its_documents(name):
    """The loss, the divisor and the gradient, to 1e-5 of the largest entry."""
    model = model_of({"dream": SHIFTED, "llada2": BLOCKS, "blocks": BLOCKS}.get(name, PLAIN))
    objective = OBJECTIVES[name]
    documents = [document(3, 3, 7), document(1, 1, 6), document(2, 5, 3)]
    packed = batch_of([documents], 27, packed=True)
    alone = batch_of([[one] for one in documents], 27)
    row = loss_and_gradient(model.params, model, packed, objective)
    sums = loss_and_gradient(model.params, model, alone, objective)
    close(row, sums, rtol=1e-5)
    assert row[0][0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llada-examples", "dream", "llada2"])
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_any_packed_row_is_the_sum_of_its_documents(name, sizes):
    """Prompts of 0 to 9 columns, responses of 1 to 12: the loss to 1e-5."""
    model = model_of({"dream": SHIFTED, "llada2": BLOCKS}.get(name, PLAIN))
    documents = [document(k, *size) for k, size in enumerate(sizes)]
    nothing = {name: one[:0] for name, one in documents[0].items()}
    alone = batch_of([[one] for one in documents] + [[nothing]] * (4 - len(documents)), 84)
    packed = batch_of([documents], 84, packed=True)
    row, sums = (
        loss_and_gradient(model.params, model, batch, OBJECTIVES[name])[0]
        for batch in (packed, alone)
    )
    np.testing.assert_allclose(row, sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dream", "llada2"])
def test_documents_of_a_row_do_not_know_each_other(name):
    """Another second document, of the same length: the hidden states of the others are the same."""
    model = model_of({"dream": SHIFTED, "llada2": BLOCKS}.get(name, PLAIN))
    objective = OBJECTIVES[name]
    found = []
    for seed in (1, 9):
        documents = [document(0, 3, 7), document(1, 1, 6, seed), document(2, 5, 3)]
        batch = batch_of([documents], 27, packed=True)
        noisy = corrupt(objective, KEY, batch, 63)
        found.append(np.asarray(predict(objective, model, noisy)[0]))
    same = np.r_[0:10, 17:25]
    np.testing.assert_array_equal(found[0][same], found[1][same])
    assert (found[0][10:17] != found[1][10:17]).any()


def test_documents_have_noise_levels_of_their_own():
    documents = [document(k, 0, 40) for k in range(4)]
    noisy = corrupt(OBJECTIVES["llada"], KEY, batch_of([documents], 160, True), 63)
    levels = [np.unique(noisy.weights[0, k : k + 40]) for k in range(0, 160, 40)]
    assert all(len(each) <= 2 for each in levels)  # 0 and 1/t
    assert len({each.max() for each in levels}) == 4


# Held-out loss


def test_held_out_loss_is_fixed_and_rises_with_the_noise(plain):
    batch = batch_of([[document(k, 2, 18)] for k in range(4)], 20)
    levels = (0.2, 0.9)
    ask = partial(train.held_out, frozen=plain, objective=OBJECTIVES["llada"], levels=levels)
    parts = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), batch)
    totals, counts = ask(plain.params, parts, KEY)
    again, _ = ask(plain.params, parts, KEY)
    np.testing.assert_array_equal(totals, again)
    assert counts[0] < counts[1] <= batch.learned.sum()
    noisy = corrupt(OBJECTIVES["llada"], KEY, batch, 63, 0.9)
    assert counts[1] == noisy.masked.sum()
    np.testing.assert_allclose(totals[1], losses(OBJECTIVES["llada"], plain, noisy)[1], rtol=1e-5)
