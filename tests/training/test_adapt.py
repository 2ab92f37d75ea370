"""Causal models made diffusion models, blocks with levels of their own, and self-distillation."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdllm import LLM, DecodeConfig
from jdllm.load import BUNDLED
from jdllm.model.config import NAMED, NO_ID
from jdllm.model.lora import Factors, LoraConfig
from jdllm.model.mask import Mask
from jdllm.model.model import Model
from jdllm.runtime import sharding
from jdllm.store import checkpoint
from jdllm.tokenizer import copy_tokenizer, load_tokenizer
from jdllm.train import objective as objectives
from jdllm.train.objective import OBJECTIVES, Batch, Noisy
from jdllm.train.optimiser import Recipe
from jdllm.train.step import beside
from jdllm.training import run
from jdllm.training.adapt import AdaptArgs
from jdllm.training.config import SFTConfig
from jdllm.training.data import conversation, parse_gap, without_reasoning
from jdllm.training.encode import encode_examples

pytestmark = pytest.mark.slow

PLAIN = dataclasses.replace(
    NAMED["tiny"],
    layers=2, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=48, vocab=64, max_length=64,
    mask_id=63, eos_id=62, pad_id=62, stop_ids=(62, 61), causal=True,
)  # fmt: skip
KEY = jax.random.key(5)
BASE = dataclasses.replace(
    NAMED["bundled"],
    layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=48, max_length=128, dtype="float32",
)  # fmt: skip


def model_of(**adapt: Any) -> Model:
    """Random weights under the facts of an adapted model."""
    config = AdaptArgs(mask_id=63, **adapt).applied(PLAIN)
    return checkpoint.random_model(config, sharding.parse_mesh("1x1"), seed=1)


def batch_of(prompts: list[int], length: int, columns: int) -> Batch:
    """One document per row, all of one length, behind prompts of these sizes."""
    shape = len(prompts), columns
    rng = np.random.default_rng(0)
    inside = np.broadcast_to(np.arange(columns) < length, shape)
    learned = inside & (np.arange(columns) >= np.array(prompts)[:, None])
    example = np.where(inside, np.arange(len(prompts))[:, None], objectives.HIDDEN)
    arrays = (rng.integers(0, 60, shape), learned, example)
    tokens, learned, example = (jnp.asarray(x) for x in arrays)
    visit = jnp.zeros(len(prompts), jnp.int32)
    return Batch(tokens.astype(jnp.int32), learned, example.astype(jnp.int32), visit)


def logits_of(model: Model, tokens: jax.Array, mask: Mask) -> jax.Array:
    """Logits of one row [T, V]."""
    columns = jnp.arange(len(tokens))[None]
    return model.logits(model(model.embed(tokens[None]), columns, mask).hidden)[0]


# The facts of an adapted model


@pytest.mark.parametrize(
    ("adapt", "facts"),
    [
        ({"sees": "full"}, (False, None, "adapted")),
        ({"sees": "full", "shift": True}, (True, None, "dream")),
        ({"sees": "blocks", "block": 4, "shift": True}, (True, 4, "adapted")),
    ],
)
def test_a_causal_model_becomes_another(adapt, facts):
    found = AdaptArgs(mask_id=63, **adapt).applied(PLAIN)
    assert not found.causal and found.mask_id == 63
    assert (found.shift_logits, found.block_causal, found.family) == facts


@pytest.mark.parametrize(
    ("adapt", "rule"),
    [
        ({"block": 4}, "adapt.block does nothing without adapt.sees"),
        ({"sees": "full"}, "needs adapt.mask_id="),
        ({"sees": "blocks", "mask_id": 1, "anneal": 9}, "anneal=9 .* with adapt.sees=full"),
        ({"sees": "blocks", "mask_id": 1, "block": 0}, "block=0 must be at least 1"),
    ],
)
def test_impossible_adaptations_are_refused(adapt, rule):
    with pytest.raises(ValueError, match=rule):
        AdaptArgs(**adapt)


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="mask_id=64 must be one of the 64 ids"):
        AdaptArgs(sees="full", mask_id=64).applied(PLAIN)
    with pytest.raises(ValueError, match="is for causal models"):
        AdaptArgs(sees="full", mask_id=63).applied(NAMED["tiny"])
    words: Any = dict(output=Path("x"), task="sudoku")
    with pytest.raises(ValueError, match="which an adapter cannot carry"):
        SFTConfig(**words, adapt=AdaptArgs(sees="full", mask_id=1), lora=LoraConfig(rank=2))
    with pytest.raises(ValueError, match="need each other"):
        SFTConfig(**words, objective="distil")
    with pytest.raises(ValueError, match="set lora.rank="):
        SFTConfig(**words, objective="distil", hidden_reasoning="2:3")


# Sight that is annealed


@pytest.mark.parametrize("step", [0, 5, 10, None])
def test_later_columns_come_into_sight(step):
    """Causal at first, everything at last; between, what attention is told, number by number."""
    model = model_of(sees="full")
    objective = dataclasses.replace(OBJECTIVES["llada"], anneal=10)
    noisy = objectives.corrupt(objective, KEY, batch_of([2, 3], 12, 12), 63)
    at = None if step is None else jnp.int32(step)
    found = model.logits(objectives.predict(objective, model, noisy, step=at))
    share = 1.0 if step is None else step / 10
    for row in range(2):
        key = jax.random.fold_in(noisy.dropout[row], objectives.SIGHT)
        drawn = np.asarray(jax.random.uniform(key, (12, 12))) < share
        seen = np.array([[s <= t or bool(drawn[t, s]) for s in range(12)] for t in range(12)])
        mask = Mask(jnp.array([12]), kind="causal", also=jnp.array(seen & drawn)[None])
        np.testing.assert_array_equal(mask.resolve(jnp.arange(12)[None])[0], seen)
        expected = logits_of(model, noisy.tokens[row], mask)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    plain = Mask(jnp.array([12]), kind="causal") if step == 0 else Mask(jnp.array([12]))
    if step != 5:
        expected = logits_of(model, noisy.tokens[0], plain)
        np.testing.assert_allclose(found[0], expected, atol=1e-5)


# Blocks with levels of their own: Fast-dLLM v2


def test_every_block_draws_its_own_level():
    batch = batch_of([0] * 64, 64, 64)
    objective = dataclasses.replace(OBJECTIVES["fast-dllm-v2"], block=16, complementary=False)
    levels = np.asarray(objectives.draws(KEY, batch, 16)[0]).reshape(64, 4, 16)
    assert (levels == levels[..., :1]).all() and len(np.unique(levels[..., 0])) == 64 * 4
    masked = np.asarray(objectives.corrupt(objective, KEY, batch, 63).masked).reshape(64, 4, 16)
    t = 1e-3 + (1 - 1e-3) * levels[..., 0]
    np.testing.assert_allclose(masked.mean(-1), t, atol=4.5 * 0.5 / 4)
    agreement: Any = np.corrcoef(masked.mean(-1).T)
    assert abs(agreement[0, 1]) < 0.5  # blocks of a row do not agree
    cut = jax.tree.map(lambda x: x[:, :32] if x.ndim > 1 else x, batch)
    np.testing.assert_array_equal(objectives.draws(KEY, cut, 16)[0], levels.reshape(64, 64)[:, :32])


def plain_blocks(model: Model, noisy: Noisy, length: int, size: int) -> tuple[float, int]:
    """Row by row and block by block, each noisy block behind the clean ones; then the shift."""
    total, count = 0.0, 0
    for row in range(len(noisy.tokens)):
        logits = []
        for start in range(0, length, size):
            end = min(start + size, length)
            canvas = jnp.concatenate([noisy.targets[row, :start], noisy.tokens[row, start:end]])
            mask = Mask(jnp.array([end]), kind="blocks", size=size)
            logits.append(logits_of(model, canvas, mask)[start:])
        whole = jnp.concatenate(logits)
        nll = optax.softmax_cross_entropy_with_integer_labels(
            jnp.concatenate([whole[:1], whole[:-1]]), noisy.targets[row, :length]
        )
        masked = noisy.masked[row, :length]
        total, count = total + float(jnp.sum(nll * masked)), count + int(masked.sum())
    return total, count


@pytest.mark.parametrize("length", [12, 11])
def test_fast_dllm_v2_is_the_mean_over_pairs_of_shifted_blocks(length):
    model = model_of(sees="blocks", block=4, shift=True)
    objective = objectives.choose("fast-dllm-v2", model.config)
    assert objective.block == 4
    batch = batch_of([3, 4], length, 12)
    noisy = objectives.corrupt(objective, KEY, batch, 63)
    np.testing.assert_array_equal(noisy.masked[::2] ^ noisy.masked[1::2], batch.learned)
    total, count = plain_blocks(model, noisy, length, 4)
    assert count == int(batch.learned.sum()) == float(noisy.counts.sum())
    found = objectives.losses(objective, model, noisy)
    np.testing.assert_allclose(found, (total, total), rtol=1e-5)


# Self-distillation


def distilled(model: Model, batch: Batch) -> tuple[float, int]:
    """Column by column in float64: the teacher sees all but the gap, the student no response."""
    total, count, teacher = 0.0, 0, dataclasses.replace(model, adapter=None)
    for row in range(len(batch.tokens)):
        learned = np.asarray(batch.learned[row])
        size = int((np.asarray(batch.example[row]) != objectives.HIDDEN).sum())
        canvas = np.asarray(batch.tokens[row])
        hidden = np.where(learned, 63, canvas)
        mask = Mask(jnp.array([size]))
        pair = [
            np.asarray(logits_of(kind, jnp.array(tokens), mask), float)
            for kind, tokens in ((teacher, canvas), (model, hidden))
        ]
        given, found = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in pair)
        for t in np.flatnonzero(learned & (canvas == 63)):
            total += float((np.exp(given[t]) * (given[t] - found[t])).sum())
            count += 1
    return total, count


def test_the_teacher_sees_the_answer_and_the_student_does_not(monkeypatch):
    model = model_of(sees="full")
    rng = np.random.default_rng(2)
    a, b = (jnp.array(rng.normal(size=s), jnp.float32) for s in ((32, 3), (3, 2, 16)))
    factors = {"layers.0.attention.q": Factors(a, b, 0.5)}
    batch = batch_of([3, 5], 16, 18)
    gap = (jnp.arange(18) >= 6) & (jnp.arange(18) < 11)
    batch = dataclasses.replace(batch, tokens=jnp.where(gap, 63, batch.tokens))
    objective = OBJECTIVES["distil"]
    noisy = objectives.corrupt(objective, KEY, batch, 63)

    def loss(factors: Any) -> Any:
        return objectives.losses(objective, beside(factors, model), noisy)[0]

    total, count = distilled(beside(factors, model), batch)
    assert count == 10 == float(noisy.counts.sum())
    found, slope = jax.value_and_grad(loss)(factors)
    np.testing.assert_allclose(found, total, rtol=1e-4)
    direction = jnp.array(rng.normal(size=b.shape), jnp.float32)

    def moved(by: float) -> float:
        changed = {"layers.0.attention.q": Factors(a, b + by * direction, 0.5)}
        return distilled(beside(changed, model), batch)[0]

    expected = (moved(1e-2) - moved(-1e-2)) / 2e-2
    along = jnp.sum(slope["layers.0.attention.q"].b * direction)
    np.testing.assert_allclose(along, expected, rtol=1e-2)
    same = {"layers.0.attention.q": Factors(a, jnp.zeros_like(b), 0.5)}
    assert float(loss(same)) > 0.01  # without factors they differ by what they see alone


def test_a_reasoning_is_replaced_by_masks():
    example = without_reasoning(conversation("2 + 2?", "Two and two.\n#### 4"))
    assert example[1]["content"] == "</reasoning>\n<answer>4</answer>"
    assert example[0]["content"].endswith("2 + 2?")
    assert parse_gap("3:5") == (3, 5)
    for wrong in ("3", "5:3", "0:2", "a:b"):
        with pytest.raises(ValueError, match="two rising numbers of columns: 128:256"):
            parse_gap(wrong)
    for other in ("text", conversation("a", "no result"), conversation("a", "#### ")):
        with pytest.raises(ValueError, match="answers end in '#### '"):
            without_reasoning(other)
    tokenizer = load_tokenizer(BUNDLED)
    examples = [conversation(f"{k} + 1?", f"so\n#### {k + 1}") for k in range(30)]
    texts = encode_examples(tokenizer, examples, BASE, 128, gap=(3, 5))
    sizes = set()
    for k in range(30):
        ids = texts.ids[texts.offsets[k] : texts.offsets[k + 1]]
        masks = np.flatnonzero(ids == BASE.mask_id)
        assert masks[0] == texts.answers[k] and (np.diff(masks) == 1).all()
        sizes.add(len(masks))
        assert texts.learned[texts.offsets[k] + masks].all()
    assert sizes == {3, 4, 5}


# Whole runs


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    """A run that made a model of shifted blocks of a causal one."""
    tmp_path = tmp_path_factory.mktemp("adapted")
    base = dataclasses.replace(BASE, causal=True, mask_id=NO_ID)
    checkpoint.save_model(
        tmp_path / "base", checkpoint.random_model(base, sharding.parse_mesh("1x1"), 0)
    )
    copy_tokenizer(BUNDLED, tmp_path / "base")
    adapt = AdaptArgs(sees="blocks", block=8, shift=True, mask_id=BASE.mask_id)
    config = SFTConfig(
        output=tmp_path / "run", model=str(tmp_path / "base"), task="sudoku", examples=8, length=96,
        batch=4, objective="fast-dllm-v2", recipe=Recipe(steps=2, learning_rate=1e-3), mesh="1x1",
        log_every=1, adapt=adapt,
    )  # fmt: skip
    run.fine_tune(config)
    return config.output


def test_a_causal_model_is_trained_and_saved(adapted):
    rows = (adapted / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(row)["loss"]) for row in rows)
    found = checkpoint.read_config(adapted / "model")
    assert (found.block_causal, found.shift_logits, found.causal) == (8, True, False)


@pytest.mark.slow
def test_the_cache_of_shifted_blocks_is_exact(adapted):
    llm = LLM.load(str(adapted / "model"))
    prompts = [[5, 6, 7], [9] * 11]
    exact = DecodeConfig(gen_length=16, block_length=8, cache="none", threshold=0.5)
    cached = dataclasses.replace(exact, cache="block")
    one, two = (llm.generate(prompts, decode) for decode in (exact, cached))
    assert [c.ids for c in one] == [c.ids for c in two]


def test_distillation_runs_on_results_alone(tmp_path):
    model = checkpoint.random_model(BASE, sharding.parse_mesh("1x1"), 0)
    checkpoint.save_model(tmp_path / "base", model)
    copy_tokenizer(BUNDLED, tmp_path / "base")
    rows = [{"question": f"{k}+1", "answer": f"#### {k + 1}"} for k in range(8)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = SFTConfig(
        output=tmp_path / "run", model=str(tmp_path / "base"), data=str(tmp_path / "own.jsonl"),
        length=128, batch=4, objective="distil", hidden_reasoning="4:6", padding="none",
        recipe=Recipe(steps=2, learning_rate=1e-2), mesh="1x1", log_every=1,
        lora=LoraConfig(rank=2, targets="q,v"),
    )  # fmt: skip
    run.fine_tune(config)
    first, last = (
        json.loads(row) for row in (config.output / "metrics.jsonl").read_text().splitlines()
    )
    assert first["loss"] > 0 and last["loss"] > 0
    assert (config.output / "adapter" / "adapter_model.safetensors").exists()
