"""Cross entropy in chunks, with the head trained and with it frozen, against all logits at once."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.model.config import NAMED
from jdllm.model.lora import Adapter
from jdllm.runtime import sharding
from jdllm.store.checkpoint import random_model
from jdllm.train import entropy, objective
from tests.support.batches import batch_of

CONFIG = dataclasses.replace(
    NAMED["tiny"],
    layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=48, vocab=64, max_length=64,
    mask_id=63, eos_id=62, pad_id=62, stop_ids=(62, 61),
)  # fmt: skip
KEY = jax.random.key(7)
ROWS, COLUMNS = 3, 24


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, sharding.parse_mesh("1x1"), 0)


def limit(monkeypatch: pytest.MonkeyPatch, columns: float) -> None:
    """So many columns have logits at once."""
    monkeypatch.setattr(entropy, "LOGIT_BYTES", int(ROWS * columns * CONFIG.vocab * 4))


def draw(seed: int, share: float) -> tuple[jax.Array, Any]:
    """Hidden states, and a batch of which about this share of columns is masked."""
    rng = np.random.default_rng(seed)
    shape = ROWS, COLUMNS
    tokens = jnp.asarray(rng.integers(0, 60, shape), jnp.int32)
    masked = jnp.asarray(rng.random(shape) < share)
    weights = jnp.asarray(rng.random(shape), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(*shape, CONFIG.embed)), jnp.float32)
    return hidden, SimpleNamespace(targets=tokens, masked=masked, weights=weights)


def plainly(model: Any, hidden: jax.Array, batch: Any, confidence: float) -> tuple[Any, Any]:
    """Both sums from all logits at once, column by column as docs/objectives.md has them."""
    logits = model.logits(hidden)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    chances = jax.nn.softmax(logits)
    doubt = -jnp.sum(chances * jnp.log(chances), axis=-1)
    right = jnp.argmax(logits, axis=-1) == batch.targets
    each = nll * batch.weights + confidence * jnp.where(right, doubt, 0.0)
    return jnp.sum(each * batch.masked), jnp.sum(nll * batch.masked)


@pytest.mark.parametrize("columns_at_once", [24, 5, 0.3])
def test_chunks_equal_the_plain_one(model, monkeypatch, columns_at_once):
    """Also where the chunk does not divide the columns, and where one column is too much."""
    limit(monkeypatch, columns_at_once)
    hidden, batch = draw(0, 1.0)

    def chunked(params, hidden):
        model_ = dataclasses.replace(model, params=params)
        nll = entropy.cross_entropy(model_, hidden, batch.targets)[..., 0]
        return jnp.sum(nll * batch.weights), nll

    def plain(params, hidden):
        logits = dataclasses.replace(model, params=params).logits(hidden)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.sum(nll * batch.weights), nll

    got, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(model.params, hidden)
        for f in (chunked, plain)
    )
    np.testing.assert_allclose(got[0][1], want[0][1], rtol=1e-5, atol=1e-6)
    for one, two in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * float(jnp.abs(two).max()))


@settings(max_examples=5, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from([24, 7, 1]),
    st.sampled_from([0.0, 0.3]),
)
def test_a_frozen_head_gives_the_same_sums_and_slopes(model, seed, share, columns, confidence):
    """Only masked columns are looked at, however many there are; a factor outside scales both."""
    hidden, batch = draw(seed, share)
    with pytest.MonkeyPatch.context() as patch:
        limit(patch, columns)

        def found(hidden):
            total, plain = entropy.over_frozen_head(confidence, model, hidden, batch)
            return 0.5 * total + plain, (total, plain)  # of which plain must not count

        (_, sums), slope = jax.value_and_grad(found, has_aux=True)(hidden)
        alone = entropy.over_frozen_head(confidence, model, hidden, batch)
    (total, plain), pull = jax.vjp(lambda h: plainly(model, h, batch, confidence), hidden)
    (expected,) = pull((jnp.float32(0.5), jnp.float32(0.0)))
    np.testing.assert_allclose(sums, (total, plain), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(alone, sums, rtol=1e-6)
    np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=2e-6)


def test_an_adapter_means_a_frozen_head(model):
    """The two paths of the objective agree: with factors that change nothing, and without."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 60, (1, ROWS, COLUMNS))
    batch = jax.tree.map(
        lambda x: x[0], batch_of(tokens, np.full((1, ROWS), 4), np.full((1, ROWS), 20))
    )
    chosen = objective.OBJECTIVES["llada"]
    noisy = objective.corrupt(chosen, KEY, batch, CONFIG.mask_id)
    adapted = dataclasses.replace(model, adapter=Adapter({}))
    one, two = (objective.losses(chosen, kind, noisy) for kind in (model, adapted))
    np.testing.assert_allclose(one, two, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_logits_array_exceeds_the_limit(model, monkeypatch, frozen):
    monkeypatch.setattr(entropy, "LOGIT_BYTES", ROWS * 6 * CONFIG.vocab * 4)
    hidden, batch = draw(1, 0.5)

    def loss(params, hidden):
        model_ = dataclasses.replace(model, params=params)
        if frozen:
            return entropy.over_frozen_head(0.0, model, hidden, batch)[0]
        return entropy.cross_entropy(model_, hidden, batch.targets).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(model.params, hidden))
    assert f"f32[{ROWS},6,{CONFIG.vocab}]" in text
    assert f"f32[{ROWS},24,{CONFIG.vocab}]" not in text
