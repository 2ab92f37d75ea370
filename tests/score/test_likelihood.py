"""Likelihoods: masks, weights, the exact chain, standard errors, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.model.config import NAMED, ModelConfig
from jdllm.model.model import Model, forward
from jdllm.runtime import sharding
from jdllm.score.likelihood import Canvas, LikelihoodConfig, draw, is_greedy, losses
from jdllm.score.scoring import parts, resolve, score
from jdllm.store.checkpoint import random_model
from tests.support.marks import quick

SMALL = dataclasses.replace(
    NAMED["tiny"], layers=1, embed=32, heads=2, kv_heads=2, head_dim=16, mlp=32, vocab=24,
    mask_id=20, eos_id=21, pad_id=21, stop_ids=(21,), max_length=64,
)  # fmt: skip
MODELS = {
    "plain": SMALL,
    "shifted": dataclasses.replace(SMALL, shift_logits=True),
    "blocks": dataclasses.replace(SMALL, block_causal=4),
}
PAIR = ([3, 7, 1], [5, 2])


def device(name: str, mesh: str = "1x1") -> Model:
    config = MODELS[name]
    grid = sharding.parse_mesh(mesh)
    return random_model(config, grid, seed=5)


@pytest.fixture(scope="module")
def devices() -> dict[str, Model]:
    return {name: device(name) for name in MODELS}


def log_p(where: Model, tokens: list[int], column: int) -> np.ndarray:
    """Log-probabilities of every id at a column of one canvas, by the plain forward pass."""
    row = column - 1 if where.config.shift_logits and column else column
    ids = jnp.array([tokens])
    logits = forward(where, ids, jnp.ones(ids.shape, bool))
    return np.asarray(jax.nn.log_softmax(logits[0, row]))


def masked(tokens: list[int], columns: list[int], config: ModelConfig) -> list[int]:
    return [config.mask_id if i in columns else t for i, t in enumerate(tokens)]


def value(where: Model, pair=PAIR, **settings) -> float:
    return score([pair], LikelihoodConfig(**settings), where)[0].value


def test_chain_is_the_chain_rule(devices: dict[str, Model]):
    where = devices["plain"]
    prefix, (a, b) = PAIR
    tokens = [*prefix, a, b]
    hidden = masked(tokens, [3, 4], SMALL)
    left = log_p(where, hidden, 3)[a] + log_p(where, masked(tokens, [4], SMALL), 4)[b]
    right = log_p(where, hidden, 4)[b] + log_p(where, masked(tokens, [3], SMALL), 3)[a]
    assert value(where, estimator="chain") == pytest.approx(left, abs=1e-4)
    assert value(where, estimator="chain_backward") == pytest.approx(right, abs=1e-4)
    found = score([PAIR], LikelihoodConfig(estimator="chain"), where)[0]
    assert found.stderr == 0


def test_the_chain_is_a_distribution(devices: dict[str, Model]):
    pairs = [([3], [a, b]) for a in range(SMALL.vocab) for b in range(SMALL.vocab)]
    found = score(pairs, LikelihoodConfig(estimator="chain"), devices["plain"], batch_size=512)
    assert sum(np.exp(one.value) for one in found) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("estimator", "batch"), quick([("counts", 2), ("bernoulli", 32)], ("counts", 2))
)
def test_estimates_converge_and_know_their_error(devices, estimator: str, batch: int):
    """Over two columns the bound is the mean of both orders' chains."""
    where = devices["plain"]
    tokens = [*PAIR[0], *PAIR[1], *([21] if estimator == "bernoulli" else [])]
    hidden, first, second = (masked(tokens, c, SMALL) for c in ([3, 4], [3], [4]))
    chains = [(hidden, 3, second, 4), (hidden, 4, first, 3)]
    steps = [(shown, i) for one, i, two, j in chains for shown, i in ((one, i), (two, j))]
    exact = sum(log_p(where, shown, i)[tokens[i]] for shown, i in steps) / 2
    config = LikelihoodConfig(estimator=estimator, mc_num=1024, mc_batch=batch, eps=1e-4)  # type: ignore
    errors, spread = [], []
    for seed in range(6):
        one = score([PAIR], dataclasses.replace(config, seed=seed), where, batch_size=512)[0]
        errors.append((one.value - exact) / (one.stderr or 1))
        spread.append(one.value)
    assert len(set(spread)) > 3
    assert np.sqrt(np.mean(np.square(errors))) < 2.2
    assert 0 < np.std(spread) < 0.5


def test_one_token_is_exact_at_once(devices: dict[str, Model]):
    where, pair = devices["plain"], ([3, 7], [5])
    found = score([pair], LikelihoodConfig(mc_num=1, mc_batch=1), where)[0]
    assert found.stderr == 0
    assert found.value == pytest.approx(log_p(where, [3, 7, 20], 2)[5], abs=1e-4)


def test_dream_appends_an_eos_and_shifts(devices: dict[str, Model]):
    """Recomputed from the masks drawn: shifted rows, weight 1/p, the last column never masked."""
    where = devices["shifted"]
    config = resolve(LikelihoodConfig(mc_num=8, mc_batch=8), where.config)
    assert config.estimator == "bernoulli"
    (part,) = parts(*PAIR, config, where.config)
    assert part.tokens == [3, 7, 1, 5, 2, 21] and (part.start, part.end) == (3, 6)
    canvas = rows_of(part.tokens, 3, 6, 8)
    masks = draw(canvas, jax.random.split(jax.random.key(1), 8), jnp.arange(8), config)
    loss_B, _ = losses(where, canvas, masks, 3)
    assert not np.asarray(masks.hidden)[:, [0, 1, 2, 5]].any()
    assert np.asarray(masks.hidden)[:, 3:5].any(), "nothing masked proves nothing"
    for row in range(8):
        columns = np.flatnonzero(np.asarray(masks.hidden)[row]).tolist()
        shown = masked(part.tokens, columns, where.config)
        total = -sum(log_p(where, shown, c)[part.tokens[c]] for c in columns)
        assert loss_B[row] == pytest.approx(total / float(masks.ratio[row]), rel=1e-3, abs=1e-4)


def rows_of(tokens: list[int], start: int, end: int, count: int, room: int = 0) -> Canvas:
    ids = np.full((count, max(room, len(tokens))), 21, np.int32)
    ids[:, : len(tokens)] = tokens
    facts = [jnp.full(count, n) for n in (len(tokens), start, end)]
    return Canvas(jnp.array(ids), *facts)


def test_masks_of_llada():
    config = LikelihoodConfig(estimator="counts", mc_num=64, mc_batch=8)
    keys = jnp.repeat(jax.random.split(jax.random.key(0), 8), 8)
    found = []
    for room in (16, 32):  # wider canvases draw the same
        canvas = rows_of(list(range(12)), 2, 12, 64, room)
        masks = draw(canvas, keys, jnp.tile(jnp.arange(8), 8), config)
        hidden = np.asarray(masks.hidden)
        found.append(hidden[:, :12])
        counts = hidden.sum(1)
        assert not hidden[:, :2].any() and not hidden[:, 12:].any()
        np.testing.assert_allclose(np.asarray(masks.ratio), counts / 10)
        assert set(counts.tolist()) == set(range(1, 11))
        rounds = np.sort(counts.reshape(8, 8), axis=1)
        assert (np.diff(rounds, axis=1) >= 0).all() and (rounds[:, -1] - rounds[:, 0] >= 8).all()
    np.testing.assert_array_equal(*found)
    assert len({row.tobytes() for row in found[0]}) > 32


def test_regions():
    config = LikelihoodConfig(estimator="bernoulli")
    spans = {}
    for region in ("target", "prefix", "union"):
        chosen = dataclasses.replace(config, region=region)
        (part,) = parts(*PAIR, chosen, SMALL)
        spans[region] = (part.start, part.end)
    assert spans == {"target": (3, 6), "prefix": (0, 3), "union": (0, 6)}
    with pytest.raises(ValueError, match="needs a prefix"):
        parts([], [1], dataclasses.replace(config, region="prefix"), SMALL)


def test_blocks_are_scored_after_their_clean_past(devices: dict[str, Model]):
    """A block-causal model's chain: in each block the masks of that block alone."""
    where = devices["blocks"]
    prefix, target = [3, 7, 1], [5, 2, 9]
    tokens = [*prefix, *target]
    (first, second) = parts(prefix, target, LikelihoodConfig(estimator="chain"), where.config)
    assert (first.start, first.end, second.start, second.end) == (3, 4, 4, 6)
    total = log_p(where, [3, 7, 1, 20], 3)[5]
    total += log_p(where, masked(tokens, [4, 5], where.config), 4)[2]
    total += log_p(where, masked(tokens, [5], where.config), 5)[9]
    assert value(where, (prefix, target), estimator="chain") == pytest.approx(total, abs=1e-4)
    assert value(where, ([3, 7], [1, 5]), mc_num=1, mc_batch=1) < 0


def test_guidance_masks_the_prefix_out(devices: dict[str, Model]):
    where, pair = devices["plain"], ([3, 7], [5])
    ids = jnp.array([[3, 7, 20], [20, 20, 20]])
    logits = forward(where, ids, jnp.ones(ids.shape, bool))[:, 2]
    guided = jax.nn.log_softmax(logits[1] + 1.5 * (logits[0] - logits[1]))[5]
    assert value(where, pair, cfg_scale=0.5) == pytest.approx(float(guided), abs=1e-4)


def test_company_does_not_matter(devices: dict[str, Model]):
    pairs = [([1] * n, [2 + n % 5] * (1 + n % 3)) for n in range(0, 9, 2)] + [
        PAIR,
        ([1] * 40, [3, 4]),
    ]
    config = LikelihoodConfig(mc_num=4, mc_batch=2)
    seen = []
    together = score(
        pairs, config, devices["plain"], batch_size=5, finished=lambda i, _: seen.append(i)
    )
    assert sorted(seen) == list(range(len(pairs)))
    for pair, one in zip(pairs, together, strict=True):
        (alone,) = score([pair], config, devices["plain"])
        assert alone.value == pytest.approx(one.value, abs=1e-4)
        assert alone.stderr == pytest.approx(one.stderr, abs=1e-4)
    spread = score(pairs, config, device("plain", "4x1"), batch_size=8)
    assert [one.value for one in spread] == pytest.approx([one.value for one in together], abs=1e-4)


def test_greedy_check(devices: dict[str, Model]):
    """The target that greedy decoding gives, and one that differs in its last token."""
    where = devices["plain"]
    tokens = [3, 7, *[20] * 4]
    while 20 in tokens:
        open_columns = [i for i, t in enumerate(tokens) if t == 20]
        found = {i: log_p(where, tokens, i) for i in open_columns}
        best = max(open_columns, key=lambda i: found[i].max())
        tokens[best] = int(found[best].argmax())
    wrong = [*tokens[:-1], (tokens[-1] + 1) % 20]
    canvas = Canvas(
        jnp.array([tokens, wrong]), jnp.full(2, 6), jnp.full(2, 2), jnp.full(2, 6)
    )  # fmt: skip
    assert is_greedy(where, canvas, 4).tolist() == [True, False]
    config = LikelihoodConfig(mc_num=1, mc_batch=1, is_check_greedy=True)
    pairs = [(tokens[:2], tokens[2:]), (wrong[:2], wrong[2:])]
    assert [one.is_greedy for one in score(pairs, config, where)] == [True, False]


def test_long_prefixes_lose_their_left_end():
    config = LikelihoodConfig(estimator="counts")
    (part,) = parts(range(20), [1] * 60, config, SMALL)
    assert part.tokens[:4] == [16, 17, 18, 19] and (part.start, part.end) == (4, 64)
    with pytest.raises(ValueError, match="64 columns"):
        parts([], [1] * 65, config, SMALL)
    with pytest.raises(ValueError, match="empty target"):
        parts([1], [], config, SMALL)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"mc_num": 6, "mc_batch": 4}, "multiple"),
        ({"mc_num": 0}, "from 1"),
        ({"estimator": "exact"}, "estimator=exact"),
        ({"estimator": "counts", "region": "union"}, "bernoulli"),
    ],
)
def test_settings_are_checked(settings: dict, part: str):
    with pytest.raises(ValueError, match=part):
        LikelihoodConfig(**settings)


def test_models_that_cannot_be_scored():
    with pytest.raises(ValueError, match="block by block"):
        resolve(LikelihoodConfig(estimator="bernoulli"), MODELS["blocks"])
    with pytest.raises(ValueError, match="causal model"):
        resolve(LikelihoodConfig(), NAMED["qwen2.5-0.5b"])
