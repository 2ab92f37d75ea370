"""Masked-diffusion training: the loss against recorded reference values, and the step's algebra.

Tolerances: two float32 sums of the same terms in another order differ by parts in 1e6 here, so
gradients are compared at rtol 1e-4 of their largest entry unless a test says otherwise.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdllm.model.config import NAMED
from jdllm.model.model import forward
from jdllm.model.transformer import Remat
from jdllm.runtime import sharding
from jdllm.store import checkpoint
from jdllm.train import objective as objectives
from jdllm.train import optimiser
from jdllm.train import step as train
from tests.support.batches import batch_of

GOLDEN = Path(__file__).parents[1] / "goldens" / "edit" / "sft_loss.npz"
CASES = ("b1", "b3", "b3_fixed_t", "b2_no_prompt", "b1_nothing_masked")
CONFIG = dataclasses.replace(
    NAMED["tiny"],
    layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=48, vocab=64, max_length=64,
    mask_id=63, eos_id=62, pad_id=62, stop_ids=(62, 61),
)  # fmt: skip
KEY = jax.random.key(7)
LLADA = objectives.OBJECTIVES["llada"]
RECIPE = optimiser.Recipe(steps=10, learning_rate=1e-2, warmup=2, schedule="cosine", clip=0.5)


def one_device():
    return sharding.parse_mesh("1x1")


@pytest.fixture(scope="module")
def model():
    """Float32 parameters, computed with as they are; tests must not donate them."""
    return checkpoint.random_model(CONFIG, one_device(), seed=1)


def make_batch(accumulation: int = 1, rows: int = 4, columns: int = 24, seed: int = 0):
    """Random canvases with prompts of 3 to 8 columns, some rows with hidden columns."""
    rng = np.random.default_rng(seed)
    shape = (accumulation, rows)
    tokens = rng.integers(0, 60, (*shape, columns)).astype(np.int32)
    prompts = rng.integers(3, 9, shape).astype(np.int32)
    lengths = rng.choice([columns - 6, columns], shape).astype(np.int32)
    return batch_of(tokens, prompts, lengths)


def micro(batch: objectives.Batch, index: int) -> objectives.Batch:
    return jax.tree.map(lambda x: x[index], batch)


def fresh_state(params, optimizer, mesh=None):
    """A state with arrays of its own, since a step donates them."""
    copy = jax.tree.map(lambda x: x.copy(), params)
    return train.create_state(copy, optimizer, mesh or one_device())


def close(a, b, rtol: float = 1e-4):
    """All leaves agree within `rtol` of the largest entry of each."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(y).max(), 1e-12))


def plain_loss(params, model, batch: objectives.Batch, key):
    """LLaDA's objective with whole logits, from draws' numbers: sums of nll/t and nll, counts."""
    model = dataclasses.replace(model, params=params)
    u, hit, _ = objectives.draws(key, batch)
    t = (1 - 1e-3) * u + 1e-3
    masked = (hit < t) & batch.learned
    noisy = jnp.where(masked, CONFIG.mask_id, batch.tokens)
    logits = forward(model, noisy, batch.example >= 0)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[..., None], axis=-1)
    nll = -picked[..., 0] * masked
    return jnp.sum(nll / t), (jnp.sum(nll), jnp.sum(masked), jnp.sum(batch.learned))


def whole_loss(params, model, batch, key, remat: Remat = "none"):
    noisy = objectives.corrupt(LLADA, key, batch, CONFIG.mask_id)
    model = train.all_parameters(params, model)
    return objectives.losses(LLADA, model, noisy, remat)


loss_of = jax.jit(whole_loss, static_argnames="remat")
plain_gradient = jax.jit(jax.value_and_grad(plain_loss, has_aux=True))
one_step = partial(train.train_step, key=KEY, objective=LLADA)
SGD, STILL = optax.sgd(1.0), optax.sgd(0.0)


# The loss against the reference


def divided(noisy: objectives.Noisy, nll) -> jax.Array:
    return jnp.sum(jnp.where(noisy.masked, nll * noisy.weights, 0)) / jnp.sum(noisy.counts)


@pytest.mark.parametrize("case", CASES)
def test_loss_equals_the_reference(case):
    with np.load(GOLDEN) as stored:
        golden = {k.split("/")[1]: stored[k] for k in stored if k.startswith(case + "/")}
    ids, labels = golden["input_ids"], golden["labels"]
    rows, columns = ids.shape
    prompts = golden.get("prompt_lengths", np.zeros(rows, int))
    batch = batch_of(ids, prompts, np.full(rows, columns))
    assert batch.learned.size - batch.learned.sum() == golden["num_prompt_tokens"]
    masked = jnp.asarray(labels != -100)
    assert not (masked & ~batch.learned).any()
    np.testing.assert_array_equal(golden["noisy_ids"] != ids, masked)
    nll = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(golden["logits"]), ids)
    t = jnp.asarray(golden["t"])
    np.testing.assert_array_equal(t, t[:, :1].repeat(columns, 1))
    noisy = objectives.noisy(LLADA, batch, masked, t, jax.random.split(KEY, rows), CONFIG.mask_id)
    np.testing.assert_allclose(divided(noisy, nll), golden["loss"], rtol=1e-5)
    if masked.any():
        np.testing.assert_allclose(nll[masked].mean(), golden["unscaled_loss_logged"], rtol=1e-5)
    if "t_drawn" in golden:
        mapped = LLADA.low + (LLADA.high - LLADA.low) * golden["t_drawn"]
        np.testing.assert_allclose(mapped, t[:, 0], rtol=1e-6)


def test_micro_divides_as_the_reference(model):
    """EDIT's two micro-batches of unequal responses: each has its own divisor, then the mean."""
    batch = make_batch(accumulation=2, rows=2)
    state = fresh_state(model.params, STILL)
    parts = [plain_gradient(model.params, model, micro(batch, i), KEY)[0] for i in range(2)]
    own = np.mean([np.asarray(total / counts[2]) for total, counts in parts])
    whole = sum(total for total, _ in parts) / sum(counts[2] for _, counts in parts)
    for divides, expected in ((True, own), (False, whole)):
        state, metrics = one_step(state, batch, frozen=model, optimizer=STILL, micro=divides)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert abs(own - whole) > 1e-4


def test_padding_is_trained_on_and_counted():
    """Padding inside the canvas has loss and is in the divisor; hidden columns are in neither."""
    batch = batch_of(np.full((1, 10), 62), np.array([4]), np.array([8]))
    np.testing.assert_array_equal(np.flatnonzero(batch.learned), [4, 5, 6, 7])
    padding = jnp.zeros((1, 10), bool).at[0, 7].set(True)
    half = jnp.full((1, 10), 0.5)
    noisy = objectives.noisy(LLADA, batch, padding, half, jax.random.split(KEY, 1), 63)
    assert divided(noisy, jnp.ones((1, 10))) == pytest.approx(1 / 0.5 / 4)


def test_losses_are_the_objective_spelled_out(model):
    params = model.params
    batch = micro(make_batch(), 0)
    got = loss_of(params, model, batch, KEY)
    (total, (plain, _, _)), _ = plain_gradient(params, model, batch, KEY)
    np.testing.assert_allclose(got, (total, plain), rtol=1e-5)


def test_hidden_columns_change_nothing(model):
    params = model.params
    batch = micro(make_batch(rows=2), 0)
    hide = jnp.arange(24) >= 18
    batch = dataclasses.replace(
        batch, learned=batch.learned & ~hide, example=jnp.where(hide, -1, batch.example)
    )
    other = dataclasses.replace(batch, tokens=batch.tokens.at[:, 18:].set(5))
    first, second = (loss_of(params, model, b, KEY)[0]
                     for b in (batch, other))  # fmt: skip
    assert first == second


# Corruption


corrupt = jax.jit(partial(objectives.corrupt, LLADA, mask_id=CONFIG.mask_id))


def test_prompt_and_hidden_columns_are_never_masked():
    batch = micro(make_batch(rows=64, columns=40), 0)
    for seed in range(5):
        noisy = corrupt(jax.random.key(seed), batch)
        assert not (noisy.masked & ~batch.learned).any()
        expected = jnp.where(noisy.masked, CONFIG.mask_id, batch.tokens)
        np.testing.assert_array_equal(noisy.tokens, expected)
    np.testing.assert_array_equal(corrupt(KEY, batch, level=1.0).masked, batch.learned)


def test_masking_rate_follows_t():
    """A row's rate is binomial around its own t: within 5 standard deviations."""
    rows, columns, prompt = 64, 4096, 96
    batch = batch_of(np.zeros((rows, columns)), np.full(rows, prompt), np.full(rows, columns))
    noisy = corrupt(KEY, batch)
    count = columns - prompt
    rate = np.asarray(noisy.masked.sum(1)) / count
    t = np.asarray(1 / noisy.weights.max(1))
    assert (np.abs(rate - t) < 5 * np.sqrt(np.asarray(t * (1 - t)) / count) + 1 / count).all()
    assert t.min() >= 1e-3 and t.max() <= 1 and 0.35 < t.mean() < 0.65
    assert len(np.unique(t)) == rows


def test_noise_is_a_function_of_key_example_and_visit():
    """Not of the row, the batch or the canvas that an example lies in."""
    batch = micro(make_batch(), 0)
    first, again = (corrupt(KEY, batch) for _ in range(2))
    np.testing.assert_array_equal(first.masked, again.masked)
    turned = corrupt(KEY, jax.tree.map(lambda x: x[::-1], batch))
    np.testing.assert_array_equal(turned.masked[::-1], first.masked)
    np.testing.assert_array_equal(turned.weights[::-1], first.weights)
    cut = dataclasses.replace(
        batch, **{name: getattr(batch, name)[:, :15] for name in ("tokens", "learned", "example")}
    )
    np.testing.assert_array_equal(corrupt(KEY, cut).masked, first.masked[:, :15])
    later = dataclasses.replace(batch, visit=batch.visit + 1)
    for other in (corrupt(jax.random.key(8), batch), corrupt(KEY, later)):
        assert (other.masked != first.masked).any(1).all()


# The step


def test_accumulation_is_the_sum_of_separate_gradients(model):
    """With plain SGD of rate 1 the update is minus the gradient."""
    params = model.params
    batch = make_batch(accumulation=3)
    parts = [plain_gradient(params, model, micro(batch, i), KEY) for i in range(3)]
    plain, masked, count = (sum(p[0][1][i] for p in parts) for i in range(3))
    gradient = jax.tree.map(lambda *x: sum(x) / count, *[gradient for _, gradient in parts])
    new, metrics = one_step(fresh_state(params, SGD), batch, frozen=model, optimizer=SGD)
    close(jax.tree.map(jnp.subtract, params, new.trained), gradient, rtol=1e-3)
    np.testing.assert_allclose(metrics["loss"], sum(p[0][0] for p in parts) / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], plain / masked, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)


def test_train_step_equals_a_plain_loop(model):
    """Four updates of clip, AdamW and schedule, against optax called by hand."""
    params = model.params
    optimizer = optimiser.make_optimizer(RECIPE)
    state = fresh_state(params, optimizer)
    rate = optimiser.learning_rate(RECIPE)
    adam = optax.scale_by_adam(b1=RECIPE.beta1, b2=RECIPE.beta2, eps=RECIPE.epsilon)
    moments = adam.init(params)
    mine = params
    for step in range(4):
        batch = make_batch(seed=step)
        state, metrics = one_step(state, batch, frozen=model, optimizer=optimizer)
        (total, (_, _, count)), gradient = plain_gradient(mine, model, micro(batch, 0), KEY)
        gradient = jax.tree.map(lambda x, count=count: x / count, gradient)
        np.testing.assert_allclose(metrics["loss"], total / count, rtol=1e-4)
        norm = optax.tree.norm(gradient)
        assert norm > RECIPE.clip  # so that clipping is under test
        gradient = jax.tree.map(lambda x, norm=norm: x * RECIPE.clip / norm, gradient)
        update, moments = adam.update(gradient, moments)
        decay = jax.tree.map(lambda p: RECIPE.weight_decay * p * (p.ndim > 1), mine)
        scale = -float(np.asarray(rate(step)))
        mine = jax.tree.map(lambda p, u, d, k=scale: p + k * (u + d), mine, update, decay)
        assert state.step == step + 1
    # Adam divides by the root of tiny second moments, which enlarges rounding: 1e-3, not 1e-4.
    close(state.trained, mine, rtol=1e-3)


def test_bfloat16_compute_keeps_float32_masters(model):
    params = model.params
    optimizer = optimiser.make_optimizer(RECIPE)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        state, metrics = one_step(
            fresh_state(params, optimizer), make_batch(),
            frozen=dataclasses.replace(model, dtype=dtype), optimizer=optimizer,
        )  # fmt: skip
        for leaf in jax.tree.leaves((state.trained, state.moments)):
            assert leaf.dtype == jnp.float32 or leaf.ndim == 0
        assert all(value.dtype == jnp.float32 for value in metrics.values())
        losses[dtype] = float(metrics["loss"])
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)


def test_masters_of_bfloat16_weights_are_float32(model):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    state = fresh_state(half, optimiser.make_optimizer(RECIPE))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trained))


@pytest.mark.slow
def test_remat_gives_the_same_gradients(model):
    params = model.params
    batch = micro(make_batch(), 0)
    value = jax.jit(jax.value_and_grad(loss_of, has_aux=True), static_argnames="remat")
    plain, *others = (value(params, model, batch, KEY, remat=remat) for remat in get_args(Remat))
    for again in others:
        np.testing.assert_allclose(plain[0], again[0], rtol=1e-6)
        close(plain[1], again[1], rtol=1e-5)


def test_mesh_gives_the_same_step(model, caplog):
    """2 data x 2 model devices against one: SGD updates, and a single compiled program."""
    params = model.params
    optimizer = optax.sgd(1.0, momentum=0.9)
    batch = make_batch(accumulation=2)
    state = fresh_state(params, optimizer)
    one, metrics_one = one_step(state, batch, frozen=model, optimizer=optimizer)
    mesh = sharding.parse_mesh("2x2")
    places = list(checkpoint.placements(CONFIG, mesh).values())
    leaves, tree = jax.tree.flatten(params)
    spread = jax.device_put(list(map(np.asarray, leaves)), places)  # shares no buffer with params
    spread = jax.tree.unflatten(tree, spread)
    state = train.create_state(spread, optimizer, mesh)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    batch = jax.device_put(batch, rows)
    layout = jax.tree.map(lambda x: x.sharding, state)
    many, metrics = one_step(state, batch, frozen=model, optimizer=optimizer)
    close(many.trained, one.trained, rtol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, metrics_one[name], rtol=1e-5)
    kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), many, layout)
    assert all(jax.tree.leaves(kept))
    for leaf, place in zip(jax.tree.leaves(many.trained), places, strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    with jax.log_compiles(True):
        one_step(many, batch, frozen=model, optimizer=optimizer)
    assert not [record for record in caplog.messages if "Compiling jit(train_step)" in record]


def test_loss_falls_on_a_tiny_overfit(model):
    params = model.params
    recipe = optimiser.Recipe(steps=60, learning_rate=1e-2, weight_decay=0.0)
    optimizer = optimiser.make_optimizer(recipe)
    state = fresh_state(params, optimizer)
    batch = make_batch(rows=2, columns=16)
    nll = []
    for _ in range(60):
        state, metrics = one_step(state, batch, frozen=model, optimizer=optimizer)
        nll.append(float(metrics["nll"]))
    assert np.mean(nll[-10:]) < 0.5 * np.mean(nll[:10])


# Optimiser


def test_learning_rate_schedules():
    linear = optimiser.learning_rate(optimiser.Recipe(steps=10, learning_rate=1.0))
    np.testing.assert_allclose(
        [np.asarray(linear(k)) for k in range(11)], 1 - np.arange(11) / 10, atol=1e-6
    )
    warm = optimiser.learning_rate(optimiser.Recipe(steps=12, learning_rate=2.0, warmup=4))
    np.testing.assert_allclose(
        [np.asarray(warm(k)) for k in (0, 1, 4, 8, 12)], [0, 0.5, 2, 1, 0], atol=1e-6
    )
    cosine = optimiser.learning_rate(
        optimiser.Recipe(steps=12, learning_rate=2.0, warmup=4, schedule="cosine")
    )
    want = [0, 0.5, 2, 1 + np.cos(np.pi / 4), 1, 0]
    np.testing.assert_allclose(
        [np.asarray(cosine(k)) for k in (0, 1, 4, 6, 8, 12)], want, atol=1e-6
    )


def rates(**recipe: Any) -> list[float]:
    """The rates of 10 updates with the peak 1, and the one after."""
    found = optimiser.learning_rate(optimiser.Recipe(steps=10, learning_rate=1.0, **recipe))
    return [float(np.asarray(found(k))) for k in range(11)]


def test_rates_that_end_above_zero_and_shares_of_the_steps():
    assert rates(schedule="constant") == [1.0] * 11
    falling = [1.0] * 8 + [0.75, 0.5, 0.5]
    cooled = rates(schedule="constant", cooldown=0.2, floor=0.5, warmup=0.1)
    np.testing.assert_allclose(cooled, [0.0, *falling[1:8], 1.0, 0.75, 0.5], atol=1e-6)
    np.testing.assert_allclose(rates(floor=0.5), 1 - 0.5 * np.arange(11) / 10, atol=1e-6)
    assert rates(schedule="cosine", floor=0.1)[-1] == pytest.approx(0.1)
    assert rates(warmup=0.3) == rates(warmup=3)


def test_adamw_of_transformers():
    """Against its two lines by hand; moments are those of optax."""
    recipe = optimiser.Recipe(
        steps=5, learning_rate=0.1, weight_decay=0.2, clip=1e9, epsilon=0.5, optimizer="adamw_hf"
    )
    rng = np.random.default_rng(0)
    params = {"matrix": jnp.asarray(rng.normal(size=(2, 3))), "scale": jnp.ones(2)}
    own = {name: np.asarray(x, np.float64) for name, x in params.items()}
    m, v = ({name: np.zeros_like(x) for name, x in own.items()} for _ in range(2))
    optimizer = optimiser.make_optimizer(recipe)
    state = optimizer.init(params)
    for step in range(3):
        gradient = {name: rng.normal(size=x.shape) for name, x in own.items()}
        update, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, params)
        params: Any = optax.apply_updates(params, update)
        lr = 0.1 * (1 - step / 5)
        for name, g in gradient.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            size = lr * np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
            own[name] = own[name] - size * m[name] / (np.sqrt(v[name]) + 0.5)
            own[name] -= lr * 0.2 * own[name] * (g.ndim > 1)
            np.testing.assert_allclose(params[name], own[name], rtol=1e-5)
    found = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(found["matrix"], m["matrix"], rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"schedule": "step"}, "schedule=step must be one of linear, cosine, constant"),
        ({"cooldown": 1.5}, "cooldown=1.5 must be between 0 and 1"),
        ({"floor": -0.1}, "floor=-0.1 must be between 0 and 1"),
        ({"steps": 0}, "steps=0"),
        ({"warmup": 11, "steps": 10}, "warmup=11"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"clip": float("nan")}, "clip=nan"),
    ],
)
def test_impossible_recipes_are_refused(wrong, rule):
    with pytest.raises(ValueError, match=rule):
        optimiser.Recipe(**wrong)


def test_only_matrices_decay():
    """Without a gradient AdamW moves nothing but the decayed weights."""
    recipe = optimiser.Recipe(steps=10, learning_rate=0.1, weight_decay=0.5)
    optimizer = optimiser.make_optimizer(recipe)
    params = {"matrix": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    update: Any
    update, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(update["matrix"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(update["scale"], 0)
