"""What a DecodeConfig refuses, and that it says so with the fix, when it is parsed."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from jdllm import DecodeConfig
from jdllm.decode.checks import CONFLICTS, RANGES, READERS
from jdllm.parity import make_setup
from jdllm.score.likelihood import LikelihoodConfig
from tests.support.tiny_models import TINY


def refuse(options: dict[str, Any]) -> None:
    """What the caller expects to raise."""
    DecodeConfig(**options)


# One config for every row of CONFLICTS, in its order, and part of what it says.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rule": "quota", "steps": 4, "tokens_per_step": 2}, "keep one"),
    ({"threshold": 1.5}, "threshold=1.5 is out of range"),
    ({"steps": 4, "rule": "factor"}, "steps=4 means nothing to rule=factor"),
    ({"tokens_per_step": 2, "rule": "factor"}, "quota or threshold, not rule=factor"),
    ({"rule": "entropy_bound"}, "set remasking=entropy, not low_confidence"),
    ({"rule": "hierarchy", "remasking": "entropy"}, "set remasking=low_confidence, not entropy"),
    ({"remasking": "random"}, "remasking=random is none, use rule=quota"),
    ({"prefix_look": 2, "cache": "none"}, "need cache=prefix or dual, not cache=none"),
    ({"rule": "quota", "parity": "llada", "cache": "dual"}, "set cache=none, not cache=dual"),
    ({"delete_id": 3, "edit_threshold": 0.5}, "set both or neither"),
    ({"delete_id": 3, "split_id": 4}, "set edit_threshold too"),
    ({"rule": "quota", "edit_threshold": 0.5}, "needs rule=threshold, not rule=quota"),
    ({"cont_weight": 0.3, "cfg_scale": 1.0}, "use one of them"),
    ({"rule": "origin"}, "set schedule=timesteps, not masks"),
    ({"rule": "verify", "cache": "dual"}, "leave out cache=dual"),
    ({"edit_threshold": 0.5, "remasking": "entropy"}, "set remasking=low_confidence, not entropy"),
    ({"rule": "quota", "cont_weight": 0.3}, "set rule=threshold or hierarchy"),
    ({"delete_id": 3, "split_id": 3, "edit_threshold": 0.5}, "must differ"),
    ({"delete_id": 3, "split_id": 4, "edit_threshold": 0.5, "top_p": 0.9}, "leave out .* top_p"),
    ({"lookahead": 3, "cache": "dual"}, "set cache=none, not cache=dual"),
    ({"lookahead": 3, "rule": "quota", "parity": "llada"}, "set parity=none or apd"),
    ({"lookahead": 3, "edit_threshold": 0.5}, "use one of them"),
    ({"kv_window": 8}, "belongs to rule=verify, not rule=threshold"),
    ({"stop_fill": True}, "belongs to stop=eos_block, not stop=eos"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=range(len(WRONG)))
def test_combinations_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**options)


def test_every_row_of_conflicts_has_its_example():
    """Each example is wrong by its own row, and the rows before do not hide it."""
    assert len(WRONG) == len(CONFLICTS)
    for (options, _), (wrong, sentence) in zip(WRONG, CONFLICTS, strict=True):
        with pytest.raises(ValueError) as refused:
            DecodeConfig(**options)
        plain = DecodeConfig()
        candidate = object.__new__(DecodeConfig)
        for field in dataclasses.fields(DecodeConfig):
            value = options.get(field.name, getattr(plain, field.name))
            object.__setattr__(candidate, field.name, value)
        assert wrong(candidate)
        assert str(refused.value) == sentence.format(c=candidate)
        assert not wrong(plain)


ELSEWHERE: dict[str, tuple[Any, dict[str, Any]]] = {
    "threshold": (0.5, {"rule": "quota"}),
    "edge": ("above", {"rule": "hierarchy"}),
    "low_threshold": (0.3, {}),
    "factor": (2.0, {}),
    "entropy_bound": (0.5, {}),
    "verify_weight": (0.3, {}),
    "top_k_first": (True, {"top_k": 5}),
    "alg_temp": (0.5, {}),
    "schedule": ("columns", {}),
    "minimal_topk": (2, {}),
    "eps": (0.1, {"rule": "quota"}),
    "remasking": ("topk_margin", {"rule": "verify"}),
    "credit": (True, {"rule": "verify"}),
    "logits_eos_inf": (True, {"rule": "verify"}),
    "confidence_eos_eot_inf": (True, {"rule": "quota", "remasking": "entropy"}),
    "credit_alpha": (0.5, {}),
    "credit_beta": (0.5, {}),
    "credit_gamma": (0.5, {}),
    "edit_passes": (3, {}),
    "edit_penalty": (0.5, {}),
    "cont_init": (0.5, {}),
    "cont_growth": (0.5, {}),
    "threshold_decay": (0.5, {}),
    "after_look": (3, {"cache": "prefix"}),
    "expected_tpf": (4, {}),
    "maximum_unroll": (2, {}),
}


def test_every_option_that_some_rules_ignore_has_its_example():
    assert set(ELSEWHERE) == {name for names, _, _ in READERS for name in names}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_options_that_would_be_ignored_are_refused(name: str):
    value, options = ELSEWHERE[name]
    DecodeConfig(**options)
    with pytest.raises(ValueError, match=f"{name}={value} is read by .*; leave it out"):
        DecodeConfig(**options | {name: value})


def test_origin_ranks_nothing():
    with pytest.raises(ValueError, match="remasking=entropy is read by other rules than origin"):
        DecodeConfig(rule="origin", schedule="timesteps", remasking="entropy")


@pytest.mark.parametrize("name", RANGES)
def test_values_out_of_range_are_refused(name: str):
    low, high = RANGES[name]
    for value in (low - 1, high + 1) if high < float("inf") else (low - 1,):
        with pytest.raises(ValueError, match=f"{name}={value} is out of range: it must lie in"):
            refuse({name: value})


TYPED: list[tuple[str, Any, str]] = [
    ("prefix_look", "3", "prefix_look='3' must be an integer"),
    ("gen_length", 8.5, "gen_length=8.5 must be an integer or None"),
    ("gen_length", True, "gen_length=True must be an integer or None"),
    ("steps", [4], r"steps=\[4\] must be an integer or None"),
    ("temperature", None, "temperature=None must be a finite number"),
    ("temperature", float("inf"), "temperature=inf must be a finite number"),
    ("temperature", float("nan"), "temperature=nan must be a finite number"),
    ("threshold", "0.9", "threshold='0.9' must be a finite number or None"),
    ("credit", 1, "credit=1 must be True or False"),
    ("align", "yes", "align='yes' must be True or False or None"),
    ("rule", None, "rule=None must be threshold or"),
    ("cache", 3, "cache=3 must be none or prefix or dual or block or None"),
    ("gen_length", 0, "gen_length=0 is out of range"),
    ("lookahead", 0, "lookahead=0 is out of range"),
]


@pytest.mark.parametrize(("name", "value", "message"), TYPED, ids=str)
def test_values_of_another_type_are_refused_by_name(name: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        refuse({name: value})


@pytest.mark.parametrize("owner", [DecodeConfig, LikelihoodConfig])
def test_every_field_is_checked(owner: type):
    for field in dataclasses.fields(owner):
        for value in (object(), {"a": 1}, np.zeros(2)):
            with pytest.raises(ValueError, match=f"^{field.name}=.* must be "):
                owner(**{field.name: value})


def test_numbers_of_numpy_and_whole_numbers_are_numbers():
    numbers: dict[str, Any] = {"gen_length": np.int64(8), "temperature": np.float32(0.5)}
    assert DecodeConfig(threshold=1, **numbers) == DecodeConfig(
        gen_length=8, threshold=1.0, temperature=0.5
    )


def test_steps_beside_a_threshold_are_a_floor_and_said_to_be_one():
    """A Fast-dLLM script sets both, and reads the threshold only."""
    script: dict[str, Any] = {"gen_length": 32, "block_length": 8, "threshold": 0.9}
    with pytest.warns(UserWarning, match=r"take 4 tokens at least.*leave steps out"):
        DecodeConfig(steps=8, **script).resolve()
    assert DecodeConfig(steps=32, **script).resolve().steps == 32  # one token: says nothing
    official = DecodeConfig(steps=2, schedule="columns", parity="llada2", **script)
    assert official.resolve().steps == 2  # LLaDA2 means it


def test_words_that_are_no_option_are_refused():
    with pytest.raises(ValueError, match="rule=treshold must be threshold or factor or quota"):
        refuse({"rule": "treshold"})


@pytest.mark.parametrize("rule", ["quota", "origin", "allowance", "threshold"])
def test_steps_that_do_not_divide_are_refused(rule: Any):
    schedule: Any = "timesteps" if rule == "origin" else "masks"
    config = DecodeConfig(gen_length=16, block_length=8, rule=rule, steps=7, schedule=schedule)
    with pytest.raises(ValueError, match="steps=7 must be a multiple of the 2 blocks"):
        config.resolve()


MODELS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"block_causal": 4}, {"cache": "dual"}, "use cache=block, which is exact"),
    ({"block_causal": 4}, {"align": False}, "align=false would straddle"),
    ({"shift_logits": True}, {"cont_weight": 0.3}, "set cont_weight=0"),
    ({"causal": True}, {}, "it can judge drafts as a verifier"),
]


@pytest.mark.parametrize(("facts", "options", "message"), MODELS, ids=range(len(MODELS)))
def test_settings_that_do_not_fit_the_model_are_refused(facts, options, message):
    model = dataclasses.replace(TINY, **facts)
    config = DecodeConfig(gen_length=8, block_length=4, **options).resolve(model=model)
    with pytest.raises(ValueError, match=message):
        make_setup(config, model)


def test_an_open_config_is_refused():
    with pytest.raises(ValueError, match=r"call DecodeConfig.resolve first"):
        make_setup(DecodeConfig(), TINY)


@pytest.mark.parametrize("rule", ["threshold", "factor", "quota", "hierarchy", "allowance"])
def test_resolving_twice_changes_nothing(rule: Any):
    once = DecodeConfig(rule=rule).resolve(model=TINY)
    assert once.resolve(model=TINY) == once


@pytest.mark.parametrize("kind", [{}, {"block_causal": 4}], ids=["dense", "block-causal"])
def test_the_order_of_the_filters_is_the_models(kind: dict[str, Any]):
    model = dataclasses.replace(TINY, **kind)
    both = DecodeConfig(top_k=5, top_p=0.9)
    assert both.resolve(model=model).top_k_first is bool(kind)
    assert dataclasses.replace(both, top_k_first=True).resolve(model=model).top_k_first
    for one in (DecodeConfig(top_k=5), DecodeConfig(top_p=0.9)):
        assert one.resolve(model=model).top_k_first is None
