"""What prompts begin with, computed once: the same completions for less work, and only where exact.

The twin is the same call with share_prefix=false; whole blocks and lengths are searched by brute
force.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jdllm import DecodeConfig, batches
from jdllm.batches import WORTH, bucket, common_prefixes, prefix_lengths
from jdllm.decode import decode, read_prefix
from jdllm.llm import LLM, Batch, Completion
from jdllm.parity import make_setup
from jdllm.runtime import programs, sharding
from jdllm.runtime.fields import replaced
from tests.support.models import on_mesh, random_arrays
from tests.support.tiny_models import TINY, random_prompts, tiny

SETTINGS: Any = {
    "deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True,
}  # fmt: skip
BLOCKS = dataclasses.replace(
    TINY, layers=2, heads=4, kv_heads=2, head_dim=8, block_causal=4,
)  # fmt: skip
SHORT = DecodeConfig(gen_length=12, block_length=4, threshold=0.6)
ALONE = {"share_prefix": False}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least saving is worth it."""
    monkeypatch.setattr(batches, "WORTH", 1)


@functools.cache
def deep(mesh: str = "1x1") -> LLM:
    """Two layers, so that keys depend on what attention sees; sharp, so that tokens tell."""
    arrays, grid = random_arrays(BLOCKS, seed=1), sharding.parse_mesh(mesh)
    sharper = {"attention.q": 12, "attention.out": 4, "head": 3}
    for name in arrays:
        arrays[name] *= next((by for end, by in sharper.items() if name.endswith(end)), 1)
    return LLM(on_mesh(BLOCKS, arrays, grid))


def fresh(llm: LLM) -> LLM:
    """The same weights, no programs."""
    return LLM(llm.model)


def prompts_of(seed: int, common: Sequence[int], own: Sequence[int]) -> list[list[int]]:
    """Prompts of `own` tokens behind one of the beginnings, which have the lengths `common`."""
    starts = random_prompts(seed, list(common))
    rows = random_prompts(seed + 1, list(own))
    return [starts[i % len(starts)] + row for i, row in enumerate(rows)]


def run(llm: LLM, prompts: list[list[int]], config: DecodeConfig, **words: Any):
    """Completions in order, and the batches."""
    found: list[Batch] = list(llm.stream(prompts, config, **words))
    done: dict[int, Completion] = {}
    for batch in found:
        done |= zip(batch.index, batch.completions, strict=True)
    return [done[i] for i in range(len(prompts))], found


# What is found


@settings(max_examples=200, **SETTINGS)
@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 150), min_size=1, max_size=3),
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.sampled_from([4, 5, 32, 64]),
    st.integers(0, 500),
)
def test_the_prefixes_that_save_most(seed, common, own, block, room):
    rows = prompts_of(seed, common, own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "WORTH", 1)
        found = common_prefixes(rows, block, room)
    shortest = min(map(len, rows))
    counts = {n: len({tuple(row[:n]) for row in rows}) for n in prefix_lengths(block, shortest)}
    fit = {n: (len(rows) - count) * n for n, count in counts.items() if count * n <= room}
    if found is None:
        assert max(fit.values(), default=0) == 0
        return
    assert fit[found.length] == max(fit.values())
    assert found.length % block == 0 and found.length < shortest
    assert len({tuple(prefix) for prefix in found.prefixes}) == len(found.prefixes)
    for row, number in zip(rows, found.which, strict=True):
        assert row[: found.length] == found.prefixes[number]


def test_it_must_pay():
    """Few prompts, short beginnings, nothing in common, or nothing at all."""
    rows = [[1] * 64 + [i] for i in range(WORTH // 64 + 1)]
    assert common_prefixes(rows, 32, 10**9) is not None
    assert common_prefixes(rows[:-1], 32, 10**9) is None
    assert common_prefixes([[i, *row] for i, row in enumerate(rows)], 32, 10**9) is None
    assert common_prefixes([], 32, 10**9) is None


@pytest.mark.parametrize("block", [1, 4, 32, 48])
def test_lengths_are_few(block: int):
    """Every one has a program of its own for each bucket; what is cut off is little."""
    found = list(prefix_lengths(block, 1 << 15))
    assert all(n % block == 0 for n in found)
    assert len(found) <= 32 + 16 * 5
    gaps = np.diff([0, *found])
    assert all(gap <= max(32, n / 16) + block for gap, n in zip(gaps, found, strict=True))


# What is decoded

OPTIONS: list[dict[str, Any]] = [
    {"edit.threshold": 0.4, "stop": "eos_block"},
    {"rule": "quota", "threshold": None, "steps": 6, "sampling": "categorical",
     "temperature": 0.7, "stable_steps": 2, "block_length": 8, "gen_length": 16},
    {"edge": "slack", "parity": "dinfer", "smooth.weight": 0.3},
]  # fmt: skip


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "options", [OPTIONS[0], *(pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS[1:])]
)
@settings(max_examples=2, **SETTINGS)
@given(
    seed=st.integers(0, 10_000),
    common=st.sampled_from([[40], [36, 35]]),
    own=st.permutations([1, 5, 14, 22]),
)
def test_completions_and_nfe_are_the_same(options: dict[str, Any], seed, common, own):
    """Mixed lengths in several batches, one beginning or two, the prompt's tail on any column."""
    llm, prompts = deep(), prompts_of(seed, common, own)
    config = replaced(SHORT, options)
    shared, found = run(llm, prompts, config, batch_size=3)
    alone, plain = run(llm, prompts, dataclasses.replace(config, **ALONE), batch_size=3)
    assert shared == alone
    assert [batch.forwards for batch in found] == [batch.forwards for batch in plain]
    assert [batch.shared_tokens for batch in found] == [64, 64]
    assert all(batch.shared_tokens == 0 for batch in plain)


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_a_prompt_that_ends_with_a_block():
    """Its first block holds no prompt: the prefill has one block to itself, or two."""
    llm = deep()
    prompts = prompts_of(5, [64], [4, 8, 4])
    shared, found = run(llm, prompts, SHORT)
    assert sum(batch.shared_tokens for batch in found) == 3 * 64
    assert shared == run(llm, prompts, dataclasses.replace(SHORT, **ALONE))[0]


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("mesh", ["4x2", "1x4"])
def test_on_a_mesh(mesh: str):
    """Rows spread over replicas, with idle ones; key/value heads split, or whole everywhere."""
    prompts = prompts_of(3, [40, 45], [1, 9, 16, 4, 11])
    shared, found = run(deep(mesh), prompts, SHORT)
    assert shared == deep().generate(prompts, dataclasses.replace(SHORT, **ALONE))
    assert sum(batch.shared_tokens for batch in found) == 5 * 32


# What it saves, and where it is left alone


def cost(lowered: Any) -> float:
    """Floating-point operations of a program, the bodies of its loops counted once."""
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.usefixtures("eager")
def test_the_program_does_less_work():
    """The columns of the prefix are gone from the prefill of every row."""
    llm, prompts = fresh(tiny("blocks")), prompts_of(0, [70], [3, 9, 12, 20])
    config = llm.resolve(SHORT)
    setup = make_setup(config, llm.config)
    shared = llm._share(prompts, setup, 10**6)
    assert shared.length == 64
    flops = []
    for begun in (None, shared.of([0, 1, 2, 3])):
        request = llm._request(prompts, [0] * 4, config, setup, 4, begun)
        flops.append(cost(decode.lower(llm.model, request, setup)))
    tokens = np.zeros((4, shared.length), np.int32)
    batch = cost(read_prefix.lower(llm.model, tokens, setup.block_length))
    assert flops[0] - flops[1] >= batch > 0.2 * flops[0]


@pytest.mark.usefixtures("eager")
@pytest.mark.slow
def test_programs_stay_few(monkeypatch: pytest.MonkeyPatch):
    """One for the prefix, and one per bucket, as without it; a second call compiles nothing."""
    monkeypatch.setattr(programs, "is_crowded", lambda: False)  # as after many tests
    llm, prompts = fresh(tiny("blocks")), prompts_of(8, [33], range(1, 60, 3))
    for _ in range(2):
        llm.generate(prompts, SHORT, batch_size=4)
        assert len(llm._programs) == 1 + len({bucket(len(p)) for p in prompts})


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("plain", {"cache": "dual"}),
        ("plain", {"cache": "block"}),
        ("shifted", {"cache": "block", "align": True}),
        ("blocks", {"cache": "none"}),
        ("blocks", {"cfg_scale": 1.0}),
        ("blocks", ALONE),
    ],
)
def test_it_is_left_alone_where_it_is_not_exact(kind: str, options: dict[str, Any], monkeypatch):
    """Bidirectional models, whatever their cache; no cache; guidance; where it is turned off."""
    monkeypatch.setattr(LLM, "_program", lambda *_: (_ for _ in ()).throw(InterruptedError))
    llm, prompts = fresh(tiny(kind)), prompts_of(1, [40], [3, 9])
    with pytest.raises(InterruptedError):
        next(llm.stream(prompts, replaced(SHORT, options)))
    assert not llm._programs


def test_nothing_changes_where_it_does_not_pay():
    (batch,) = deep().stream(prompts_of(1, [40], [3, 9]), SHORT)
    assert batch.shared_tokens == 0
