"""The head without its logits: chunks and shards against the definition on whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdllm import unmask
from jdllm.kernels.head.reference import CHUNK
from jdllm.model.config import NAMED
from jdllm.model.head import Best, Sampling, Special, best, reference
from jdllm.runtime import sharding
from jdllm.unmask.view import without
from tests.support.collectives import collectives, computations

B, N, D, V = 2, 3, 4, 48
IDS = st.lists(st.integers(0, V - 1), max_size=3).map(tuple)
SPECIAL = st.builds(Special, excluded=IDS, suppressed=IDS, forbidden=IDS)


def inputs(seed: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Small whole numbers, so that logits are exact in any order of summation, and often tie."""
    rng = np.random.default_rng(seed)
    shapes = (B, N, D), (D, V)
    hidden, head = (rng.integers(-levels, levels + 1, s).astype(np.float32) for s in shapes)
    return hidden, head


def by_hand(logits_V: np.ndarray, special: Special) -> tuple[int, float, float, float, float]:
    """One position in float64, token by token."""
    usable = set(range(V)) - {*special.excluded, *special.forbidden}
    counted = set(range(V)) - {*special.suppressed, *special.forbidden}
    ident = min(usable, key=lambda i: (-logits_V[i], i))
    rest = [float(logits_V[i]) for i in counted - {ident}]
    score = float(logits_V[ident])
    own = score if ident in counted else -np.inf
    second = max((float(logits_V[i]) for i in usable - {ident}), default=-np.inf)
    return ident, score, own, float(np.logaddexp.reduce(rest)), second


def assert_same(ours: Best, theirs: Best) -> None:
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_array_equal(ours.score, theirs.score)
    np.testing.assert_array_equal(ours.own, theirs.own)
    np.testing.assert_array_equal(ours.second, theirs.second)
    np.testing.assert_allclose(ours.rest, theirs.rest, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), levels=st.integers(1, 4), special=SPECIAL)
def test_the_reference_is_the_definition(seed: int, levels: int, special: Special):
    hidden, head = inputs(seed, levels)
    logits = hidden @ head
    found = reference(jnp.array(logits), special)
    for b, n in np.ndindex(B, N):
        ident, *numbers = by_hand(logits[b, n].astype(float), special)
        assert int(found.ids[b, n]) == ident
        ours = [x[b, n] for x in (found.score, found.own, found.rest, found.second)]
        np.testing.assert_allclose(ours, numbers, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 999),
    levels=st.integers(1, 4),
    special=SPECIAL,
    chunk=st.sampled_from([None, 1, 7, 16, 47, 48, 100]),
    tied=st.booleans(),
    mesh=st.sampled_from(["1x1", "1x4", "2x2", "1x8"]),
)
def test_chunks_and_shards_equal_the_reference(
    seed: int, levels: int, special: Special, chunk: int | None, tied: bool, mesh: str
):
    hidden, head = inputs(seed, levels)
    grid = sharding.parse_mesh(mesh)
    table, axes = (head.T, ("vocab", "embed")) if tied else (head, ("embed", "vocab"))
    place = NamedSharding(grid, sharding.spec("head", table.shape, axes, grid))
    run = jax.jit(best, static_argnums=(2, 3, 4))
    ours = run(
        jax.device_put(hidden, sharding.by_row(grid)),
        jax.device_put(table, place),
        special,
        tied,
        chunk,
    )
    assert_same(ours, reference(jnp.array(hidden @ head), special))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), ends=IDS, forbidden=IDS)
def test_it_says_what_the_greedy_rule_reads(seed: int, ends: tuple[int, ...], forbidden):
    """Ids and log-odds are those of Argmax and Probability on whole logits."""
    hidden, head = inputs(seed, 3)
    mask_id, logits = 9, jnp.array(hidden @ head)
    open_logits = without(logits, forbidden)
    ids = unmask.Argmax((mask_id,))(open_logits, jnp.zeros)
    odds = unmask.Probability(ends)(open_logits, ids, jnp.zeros)
    found = reference(logits, Special((mask_id,), ends, forbidden))
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.odds, odds, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 999),
    heats=st.sampled_from([1.0, 0.5, (0.7, 1.3)]),
    scale=st.sampled_from([1.0, (0.4, 2.0)]),
    ends=IDS,
    chunk=st.sampled_from([None, 7, 48]),
    tied=st.booleans(),
    mesh=st.sampled_from(["1x1", "2x2", "1x8"]),
)
def test_samples_are_those_of_the_rule_on_whole_logits(
    seed: int, heats, scale, ends: tuple[int, ...], chunk: int | None, tied: bool, mesh: str
):
    """The draws are those of jax.random for [N, V], whatever the slices and chunks."""
    hidden, head = inputs(seed, 3)
    grid = sharding.parse_mesh(mesh)
    table, axes = (head.T, ("vocab", "embed")) if tied else (head, ("embed", "vocab"))
    place = NamedSharding(grid, sharding.spec("head", table.shape, axes, grid))
    keys_B = jax.random.split(jax.random.key(seed), B)
    scale_B11, heat_B11 = (jnp.broadcast_to(jnp.array(x), B)[:, None, None] for x in (scale, heats))

    @jax.jit
    def run(hidden: jax.Array, table: jax.Array) -> Best:
        sampling = Sampling(keys_B, scale_B11, heat_B11)
        return best(hidden, table, Special((9,), ends), tied, chunk, sampling=sampling)

    found = run(jax.device_put(hidden, sharding.by_row(grid)), jax.device_put(table, place))
    logits = unmask.Warp(heat_B11, excluded=(9,))(jnp.array(hidden @ head))
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (N, V)))(keys_B)
    ids = unmask.Gumbel((9,), scale_B11)(logits, lambda shape: drawn)
    np.testing.assert_array_equal(found.ids, ids)
    odds = unmask.Probability(ends)(logits, ids, jnp.zeros)
    np.testing.assert_allclose(found.odds, odds, atol=1e-4)


def test_random_logits_of_a_large_vocabulary():
    """Three chunks, bfloat16 weights, and a vocabulary that chunks do not divide."""
    rng = np.random.default_rng(0)
    hidden = jnp.array(rng.normal(size=(4, 8, 16)), jnp.bfloat16)
    head = jnp.array(rng.normal(size=(16, 20_001)), jnp.bfloat16)
    special = Special(excluded=(20_000,), forbidden=(0, 1))
    logits = jnp.einsum("BND,DV->BNV", hidden, head, preferred_element_type=jnp.float32)
    ours = best(hidden, head, special, chunk=CHUNK)
    theirs = reference(logits, special)
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_allclose(ours.odds, theirs.odds, atol=1e-4)


def test_it_exchanges_a_few_numbers_a_position():
    """One all-reduce, of five numbers per position and shard, and nothing else."""
    grid = sharding.parse_mesh("2x4")
    hidden = jax.ShapeDtypeStruct((B, N, D), jnp.float32, sharding=sharding.by_row(grid))
    head = jax.ShapeDtypeStruct((D, V), jnp.float32, sharding=NamedSharding(grid, P(None, "model")))
    text = jax.jit(best).lower(hidden, head).compile().as_text() or ""
    (entry,) = [name for name in computations(text) if name.startswith("main")]
    (found,) = collectives(text, entry)
    assert found.kind == "all-reduce"
    assert found.elements == 4 * 5 * (B // 2) * N


@pytest.mark.parametrize(("chunk", "bound"), [(CHUNK, 0.7), (CHUNK // 4, 0.2)])
def test_peak_memory_at_the_shapes_of_llada_8b(chunk: int, bound: float):
    """Chunks hold a piece of the head and its logits, whole logits two arrays [B, N, V]."""
    config = NAMED["llada-8b"]
    hidden = jax.ShapeDtypeStruct((8, 32, config.embed), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((config.embed, config.vocab), jnp.bfloat16)
    special = Special(excluded=(config.mask_id,))

    def whole(hidden: jax.Array, head: jax.Array) -> Best:
        logits = jnp.einsum("BND,DV->BNV", hidden, head, preferred_element_type=jnp.float32)
        return reference(logits, special)

    def peak(function) -> int:
        memory = jax.jit(function).lower(hidden, head).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    logit_bytes = 8 * 32 * config.vocab * 4
    assert peak(whole) >= logit_bytes
    assert peak(lambda h, w: best(h, w, special, chunk=chunk)) <= bound * logit_bytes
