"""What users rely on: properties of the decode loop, on the defaults and on other models."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm import DecodeConfig
from jdllm.batches import bucket, plan_batches
from jdllm.decode import decode
from jdllm.llm import LLM
from jdllm.model.config import NO_ID
from jdllm.model.model import assemble, named
from jdllm.parity import make_setup
from tests.support.marks import quick
from tests.support.tiny_models import TINY, canvases, random_prompts, tiny

SHORT: dict[str, Any] = {"gen_length": 12, "block_length": 4}

# Cases of the properties: a kind of model and options; they share compiled programs.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("plain", {"threshold": 0.5}),
    "sampled": ("plain", {"threshold": 0.5, "temperature": 0.8}),
    "smoothed": ("plain", {"threshold": 0.5, "smooth.weight": 0.3, "cache": "prefix"}),
    "edited": ("plain", {"threshold": 0.4, "edit.threshold": 0.3}),
    "shifted": ("shifted", {"threshold": 0.5}),
    "blocks": ("blocks", {"threshold": 0.5}),
    "blocks edited": ("blocks", {"threshold": 0.4, "edit.threshold": 0.3}),
}
LENGTHS = [3, 31, 12, 7, 20]


def settled(case: str, **more: Any) -> tuple[LLM, DecodeConfig]:
    """A model that likes to end, and the config of a case."""
    kind, options = CASES[case]
    config = DecodeConfig.of(SHORT | options | more)
    return tiny(kind, 3.0), config


@pytest.mark.parametrize("case", quick(CASES, "default", "sampled", "blocks edited"))
def test_row_is_the_same_alone_and_in_company(case: str):
    llm, config = settled(case)
    prompts = random_prompts(1, LENGTHS)
    rows, nfe, _ = canvases(llm, config, prompts)
    alone = [canvases(llm, config, [prompt]) for prompt in prompts]
    assert rows == [row for [row], _, _ in alone]
    assert nfe == [count for _, [count], _ in alone]
    assert len(set(nfe)) > 1


@pytest.mark.parametrize("case", quick(CASES, "default", "sampled", "smoothed", "blocks edited"))
def test_prompts_never_change_and_nothing_follows_the_end(case: str):
    """Also where a prompt holds eos or [MASK], in the tail that shares a block with the answer."""
    llm, config = settled(case)
    prompts = random_prompts(5, LENGTHS)
    for prompt in prompts:
        prompt[-1], prompt[-2], prompt[0] = TINY.mask_id, TINY.eos_id, TINY.mask_id
    rows, _, _ = canvases(llm, config, prompts)
    ended = 0
    for row, prompt in zip(rows, prompts, strict=True):
        assert row[: len(prompt)] == prompt
        answer = row[len(prompt) :]
        ends = [i for i, token in enumerate(answer) if token in TINY.stop_ids]
        if ends:
            ended += 1
            assert set(answer[ends[0] + 1 :]) <= {TINY.eos_id}
        assert TINY.mask_id not in answer
    assert ended


def test_rows_are_the_same_in_other_buckets():
    config = DecodeConfig(gen_length=12, block_length=4, threshold=0.5)
    llm, prompts = tiny("plain", 3.0), random_prompts(1, [3, 40])
    together = llm.generate(prompts, config)
    assert together == [llm.generate([prompt], config)[0] for prompt in prompts]
    assert {c.finish_reason for c in together} <= {"stop", "length"}
    assert not set(sum((c.ids for c in together), [])) & set(TINY.stop_ids)


def test_repeated_prompts_draw_differently_and_runs_repeat():
    config = DecodeConfig(gen_length=12, temperature=1.0, seed=7)
    prompt = random_prompts(2, [9])[0]
    first = tiny().generate([prompt] * 4, config)
    assert len({tuple(c.ids) for c in first}) > 1
    assert first == tiny().generate([prompt] * 4, config)
    other = dataclasses.replace(config, seed=8)
    assert first != tiny().generate([prompt] * 4, other)


@pytest.mark.parametrize("kind", quick(["plain", "shifted", "blocks"], "plain"))
@pytest.mark.parametrize("sampling", ["gumbel", "categorical"])
def test_samples_of_the_head_are_those_of_logits(kind: str, sampling: str):
    """A top_k of the whole vocabulary drops nothing, but its rule reads logits."""
    asked = {"temperature": 0.8, "threshold": 0.3, "sampling": sampling}
    config = DecodeConfig.of(SHORT | asked)
    through = dataclasses.replace(config, top_k=TINY.vocab)
    llm, prompts = tiny(kind), random_prompts(8, LENGTHS)
    rules = [make_setup(llm.resolve(c), llm.config).unmask for c in (config, through)]
    assert [rule.special is None for rule in rules] == [False, True]
    assert canvases(llm, config, prompts)[:2] == canvases(llm, through, prompts)[:2]


def test_stopping_early_never_changes_the_completion():
    llm, config = settled("default")
    prompts = random_prompts(6, LENGTHS)
    early, early_nfe, _ = canvases(llm, config, prompts)
    full, full_nfe, _ = canvases(llm, dataclasses.replace(config, stop="none"), prompts)
    assert sum(early_nfe) < sum(full_nfe)
    for a, b, prompt in zip(early, full, prompts, strict=True):
        ends = [i for i in range(len(prompt), len(a)) if a[i] in TINY.stop_ids]
        end = ends[0] + 1 if ends else len(a)
        assert a[:end] == b[:end]


# Every rule and every parity once: the kind of model, options, and whether all masks go.
RUNS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "threshold": ("blocks", {"stable_steps": 2}, True),
    "factor": ("plain", {"rule": "factor", "cache": "prefix"}, True),
    "hierarchy": ("shifted", {"rule": "hierarchy"}, True),
    "entropy_bound": ("plain", {"rule": "entropy_bound", "remasking": "entropy"}, True),
    "allowance": ("plain", {"rule": "allowance", "align": True}, True),
    "editing": ("blocks", {"edit.threshold": 0.0, "edit.passes": 3}, True),
    "llada": ("plain", {"rule": "quota", "parity": "llada"}, True),
    "fast_dllm": ("plain", {"parity": "fast_dllm"}, True),
    "dinfer": ("plain", {"edge": "slack", "parity": "dinfer"}, True),
    "dream": (
        "shifted",
        {"rule": "origin", "schedule": "timesteps", "parity": "dream", "block_length": 0},
        True,
    ),
    "fast_dream": (
        "shifted",
        {"rule": "quota", "schedule": "timesteps", "remasking": "entropy", "parity": "fast_dream"},
        True,
    ),
    "llada2": ("blocks", {"steps": 4, "schedule": "columns", "cache": "none", "parity": "llada2"},
               False),
    "sglang": (
        "blocks",
        {"edit.threshold": 0.0, "edit.passes": 2, "edit.delete_id": 7, "edit.split_id": 8,
         "cache": "none", "parity": "sglang"},
        True,
    ),
    "apd": ("shifted", {"rule": "verify", "verify.lookahead": 3, "parity": "apd"}, True),
}  # fmt: skip


def broken(kind: str, value: float) -> LLM:
    """A model whose last norm is `value`."""
    llm = tiny(kind)
    arrays = {name: leaf[...] for name, leaf in named(llm.model).items()}
    arrays["norm"] = jnp.full_like(arrays["norm"], value)
    return LLM(assemble(llm.config, arrays, llm.mesh))


@pytest.mark.parametrize("name", quick(RUNS, "entropy_bound", "editing", "dream", "apd"))
def test_it_ends_for_any_weights(name: str):
    """[MASK] by far the most likely token everywhere; logits that are NaN; and infinite ones."""
    kind, options, fills = RUNS[name]
    config = DecodeConfig.of(SHORT | {"gen_length": 8, "stop": "none"} | options)
    verifier = None
    if config.rule == "verify":
        facts = dataclasses.replace(TINY, causal=True, mask_id=NO_ID)
        arrays = {name: leaf[...] for name, leaf in named(tiny().model).items()}
        verifier = LLM(assemble(facts, arrays, tiny().mesh))
    prompts = random_prompts(3, [5, 8])
    for llm in (tiny(kind, 1.0, 30.0), broken(kind, np.nan), broken(kind, np.inf)):
        resolved = llm.resolve(config)
        limit = make_setup(resolved, llm.config).call_limit
        rows, nfe, forwards = canvases(llm, config, prompts, verifier)
        answers = [row[len(p) :] for row, p in zip(rows, prompts, strict=True)]
        assert not fills or all(TINY.mask_id not in answer for answer in answers)
        assert max(nfe) <= forwards <= limit
        if config.parity == "none" and config.edit.threshold is None:
            blocks = len(answers[0]) // 4 + 1
            assert max(nfe) <= len(answers[0]) + 1 + blocks  # steps, a prefill, commits


def test_the_lowest_index_wins_ties():
    """A head of zeros: every token is as likely as any other, and every position as sure."""
    llm = tiny()
    arrays = {name: leaf[...] for name, leaf in named(llm.model).items()}
    arrays["head"] = jnp.zeros_like(arrays["head"])
    model = assemble(TINY, arrays)
    config = llm.resolve(DecodeConfig(gen_length=6, block_length=3, rule="quota", stop="none"))
    setup = make_setup(config, TINY)
    request = llm._request(random_prompts(0, [4]), [0], config, setup)
    state = decode(model, request, setup, trace=True)
    canvas = np.asarray(state.trace.tokens)[: int(state.forwards) + 1, 0, 4:10]
    expected = np.where(np.arange(6) < np.arange(7)[:, None], 0, TINY.mask_id)
    np.testing.assert_array_equal(canvas, expected)


PLANS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"cache": "none"}),
    ("plain", {"cache": "prefix", "refresh_every": 3}),
    ("plain", {"cache": "dual"}),
    ("plain", {"cache": "dual", "vicinity.before": 2, "vicinity.after": 2, "vicinity.warmup": 2}),
    ("plain", {"cache": "dual", "smooth.weight": 0.3}),
    ("plain", {"cache": "block", "edit.threshold": 0.5}),
    ("shifted", {}),
    ("blocks", {}),
    ("plain", {"parity": "dinfer", "refresh_every": 2}),
]


@pytest.mark.parametrize(("kind", "options"), PLANS, ids=range(len(PLANS)))
def test_nothing_crosses_to_the_host_between_steps(kind: str, options: dict[str, Any]):
    """The lowered program holds two nested loops and no callback, infeed, send or outfeed."""
    llm = tiny(kind)
    config = llm.resolve(DecodeConfig.of({"gen_length": 12, "block_length": 4} | options))
    setup = make_setup(config, llm.config)
    request = llm._request(random_prompts(0, [4, 6]), [0, 0], config, setup)
    text = decode.lower(llm.model, request, setup).as_text()
    assert text.count("stablehlo.while") >= 2
    assert not re.search(r"callback|infeed|outfeed|stablehlo\.(send|recv)", text)


def test_tracing_costs_nothing_when_off():
    llm = tiny()
    config = llm.resolve(DecodeConfig(gen_length=16, block_length=8))
    setup = make_setup(config, TINY)
    request = llm._request(random_prompts(0, [4, 6]), [0, 0], config, setup)
    states = [
        jax.eval_shape(lambda m, r, t=trace: decode(m, r, setup, trace=t), llm.model, request)
        for trace in (False, True)
    ]
    assert states[0].trace is None
    assert states[1].trace.tokens.shape == (setup.call_limit + 1, *request.tokens.shape)


@pytest.mark.slow
def test_programs_stay_few_for_a_mixed_workload():
    llm = LLM(tiny().model)
    prompts = random_prompts(8, list(range(1, 60)))
    llm.generate(prompts, DecodeConfig(gen_length=4), batch_size=16)
    assert len(llm._programs) <= 4


def test_batches_cover_every_prompt_once_within_one_bucket():
    lengths = np.random.default_rng(0).integers(1, 700, 101).tolist()
    batches = plan_batches(lengths, 16, 4)
    assert sorted(i for batch in batches for i in batch) == list(range(101))
    assert all(len(batch) <= 16 for batch in batches)
    assert all(len({bucket(lengths[i]) for i in batch}) == 1 for batch in batches)
    assert all(bucket(n) >= n and bucket(n) - n < max(32, n / 4) for n in range(1, 5000))


def test_llm_refuses_what_it_cannot_serve():
    llm = tiny()
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate(["hello"])
    with pytest.raises(ValueError, match=r"token ids must lie in 0..63"):
        llm.generate([[1, 64]])
    with pytest.raises(ValueError, match="exceed the model's 128 columns"):
        llm.generate([[1] * 120], DecodeConfig(gen_length=16))
