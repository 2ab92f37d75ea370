"""How the references' parameters read: what an algorithm does not read is left out."""

from typing import Any

import pytest

from jdllm.runtime.fields import leaves
from tests.support.reference_configs import CONFIGS, sglang_config

DINFER = {"gen_length": 16, "block_length": 8, "llm": "BlockWiseDiffusionLLM"}
FAST_DREAM = {"max_new_tokens": 16, "block_length": 8, "steps": 8, "dual_cache": True}
DREAM = {"max_new_tokens": 16, "steps": 8}
LLADA2 = {"gen_length": 16, "block_length": 8, "steps": 8, "threshold": 0.9, "temperature": 0.0}
APD = {"alg": "apd", "max_new_tokens": 16, "apd_mixture_weight": 0.7}
BD = DINFER | {"llm": "BlockDiffusionLLM", "decoder": "threshold"}

# family, parameters, those that its algorithm ignores
IGNORED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llada", {"remasking": "random"}, {"confidence_eos_eot_inf": True, "mask_id": 3}),
    ("fast_llada", {"variant": "nvlabs", "factor": 1.0}, {"threshold": 0.9, "steps": 8}),
    ("fast_llada", {"variant": "dinfer", "threshold": 0.9}, {"factor": None, "steps": 8}),
    ("fast_llada", {"variant": "nvlabs", "steps": 8}, {"threshold": None, "factor": None}),
    ("dream", DREAM | {"alg": "origin"}, {"alg_temp": 0.5, "threshold": 0.9}),
    ("dream", DREAM | {"alg": "entropy"}, {"threshold": 0.9, "block_length": 8}),
    ("dream", DREAM | {"alg": "confidence_threshold"}, {"eps": 0.1, "alg_temp": 0.0}),
    ("fast_dream", FAST_DREAM | {"alg": "entropy"}, {"threshold": 0.9}),
    ("fast_dream", FAST_DREAM | {"alg": "confidence_threshold"}, {"eps": 0.1, "alg_temp": 0.5}),
    ("dinfer", DINFER | {"decoder": "hierarchy"}, {"decay_beta": 0.5, "cache_update_freq": 3}),
    ("dinfer", DINFER | {"decoder": "credit"}, {"low_threshold": 0.2, "prefix_look": 4}),
    ("dinfer", DINFER | {"decoder": "threshold"}, {"cont_weight": 0.3, "threshold_decay": 0.5}),
    ("dinfer", BD, {"cache": "prefix", "start_block_align": False, "warmup_steps": 2}),
    ("apd", APD, {"tokens_per_step": 3, "steps": 8}),
    ("traces_official", LLADA2, {"top_p": 0.9, "top_k": 5, "eos_early_stop": False}),
    ("traces_official", LLADA2 | {"editing_threshold": 0.9}, {"minimal_topk": 2, "steps": 4}),
]


@pytest.mark.parametrize(("family", "params", "ignored"), IGNORED, ids=range(len(IGNORED)))
def test_what_an_algorithm_ignores_is_ignored(family: str, params, ignored):
    assert CONFIGS[family](params | ignored) == CONFIGS[family](params)


def test_sglangs_algorithms_ignore_each_others_options():
    extra = {"edit_threshold": 0.4, "max_post_edit_steps": 2, "penalty_lambda": 1.0}
    ids = {"delete_token_id": 3, "split_token_id": 4}
    low, joint, indel = (
        f"sglang.{name}" for name in ("low_confidence", "joint_threshold", "joint_threshold_indel")
    )
    assert sglang_config(extra | ids, low) == sglang_config({}, low)
    assert sglang_config(extra | ids, joint) == sglang_config(extra, joint)
    assert sglang_config(extra | ids, indel).edit.penalty == 0
    assert sglang_config(extra | ids, indel).edit.delete_id == 3


READ: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dinfer", BD | {"early_stop": False}, {"stop": "none", "stop_fill": False}),
    ("dinfer", BD, {"stop": "eos_block", "stop_fill": True, "cache": "block"}),
    ("traces_dinfer", BD | {"engine": {"type": "bd_mask", "early_stop": False}},
     {"stop": "eos_block", "stop_fill": False, "cache": "none"}),
    ("dinfer", DINFER | {"decoder": "threshold", "early_stop": False},
     {"stop": "eos_block", "stop_fill": False}),
    ("dinfer", DINFER | {"decoder": "hierarchy"}, {"threshold": 1.0, "low_threshold": 0.4}),
    ("apd", APD | {"temperature": 0.2, "top_p": 0.9, "top_k": 5},
     {"sampling": "categorical", "temperature": 0.2, "top_p": 0.9, "top_k": 5}),
    ("apd", {"alg": "leftright", "max_new_tokens": 16, "temperature": 0.2, "max_lookahead": 4},
     {"rule": "quota", "tokens_per_step": 1, "verify.lookahead": 4, "sampling": "categorical"}),
    ("traces_official", LLADA2 | {"temperature": 0.7, "top_p": 0.9},
     {"sampling": "categorical", "temperature": 0.7, "top_p": 0.9}),
    ("llada", {"gen_length": 8, "block_length": 8, "steps": 20}, {"steps": 20}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "params", "expected"), READ, ids=range(len(READ)))
def test_what_no_open_recording_sets_is_read(family: str, params, expected):
    config = CONFIGS[family](params).resolve()
    assert {name: leaves(config)[name] for name in expected} == expected
