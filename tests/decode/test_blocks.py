"""A watched request runs block by block: calls, tokens, NFE and draws are those of one program."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from jdllm import DecodeConfig
from jdllm.batches import row_seeds
from jdllm.decode import decode
from jdllm.llm import LLM
from jdllm.model.config import NO_ID
from jdllm.model.model import assemble, named
from jdllm.parity import make_setup
from jdllm.runtime import sharding
from jdllm.viz import trace
from jdllm.viz.trace import LOOKS, Record
from tests.conftest import drop_programs
from tests.decode.test_decode_twin import CACHES, LOOSE, REST, RULES, SEARCH
from tests.support.models import on_mesh
from tests.support.tiny_models import TINY, random_prompts, tiny

SHORT: dict[str, Any] = {"gen_length": 12, "block_length": 4}
LENGTHS = [1, 6, 13]


def watch(llm: LLM, config: DecodeConfig, prompts: list[list[int]]):
    """A request's only batch, and what its watcher was handed, by prompt."""
    stretches: list[list[Record]] = [[] for _ in prompts]
    (batch,) = llm.stream(prompts, config, watch=lambda i, part: stretches[i].append(part))
    return batch, stretches


def whole_records(llm: LLM, config: DecodeConfig, prompts: list[list[int]]) -> list[Record]:
    """What the program of the whole request records."""
    config = llm.resolve(config)
    setup = make_setup(config, llm.config)
    request = llm._request(prompts, row_seeds(prompts), config, setup)
    state = decode(llm.model, request, setup, True, llm.verifier)
    kept, calls = jax.device_get(state.trace), int(state.forwards)
    return [llm._record(kept, i, calls, len(p), setup) for i, p in enumerate(prompts)]


def check(llm: LLM, options: dict[str, Any], seed: int) -> list[list[Record]]:
    """Watched and unwatched are the same run."""
    prompts, config = random_prompts(seed, LENGTHS), DecodeConfig.of(SHORT | options)
    batch, stretches = watch(llm, config, prompts)
    (alone,) = llm.stream(prompts, config)
    assert (batch.completions, batch.forwards) == (alone.completions, alone.forwards)
    for parts, whole in zip(stretches, whole_records(llm, config, prompts), strict=True):
        record = trace.join(parts)
        np.testing.assert_array_equal(record.tokens, whole.tokens)
        for name in LOOKS:
            mine, theirs = getattr(record, name), getattr(whole, name)
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5, err_msg=name)
    return stretches


@pytest.fixture(scope="module")
def verified() -> LLM:
    """A model with a verifier: itself, told to look back only."""
    llm, facts = tiny("shifted"), dataclasses.replace(TINY, causal=True, mask_id=NO_ID)
    arrays = {name: leaf[...] for name, leaf in named(llm.model).items()}
    second = assemble(facts, arrays, llm.mesh)
    return LLM(llm.model, verifier=second)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sampled, smoothed, stops": (
        "plain",
        {"threshold": 0.7, "temperature": 0.5, "smooth.weight": 0.3, "cache": "prefix",
         "refresh_every": 3, "stable_steps": 2, "max_forwards": 9},
    ),
    "block cache, edits": ("blocks", {"threshold": 0.5, "edit.threshold": 0.3}),
    "rows that wait": ("plain", {"threshold": 0.6, "edge": "slack", "parity": "dinfer"}),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if "edits" not in c else c for c in CASES]
)
def test_a_watched_run_is_the_run(case: str):
    kind, options = CASES[case]
    stretches = check(tiny(kind, 1.5), options, seed=4)
    for parts in stretches:
        assert len(parts) > 2, "a stretch for every block"
        assert parts[0].calls == (kind == "blocks"), "the prompts are read before the first block"


@pytest.mark.slow
def test_a_watched_verifier_is_the_verifier(verified: LLM):
    check(
        verified, {"rule": "verify", "block_length": 6, "temperature": 0.5, "verify.window": 4}, 5
    )


def test_a_block_is_handed_out_before_the_next_one_runs():
    """Who stops watching after a block has paid for that block alone."""
    llm, seen = tiny(), []

    def stop(_: int, part: Record) -> None:
        seen.append(part)
        if part.calls:
            raise KeyboardInterrupt

    config = DecodeConfig(**SHORT, threshold=0.6, stop="none")
    with pytest.raises(KeyboardInterrupt):
        list(llm.stream(random_prompts(0, [5]), config, watch=stop))
    start, first = seen
    assert start.calls == 0 and (start.tokens[0, 5:] == TINY.mask_id).all()
    assert (first.tokens[-1, 5:] != TINY.mask_id).tolist() == [True] * 4 + [False] * 8


@pytest.mark.slow
def test_watching_on_a_mesh():
    """Rows and heads are split while blocks are handed out."""
    one = tiny("blocks")
    arrays = {name: np.asarray(leaf[...]) for name, leaf in named(one.model).items()}
    grid = sharding.parse_mesh("2x2")
    llm = LLM(on_mesh(one.config, arrays, grid))
    prompts, config = random_prompts(6, [9, 4, 2]), DecodeConfig(**SHORT, threshold=0.5)
    (found, split), (wanted, single) = watch(llm, config, prompts), watch(one, config, prompts)
    assert (found.index, found.completions) == (wanted.index, wanted.completions)
    for ours, theirs in zip(split, single, strict=True):
        np.testing.assert_array_equal(trace.join(ours).tokens, trace.join(theirs).tokens)


SAMPLED = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.8]),
        "sampling": st.sampled_from(["gumbel", "categorical"]),
        "top_p": st.sampled_from([None, None, 0.9]),
        "top_k": st.sampled_from([None, None, 5]),
        "parity": st.sampled_from(["none", "none", "llada", "dinfer", "fast_dllm", "llada2"]),
        "stop": st.sampled_from(["eos", "eos_block", "eos_fill", "eos_return", "eos_any", "none"]),
    }
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:steps=")  # with a threshold they are a floor
@settings(max_examples=SEARCH // 2, **LOOSE)  # four programs each
@given(
    st.sampled_from(["plain", "shifted", "blocks"]),
    RULES,
    CACHES,
    REST,
    SAMPLED,
    st.integers(0, 10_000),
)
def test_any_watched_run_is_the_run(kind, rule, cache, rest, sampled, seed):
    options = rest | cache | sampled | rule
    try:
        make_setup(tiny(kind).resolve(DecodeConfig.of(SHORT | options)), tiny(kind).config)
    except ValueError:
        reject()
    llm = tiny(kind)
    check(LLM(llm.model), options, seed)  # keeps no programs
    drop_programs()
