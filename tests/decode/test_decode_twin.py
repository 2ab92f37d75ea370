"""The decode loop against its plain twin: canvases and NFE, row by row, in mixed batches.

A row of CASES is one compiled program; hypothesis searches prompts, their lengths and how likely
ends are. The marker slow runs MORE of them, and searches the settings too.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from jdllm import LLM, DecodeConfig
from jdllm.parity import make_setup
from tests.support.oracle import is_close, oracle
from tests.support.tiny_models import adapted, canvases, plain, random_prompts, tiny

LOOSE: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
SEARCH = 100  # examples, new ones in every run, or those of --hypothesis-seed=N
VALUES = {
    "seed": st.integers(0, 10_000),
    "lengths": st.permutations([1, 6, 13]),
    "end_bias": st.sampled_from([0.5, 1.5, 3.0]),
}
SHORT: dict[str, Any] = {"gen_length": 12, "block_length": 4}
GAUSSIAN: dict[str, Any] = {
    "rule": "quota", "schedule": "gaussian", "steps": 11, "gaussian.peak": (0.25, 0.5),
    "gaussian.width": (0.2, 0.3), "stop": "none", "block_length": None, "block_lengths": (5, 7),
}  # fmt: skip
EXACT: dict[str, Any] = {"threshold": 0.6, "stop": "none"}


def check(kind: str, options: dict[str, Any], seed: int, lengths: list[int], end_bias: float):
    config = DecodeConfig.of(SHORT | options)
    llm = adapted(kind, end_bias) if config.exit.aims else tiny(kind, end_bias)
    maps = plain_maps(llm, config)
    prompts = random_prompts(seed, lengths)
    judge = tiny("judge", end_bias) if config.rule == "verify" else None
    rows, nfe, forwards = canvases(llm, config, prompts, judge)
    model, resolved, second = plain(llm), llm.resolve(config), judge and plain(judge)
    expected = [oracle(model, resolved, prompt, second, maps) for prompt in prompts]
    if (rows, nfe) != ([tokens for tokens, _ in expected], [n for _, n in expected]):
        assume(not any(is_close(model, resolved, prompt, second, maps) for prompt in prompts))
    assert rows == [tokens for tokens, _ in expected]
    assert nfe == [count for _, count in expected]
    assert max(nfe) <= forwards <= sum(nfe)
    assert max(nfe) <= (config.max_forwards or 1000)


def plain_maps(llm: LLM, config: DecodeConfig) -> dict[str, np.ndarray]:
    """What the exit compares activations with, as float64; the paper's is one vector each."""
    if not config.exit.aims:
        return {}
    found, paper = llm.maps.of(config.exit), config.exit.mode == "paper"
    names = sorted(found)[-2:-1] if paper else sorted(found)  # k, q, v: the query
    return {
        name: np.linalg.norm(found[name], axis=1, keepdims=True) if paper else found[name]
        for name in names
    }


ALIKE = {2, 4, 5, 7, 9, 12, 14, 15, 18, 19, 20, 21, 23, 25, 26, 28, 31}
"""Numbers of cases that are slow ones: others by default are like them, or recorded runs are."""


def marked(cases: list[tuple[str, dict[str, Any]]], alike: set[int]) -> Iterator[Any]:
    """The cases by number, some of them marked slow."""
    for i, case in enumerate(cases):
        yield pytest.param(*case, id=str(i), marks=[pytest.mark.slow] if i in alike else [])


MEANT = pytest.mark.filterwarnings("ignore:steps=")  # a floor beside a threshold

CASES: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"threshold": 0.6}),
    ("plain", {"threshold": 0.5, "edge": "above", "cache": "prefix", "block_length": 5}),
    ("plain", {"threshold": 0.7, "edge": "slack", "credit.alpha": 0.7, "cache": "none"}),
    ("plain", {"rule": "quota", "steps": 6, "refresh_every": 2}),
    ("plain", {"threshold": 0.6, "block_length": None, "block_lengths": (2, 5, 6)}),
    ("plain", {"rule": "quota", "steps": 9, "block_length": None, "block_lengths": (5, 3, 4),
               "cache": "none"}),
    ("plain", {"rule": "quota", "steps": 4, "schedule": "columns", "remasking": "topk_margin",
               "cache": "prefix", "vicinity.before": 3, "block_length": 6}),
    ("plain", {"rule": "quota", "steps": 9, "schedule": "timesteps", "remasking": "entropy",
               "vicinity.warmup": 3, "vicinity.before": 2, "vicinity.after": 2, "block_length": 5}),
    ("plain", {"rule": "quota", "tokens_per_step": 2, "remasking": "leftright",
               "verify.lookahead": 3, "cache": "none", "block_length": 0}),
    ("plain", {"rule": "factor", "factor": 1.2, "cache": "prefix", "refresh_every": 3}),
    ("plain", {"rule": "hierarchy", "threshold": 0.8, "low_threshold": 0.3, "block_length": 6}),
    ("plain", {"rule": "entropy_bound", "remasking": "entropy", "entropy_bound": 1.5,
               "cache": "none"}),
    ("plain", {"threshold": 0.4, "edit.threshold": 0.3, "edit.penalty": 0.5, "cache": "none"}),
    ("plain", {"threshold": 0.6, "cache": "block", "edit.threshold": 0.4, "stable_steps": 2}),
    ("plain", {"rule": "quota", "steps": 12, "stable_steps": 1, "block_length": 6}),
    ("plain", {"threshold": 0.7, "max_forwards": 5, "cache": "block", "stop": "none"}),
    ("plain", {"threshold": 0.6, "cfg_scale": 1.0, "cache": "block"}),
    ("plain", {"rule": "hierarchy", "threshold": 0.6, "smooth.weight": 0.3, "smooth.growth": 0.1,
               "smooth.decay": 0.1, "cache": "prefix", "stable_steps": 1}),
    ("plain", {"threshold": 0.6, "align": True, "block_length": 5}),
    ("plain", {"rule": "allowance", "threshold": 0.8, "steps": 12, "block_length": 4,
               "align": True}),
    ("plain", {"threshold": 0.6, "stop": "eos_block", "stop_fill": True}),
    ("plain", {"logits_eos_inf": True, "threshold": 1.0, "remasking": "entropy"}),
    ("plain", {"threshold": 0.6, "steps": 3, "stop": "none"}),
    ("blocks", {"threshold": 0.9, "tokens_per_step": 2, "edit.threshold": 0.4}),
    ("shifted", {"threshold": 0.6}),
    ("shifted", {"threshold": 0.6, "cache": "prefix", "vicinity.before": 2, "align": True}),
    ("plain", {"rule": "verify", "verify.weight": 0.8, "stop": "none"}),
    ("plain", GAUSSIAN | {"exit.mode": "code", "exit.map": "weights", "exit.threshold": (0.8, 0.4),
                          "exit.patience": (2, 1, 3)}),
    ("plain", {"threshold": 0.8, "exit.mode": "prophet", "exit.polish": (2,)}),
    ("plain", {"rule": "klass", "threshold": 0.3, "klass.kl": 0.5, "klass.steps": 1,
               "cache": "none", "block_length": 6}),
    ("blocks", EXACT),
    ("blocks", EXACT | {"cache": "none"}),
    ("blocks", {"threshold": 0.5, "edit.threshold": 0.4, "stop": "eos_block"}),
]  # fmt: skip
EXITS: list[tuple[str, dict[str, Any]]] = [
    ("plain", GAUSSIAN | {"exit.mode": "paper", "exit.map": "weights", "exit.threshold": (0.02,),
                          "exit.patience": (2,)}),
    ("plain", GAUSSIAN | {"exit.mode": "code", "exit.map": "gaussian", "exit.threshold": (1.0,),
                          "exit.patience": (3,), "exit.required": (2,), "exit.temperature": 0.3,
                          "cfg_scale": 0.0, "exit.polish": (1,)}),
    ("plain", GAUSSIAN | {"exit.mode": "step", "exit.threshold": (3, 2)}),
    ("plain", GAUSSIAN | {"exit.mode": "unchanged", "exit.patience": (1,), "cache": "dual"}),
    ("plain", {"rule": "quota", "steps": 12, "exit.mode": "entropy", "exit.threshold": (1.5,)}),
    ("plain", {"rule": "quota", "exit.mode": "prophet", "exit.threshold": (0.5,)}),
    ("blocks", {"rule": "quota", "exit.mode": "sched", "exit.threshold": (0.4,)}),
    ("shifted", {"threshold": 0.9, "exit.mode": "sched", "exit.curve": "linear",
                 "exit.polish": (3, 1), "exit.threshold": (0.5,)}),
    ("plain", {"rule": "quota", "exit.mode": "sched", "exit.curve": "exponential",
               "exit.threshold": (0.6,), "cache": "prefix", "cfg_scale": 1.0}),
    ("plain", {"rule": "hierarchy", "exit.mode": "unchanged", "exit.polish": (2,),
               "exit.patience": (2,), "stable_steps": 2, "max_forwards": 9}),
]  # fmt: skip
MORE: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"threshold": 0.8, "edge": "above", "credit.alpha": 2.0,
               "block_length": 6}),
    ("plain", {"threshold": 0.4, "edit.threshold": 0.2, "edit.passes": 2}),
    ("plain", {"threshold": 0.6, "cache": "block", "block_length": 5}),
    ("plain", {"threshold": 0.6, "cache": "block", "block_length": None,
               "block_lengths": (5, 1, 6)}),
    ("shifted", {"rule": "quota", "steps": 12, "schedule": "columns", "cache": "prefix",
                 "block_length": None, "block_lengths": (1, 7, 9)}),
    ("plain", {"rule": "allowance", "threshold": 0.8, "steps": 6, "block_length": None,
               "block_lengths": (3, 2, 8), "vicinity.before": 2, "vicinity.after": 3}),
    ("plain", {"threshold": 0.7, "max_forwards": 5, "cache": "prefix"}),
    ("plain", {"threshold": 0.6, "smooth.weight": 0.3, "block_length": 6}),
    ("plain", {"rule": "quota", "steps": 6, "confidence_eos_eot_inf": True}),
    ("shifted", {"threshold": 0.6, "cache": "block"}),
    ("shifted", {"rule": "quota", "steps": 6, "schedule": "timesteps", "remasking": "entropy",
                 "cache": "none", "block_length": 6}),
    ("blocks", {"rule": "quota", "steps": 12, "schedule": "columns"}),
]  # fmt: skip


@MEANT
@pytest.mark.parametrize(("kind", "options"), [*marked(CASES, ALIKE)])
@settings(max_examples=4, derandomize=True, **LOOSE)
@given(**VALUES)
def test_loop_equals_twin(kind: str, options: dict[str, Any], **values):
    check(kind, options, **values)


def test_a_block_cache_is_exact_for_a_block_causal_model():
    """The tokens of cache=none, for a prefill and one commit for every block but the last more."""
    llm, prompts = tiny("blocks"), random_prompts(7, [1, 6, 13])
    config = DecodeConfig(**SHORT | EXACT)
    rows, nfe, _ = canvases(llm, config, prompts)
    full, steps, _ = canvases(llm, dataclasses.replace(config, cache="none"), prompts)
    assert rows == full
    blocks = [-(-(len(p) + 12) // 4) - len(p) // 4 for p in prompts]
    extra = [(len(p) >= 4) + n - 1 for p, n in zip(prompts, blocks, strict=True)]
    assert nfe == [a + b for a, b in zip(steps, extra, strict=True)]


def some(**options: list[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({name: st.sampled_from(them) for name, them in options.items()})


LINES = [0.3, 0.6, 0.9, 1.0]
RULES = st.one_of(
    some(threshold=LINES, edge=["at_least", "above", "slack"], steps=[None, 6],
         remasking=["low_confidence", "topk_margin"]),
    some(threshold=LINES, tokens_per_step=[2, 3], **{"edit.threshold": [None, 0.5]}),
    some(threshold=[0.5, 1.5], remasking=["entropy"], edge=["at_least", "above"]),
    some(threshold=LINES, edge=["above", "slack"], **{"credit.alpha": [0.7, 2.0]}),
    some(threshold=LINES, **{"edit.threshold": [0.2, 0.5, 0.9], "edit.passes": [0, 1, 16],
                             "edit.penalty": [0.0, 0.5]}),
    some(threshold=LINES, **{"smooth.weight": [0.1, 0.3], "smooth.growth": [0.02, 0.1],
                             "smooth.decay": [0.02, 0.2]}),
    some(rule=["quota"], steps=[6, 12], schedule=["masks", "columns", "timesteps"],
         remasking=["low_confidence", "leftright", "topk_margin", "entropy"],
         confidence_eos_eot_inf=[False, False, True]),
    some(rule=["quota"], tokens_per_step=[1, 2, 5], remasking=["leftright", "entropy"],
         **{"verify.lookahead": [0, 3]}),
    some(rule=["factor"], factor=[0.5, 1.0, 2.0]),
    some(rule=["hierarchy"], threshold=LINES, low_threshold=[0.1, 0.4],
         **{"smooth.weight": [0.0, 0.3]}),
    some(rule=["entropy_bound"], remasking=["entropy"], entropy_bound=[0.2, 1.0, 4.0]),
    some(rule=["allowance"], threshold=LINES, steps=[6, 12]),
)  # fmt: skip
CACHES = st.one_of(
    some(cache=["none", "prefix", "dual", "block"]),
    some(
        cache=["prefix", "dual"],
        refresh_every=[1, 2, 3],
        **{"vicinity.before": [0, 2], "vicinity.warmup": [0, 3]},
    ),
    some(
        cache=["dual"],
        **{"vicinity.before": [0, 3], "vicinity.after": [2, 9], "vicinity.warmup": [0, 3]},
    ),
)
REST = some(
    stop=["eos", "eos_block", "none"],
    stop_fill=[False, False, True],
    stable_steps=[None, None, 1, 2],
    max_forwards=[None, None, 4],
    cfg_scale=[0.0, 0.0, 1.0],
    logits_eos_inf=[False, False, True],
    align=[None, True],
    block_length=[4, 5, 6, 0],
)


@MEANT
@pytest.mark.slow
@settings(max_examples=SEARCH, **LOOSE)
@given(
    some(block_length=[0, 2, 3, 4, 5, 6, 12], align=[None, True],
         **{"verify.weight": [0.3, 0.6, 0.8, 0.95], "verify.lookahead": [0, 0, 3]}),
    st.integers(0, 10_000),
)  # fmt: skip
def test_verified_drafts_equal_twin_for_any_block_length(options, seed):
    check("plain", {"rule": "verify"} | options, seed, [1, 6, 13], 1.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:steps=")  # with a threshold they are a floor
@settings(max_examples=SEARCH, **LOOSE)
@given(st.sampled_from(["plain", "shifted", "blocks"]), RULES, CACHES, REST, st.integers(0, 10_000))
def test_loop_equals_twin_for_any_settings(kind, rule, cache, rest, seed):
    options = rest | cache | rule
    try:
        config = DecodeConfig.of(SHORT | options)
        make_setup(tiny(kind).resolve(config), tiny(kind).config)
    except ValueError:
        reject()
    check(kind, options, seed, [1, 6, 13], 1.0)


ALL = CASES + EXITS + MORE


@MEANT
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:steps=")  # with a threshold they are a floor
@pytest.mark.parametrize(("kind", "options"), ALL, ids=range(len(ALL)))
@settings(max_examples=SEARCH, **LOOSE)
@given(**VALUES)
def test_loop_equals_twin_at_length(kind: str, options: dict[str, Any], **values):
    check(kind, options, **values)
