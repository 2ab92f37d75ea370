"""What a DecodeConfig refuses, and that it says so with the fix, when it is parsed."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest

from jdllm import DecodeConfig
from jdllm.decode import Credit, Edit, Smooth
from jdllm.decode.checks import CONFLICTS, READERS, RENAMED
from jdllm.decode.config import default_settings
from jdllm.parity import make_setup
from jdllm.runtime.fields import flatten, leaves, nested, replaced
from jdllm.score.likelihood import LikelihoodConfig
from tests.support.tiny_models import TINY


def refuse(options: dict[str, Any]) -> None:
    """What the caller expects to raise."""
    DecodeConfig.of(options)


INDEL = {"edit.delete_id": 3, "edit.split_id": 4, "edit.threshold": 0.5}
# One config for every row of CONFLICTS, in its order, and part of what it says.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rule": "quota", "steps": 4, "tokens_per_step": 2}, "keep one"),
    ({"threshold": 1.5}, "threshold=1.5 is out of range"),
    ({"steps": 4, "rule": "factor"}, "steps=4 means nothing to rule=factor"),
    ({"tokens_per_step": 2, "rule": "factor"}, "quota, threshold or klass, not rule=factor"),
    ({"rule": "entropy_bound"}, "set remasking=entropy, not low_confidence"),
    ({"rule": "hierarchy", "remasking": "entropy"}, "set remasking=low_confidence, not entropy"),
    ({"remasking": "random"}, "remasking=random is none, use rule=quota"),
    ({"vicinity.before": 2, "cache": "none"}, "need cache=prefix or dual, not cache=none"),
    ({"rule": "quota", "parity": "llada", "cache": "dual"}, "set cache=none, not cache=dual"),
    ({"rule": "quota", "edit.threshold": 0.5}, "needs rule=threshold, not rule=quota"),
    ({"smooth.weight": 0.3, "cfg_scale": 1.0}, "use one of them"),
    ({"rule": "origin"}, "set schedule=timesteps, not masks"),
    ({"rule": "verify", "cache": "dual"}, "leave out cache=dual"),
    ({"edit.threshold": 0.5, "remasking": "entropy"}, "set remasking=low_confidence, not entropy"),
    ({"rule": "quota", "smooth.weight": 0.3}, "set rule=threshold or hierarchy"),
    (INDEL | {"top_p": 0.9}, "leave out .* top_p"),
    ({"verify.lookahead": 3, "cache": "dual"}, "set cache=none, not cache=dual"),
    ({"verify.lookahead": 3, "rule": "quota", "parity": "llada"}, "set parity=none or apd"),
    ({"verify.lookahead": 3, "edit.threshold": 0.5}, "use one of them"),
    ({"block_lengths": (4, 0)}, "a block has 1 column or more"),
    ({"block_lengths": (4, 8), "block_length": 4}, "stand instead of block_length=4; keep one"),
    ({"block_lengths": (4, 8), "gen_length": 13}, "must sum to gen_length=13 or more"),
    ({"block_lengths": (4, 8), "align": True}, r"leave out block_lengths=\(4, 8\)"),
    ({"block_lengths": (4, 8), "parity": "dinfer"}, "parity=dinfer has blocks of one length"),
    ({"exit.mode": "code", "cache": "dual"}, "was never compared with cache=dual"),
    ({"exit.mode": "entropy", "edit.threshold": 0.5}, "may still replace; use one of them"),
    ({"exit.mode": "entropy", "parity": "dinfer"}, "set parity=none or edit, not parity=dinfer"),
    ({"exit.mode": "entropy", "rule": "verify"}, "rule=verify has none, use rule=quota"),
    ({"parity": "edit"}, "set schedule=gaussian, not masks"),
    (
        {"rule": "quota", "parity": "edit", "schedule": "gaussian", "cache": "dual"},
        "parity=edit has no cache; set cache=none",
    ),
    ({"stop_fill": True}, "belongs to stop=eos_block, not stop=eos"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=range(len(WRONG)))
def test_combinations_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodeConfig.of(options)


def unchecked(options: dict[str, Any]) -> DecodeConfig:
    """The config that is refused."""
    candidate, plain = object.__new__(DecodeConfig), DecodeConfig()
    for field in dataclasses.fields(DecodeConfig):
        value, inner = getattr(plain, field.name), f"{field.name}."
        changes = {n.removeprefix(inner): v for n, v in options.items() if n.startswith(inner)}
        value = replaced(value, changes) if changes else options.get(field.name, value)
        object.__setattr__(candidate, field.name, value)
    return candidate


def test_every_row_of_conflicts_has_its_example():
    """Each example is wrong by its own row, and the rows before do not hide it."""
    assert len(WRONG) == len(CONFLICTS)
    for (options, _), (wrong, sentence) in zip(WRONG, CONFLICTS, strict=True):
        with pytest.raises(ValueError) as refused:
            DecodeConfig.of(options)
        plain = DecodeConfig()
        candidate = unchecked(options)
        assert wrong(candidate)
        assert str(refused.value) == sentence.format(c=candidate)
        assert not wrong(plain)


ELSEWHERE: dict[str, tuple[Any, dict[str, Any]]] = {
    "threshold": (0.5, {"rule": "quota"}),
    "edge": ("above", {"rule": "hierarchy"}),
    "low_threshold": (0.3, {}),
    "factor": (2.0, {}),
    "entropy_bound": (0.5, {}),
    "verify.weight": (0.3, {}),
    "verify.window": (8, {}),
    "top_k_first": (True, {"top_k": 5}),
    "alg_temp": (0.5, {}),
    "schedule": ("columns", {}),
    "minimal_topk": (2, {}),
    "eps": (0.1, {"rule": "quota"}),
    "klass.kl": (0.5, {}),
    "klass.steps": (3, {}),
    "gaussian.peak": ((0.5,), {"rule": "quota"}),
    "gaussian.width": ((0.5,), {"rule": "quota"}),
    "remasking": ("topk_margin", {"rule": "verify"}),
    "credit.alpha": (0.7, {"rule": "verify"}),
    "logits_eos_inf": (True, {"rule": "verify"}),
    "confidence_eos_eot_inf": (True, {"rule": "quota", "remasking": "entropy"}),
    "edit.passes": (3, {}),
    "edit.penalty": (0.5, {}),
    "vicinity.after": (3, {"cache": "prefix"}),
    "dinfer.expected_tpf": (4, {}),
    "dinfer.maximum_unroll": (2, {}),
}


def test_every_option_that_some_rules_ignore_has_its_example():
    assert set(ELSEWHERE) == {name for names, _, _ in READERS for name in names}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_options_that_would_be_ignored_are_refused(name: str):
    value, options = ELSEWHERE[name]
    DecodeConfig.of(options)
    with pytest.raises(ValueError, match=f"{re.escape(f'{name}={value}')} is read by .*; leave"):
        DecodeConfig.of(options | {name: value})


# One for every group with a switch, and for every pair that goes together.
INSIDE: list[tuple[dict[str, Any], str]] = [
    ({"credit.beta": 0.5}, "credit.beta=0.5 is read by credit.alpha only"),
    ({"credit.gamma": 0.5}, "credit.gamma=0.5 is read by credit.alpha only"),
    ({"smooth.init": 0.5}, "smooth.init=0.5 is read by smooth.weight only"),
    ({"smooth.growth": 0.5}, "smooth.growth=0.5 is read by smooth.weight only"),
    ({"smooth.decay": 0.5, "smooth.weight": 0}, "smooth.decay=0.5 is read by smooth.weight only"),
    ({"edit.delete_id": 3, "edit.threshold": 0.5}, "set both or neither"),
    ({"edit.delete_id": 3, "edit.split_id": 3, "edit.threshold": 0.5}, "must differ"),
    ({"edit.delete_id": 3, "edit.split_id": 4}, "set edit.threshold too"),
    ({"exit.patience": (3,)}, "is read by exit.mode only"),
    ({"exit.mode": "entropy", "exit.map": "late"}, "is read by exit.mode=code or paper only"),
    ({"exit.mode": "code", "exit.energy": "l1"}, "exit.energy=l1 is read by exit.mode=paper only"),
    ({"exit.mode": "code", "exit.curve": "linear"}, "is read by exit.mode=sched only"),
    ({"exit.mode": "step"}, "leaves after a number of steps; set exit.threshold="),
    ({"rule": "quota", "schedule": "gaussian", "gaussian.peak": ()}, "must have a value per block"),
]


@pytest.mark.parametrize(("options", "message"), INSIDE, ids=range(len(INSIDE)))
def test_a_group_refuses_what_makes_no_sense_in_it(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodeConfig.of(options)


def test_zero_is_off_but_an_edit_threshold_of_zero_edits():
    off = DecodeConfig(credit=Credit(0.0), smooth=Smooth(0), edit=Edit(None))
    assert off == DecodeConfig()
    setup = make_setup(DecodeConfig().resolve(model=TINY), TINY)
    assert (setup.smooth, setup.lookahead, setup.plan.window, setup.extra_steps) == (
        None, None, None, 0,
    )  # fmt: skip
    edits = make_setup(DecodeConfig(edit=Edit(0.0)).resolve(model=TINY), TINY)
    assert edits.extra_steps == 18


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_refused_with_the_new(old: str):
    new = RENAMED[old]
    assert new in default_settings() and old not in default_settings()
    group, _, field = new.partition(".")
    options: Any = {old: 1}
    for make in (lambda: DecodeConfig(**options), lambda: DecodeConfig.named("llada", **options)):
        with pytest.raises(ValueError, match=f"^{old} is {new} now"):
            make()
    with pytest.raises(ValueError, match=rf"{group}={group.title()}\({field}=...\)"):
        dataclasses.replace(DecodeConfig(), **options)


def test_settings_are_read_by_dotted_names_and_nested():
    config = DecodeConfig(edit=Edit(0.0, passes=3), threshold=0.5, block_lengths=(4, 8))
    dotted = {"edit.threshold": 0.0, "edit.passes": 3, "threshold": 0.5, "block_lengths": (4, 8)}
    assert DecodeConfig.of(dotted) == config
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert stored["edit"]["threshold"] == 0.0 and DecodeConfig.of(stored) == config
    assert flatten(stored) == leaves(config) and set(leaves(config)) == set(default_settings())
    resolved = config.resolve(model=TINY)
    assert DecodeConfig.of(dataclasses.asdict(resolved)) == resolved == resolved.resolve(model=TINY)
    with pytest.raises(ValueError, match="edit.treshold is no decode setting; try edit.threshold"):
        DecodeConfig.of({"edit": {"treshold": 0.5}})


def test_blocks_of_unequal_length_say_how_long_the_canvas_is():
    found = DecodeConfig(block_lengths=(4, 8, 2)).resolve(gen_length=128)
    assert (found.gen_length, found.block_length, found.block_lengths) == (14, 8, (4, 8, 2))
    short = DecodeConfig(block_lengths=(4, 8, 2), gen_length=11).resolve()
    assert short.block_lengths == (4, 8), "no block begins behind the canvas"
    quota = DecodeConfig(rule="quota", block_lengths=(4, 8, 2)).resolve()
    assert quota.steps == 24, "one token each in the longest"
    with pytest.raises(ValueError, match="steps=8 must be a multiple of the 3 blocks"):
        DecodeConfig(rule="quota", steps=8, block_lengths=(4, 8, 2)).resolve()
    causal = dataclasses.replace(TINY, block_causal=4)
    with pytest.raises(ValueError, match="a block-causal model has blocks of one length"):
        DecodeConfig(block_lengths=(4, 8)).resolve(model=causal)


def test_origin_ranks_nothing():
    with pytest.raises(ValueError, match="remasking=entropy is read by other rules than origin"):
        DecodeConfig(rule="origin", schedule="timesteps", remasking="entropy")


RANGES = {
    prefix + name: limits
    for prefix, kind in nested(DecodeConfig)
    for name, limits in kind.ranges.items()  # pyright: ignore[reportAttributeAccessIssue]
}


@pytest.mark.parametrize("name", RANGES)
def test_values_out_of_range_are_refused(name: str):
    low, high = RANGES[name]
    for value in (low - 1, high + 1) if high < float("inf") else (low - 1,):
        several = isinstance(default_settings()[name], tuple)
        value = (value,) if several else value
        with pytest.raises(ValueError, match=f"{re.escape(f'{name}={value}')} is out of range: it"):
            refuse({name: value})


TYPED: list[tuple[str, Any, str]] = [
    ("vicinity.before", "3", "vicinity.before='3' must be a whole number"),
    (
        "block_lengths",
        (4, 2.5),
        r"block_lengths=\(4, 2.5\) must be a list, each item a whole number",
    ),
    ("gen_length", 8.5, "gen_length=8.5 must be a whole number or None"),
    ("gen_length", True, "gen_length=True must be a whole number or None"),
    ("steps", (4,), r"steps=\(4,\) must be a whole number or None"),
    ("temperature", None, "temperature=None must be a finite number"),
    ("temperature", float("inf"), "temperature=inf must be a finite number"),
    ("temperature", float("nan"), "temperature=nan must be a finite number"),
    ("threshold", "0.9", "threshold='0.9' must be a finite number or None"),
    ("stop_fill", 1, "stop_fill=1 must be true or false"),
    ("align", "yes", "align='yes' must be true or false or None"),
    ("rule", None, "rule=None must be threshold or"),
    ("cache", 3, "cache=3 must be none or prefix or dual or block or None"),
    ("gen_length", 0, "gen_length=0 is out of range"),
    ("verify.lookahead", -1, "verify.lookahead=-1 is out of range"),
]


@pytest.mark.parametrize(("name", "value", "message"), TYPED, ids=str)
def test_values_of_another_type_are_refused_by_name(name: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        refuse({name: value})


OWNERS = [*nested(DecodeConfig), ("", LikelihoodConfig)]


@pytest.mark.parametrize(("prefix", "owner"), OWNERS, ids=str)
def test_every_field_is_checked(prefix: str, owner: type):
    for field in dataclasses.fields(owner):
        for value in (object(), {"a": 1}, np.zeros(2)):
            with pytest.raises(ValueError, match=f"^{prefix}{field.name}=.* must be |credit.alpha"):
                owner(**{field.name: value})


def test_a_group_is_no_number():
    wrong: Any = 3
    with pytest.raises(ValueError, match=r"^edit=3 must be Edit\(...\)"):
        DecodeConfig(edit=wrong)
    with pytest.raises(ValueError, match="edit is no decode setting; try edit.threshold, edit.pa"):
        DecodeConfig.of({"edit": 3})


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
    ({"shift_logits": True}, {"smooth.weight": 0.3}, "set smooth.weight=0"),
    ({"causal": True}, {}, "it can judge drafts as a verifier"),
]


@pytest.mark.parametrize(("facts", "options", "message"), MODELS, ids=range(len(MODELS)))
def test_settings_that_do_not_fit_the_model_are_refused(facts, options, message):
    model = dataclasses.replace(TINY, **facts)
    lengths = {"gen_length": 8, "block_length": 4}
    config = DecodeConfig.of(lengths | options).resolve(model=model)
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
