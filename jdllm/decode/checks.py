"""What a DecodeConfig may not say: values out of range, and combinations that make no sense."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jdllm.runtime.fields import check_fields, leaves
from jdllm.runtime.hints import nearest_settings

INFINITY = float("inf")
Ranges = Mapping[str, tuple[float, float]]
"""Name -> least and greatest value; None is always allowed."""

RANGES: Ranges = {
    "gen_length": (1, INFINITY), "block_length": (0, INFINITY), "threshold": (0, INFINITY),
    "low_threshold": (0, 1), "factor": (0, INFINITY), "entropy_bound": (0, INFINITY),
    "steps": (1, INFINITY), "tokens_per_step": (1, INFINITY), "minimal_topk": (1, INFINITY),
    "eps": (0, 1), "temperature": (0, INFINITY), "top_p": (0, 1), "top_k": (1, INFINITY),
    "alg_temp": (0, INFINITY), "cfg_scale": (0, INFINITY), "refresh_every": (1, INFINITY),
    "stable_steps": (1, INFINITY), "max_forwards": (1, INFINITY), "seed": (-(2**63), 2**63 - 1),
}  # fmt: skip
"""Those of the settings that stand in no group."""

RENAMED: dict[str, str] = {
    "credit": "credit.alpha", "credit_alpha": "credit.alpha", "credit_beta": "credit.beta",
    "credit_gamma": "credit.gamma", "edit_threshold": "edit.threshold",
    "edit_passes": "edit.passes", "edit_penalty": "edit.penalty", "delete_id": "edit.delete_id",
    "split_id": "edit.split_id", "cont_weight": "smooth.weight", "cont_init": "smooth.init",
    "cont_growth": "smooth.growth", "threshold_decay": "smooth.decay",
    "prefix_look": "vicinity.before", "after_look": "vicinity.after", "warmup": "vicinity.warmup",
    "verify_weight": "verify.weight", "kv_window": "verify.window",
    "lookahead": "verify.lookahead", "expected_tpf": "dinfer.expected_tpf",
    "maximum_unroll": "dinfer.maximum_unroll",
}  # fmt: skip
"""What settings were called before they had groups -> what they are called now."""

BY_THRESHOLD = ("threshold", "hierarchy", "allowance", "klass")
SMOOTH = ("threshold", "hierarchy")
COUNTLESS = ("factor", "hierarchy", "entropy_bound", "verify")
NOT_IN_INDEL = (
    "temperature", "top_p", "top_k", "credit.alpha", "edit.penalty", "smooth.weight",
    "logits_eos_inf", "confidence_eos_eot_inf", "steps", "tokens_per_step",
)  # fmt: skip
BY_PROBABILITY = ("factor", "hierarchy", "allowance", "klass")


def _counts(c: Any) -> bool:
    """Whether a schedule spreads steps."""
    by_steps = c.rule in ("quota", "origin", "klass") or (c.rule == "threshold" and c.steps)
    return bool(by_steps and not c.tokens_per_step)


# Settings that would be ignored elsewhere: their names, whether a config reads them, and the words
# for where they are read.
READERS: tuple[tuple[tuple[str, ...], Callable[[Any], Any], str], ...] = (
    (
        ("threshold",),
        lambda c: c.rule in BY_THRESHOLD,
        "rule=threshold, hierarchy, allowance or klass",
    ),
    (("edge",), lambda c: c.rule == "threshold", "rule=threshold"),
    (("low_threshold",), lambda c: c.rule == "hierarchy", "rule=hierarchy"),
    (("factor",), lambda c: c.rule == "factor", "rule=factor"),
    (("entropy_bound",), lambda c: c.rule == "entropy_bound", "rule=entropy_bound"),
    (("klass.kl", "klass.steps"), lambda c: c.rule == "klass", "rule=klass"),
    (("verify.weight", "verify.window"), lambda c: c.rule == "verify", "rule=verify"),
    (
        ("top_k_first",),
        lambda c: c.top_p is not None and c.top_k is not None,
        "top_p together with top_k",
    ),
    (("alg_temp",), lambda c: c.rule == "quota", "rule=quota"),
    (("schedule",), _counts, "rule=quota, origin or klass, and rule=threshold with steps"),
    (
        ("minimal_topk",),
        lambda c: _counts(c) or c.rule == "allowance",
        "rule=quota, origin, klass or allowance, and rule=threshold with steps",
    ),
    (("eps",), lambda c: c.schedule == "timesteps", "schedule=timesteps"),
    (("gaussian.peak", "gaussian.width"), lambda c: c.schedule == "gaussian", "schedule=gaussian"),
    (
        ("remasking", "credit.alpha", "logits_eos_inf"),
        lambda c: c.rule != "verify",
        "other rules than verify",
    ),
    (("remasking",), lambda c: c.rule != "origin", "other rules than origin"),
    (
        ("confidence_eos_eot_inf",),
        lambda c: c.remasking == "low_confidence" and c.rule not in ("origin", "verify"),
        "rules that rank by remasking=low_confidence",
    ),
    (
        ("edit.passes", "edit.penalty"),
        lambda c: c.edit.on or c.parity == "sglang",
        "edit.threshold",
    ),
    # dInfer's prefix cache sees to the canvas's end anyway, and may be told to look there
    (
        ("vicinity.after",),
        lambda c: c.cache in (None, "dual") or c.parity == "dinfer",
        "cache=dual",
    ),
    (
        ("dinfer.expected_tpf", "dinfer.maximum_unroll"),
        lambda c: c.parity == "dinfer",
        "parity=dinfer",
    ),
)

# What is wrong, and the sentence that says so and how to mend it; {c} is the config.
CONFLICTS: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (
        lambda c: c.steps and c.tokens_per_step,
        "steps={c.steps} and tokens_per_step={c.tokens_per_step} say one thing twice; keep one",
    ),
    (
        lambda c: (c.threshold or 0) > 1 and c.remasking != "entropy",
        "threshold={c.threshold} is out of range: a probability lies in [0, 1]",
    ),
    (
        lambda c: c.steps and c.rule in COUNTLESS,
        "steps={c.steps} means nothing to rule={c.rule}; leave it out, use rule=quota, or take "
        "back what a preset sets: steps=None",
    ),
    (
        lambda c: c.tokens_per_step and c.rule not in ("quota", "threshold", "klass"),
        "tokens_per_step={c.tokens_per_step} belongs to rule=quota, threshold or klass, not "
        "rule={c.rule}",
    ),
    (
        lambda c: c.rule == "entropy_bound" and c.remasking != "entropy",
        "rule=entropy_bound sums entropies; set remasking=entropy, not {c.remasking}",
    ),
    (
        lambda c: c.rule in BY_PROBABILITY and c.remasking != "low_confidence",
        "rule={c.rule} compares probabilities; set remasking=low_confidence, not {c.remasking}",
    ),
    (
        lambda c: c.rule == "threshold" and c.remasking in ("random", "leftright"),
        "rule=threshold needs a confidence; remasking={c.remasking} is none, use rule=quota",
    ),
    (
        lambda c: (
            (any(vars(c.vicinity).values()) or c.refresh_every) and c.cache in ("none", "block")
        ),
        "vicinity.* and refresh_every need cache=prefix or dual, not cache={c.cache}",
    ),
    (
        lambda c: c.parity in ("llada", "dream") and c.cache not in (None, "none"),
        "parity={c.parity} has no cache; set cache=none, not cache={c.cache}",
    ),
    (
        lambda c: c.edit.on and c.rule != "threshold",
        "edit.threshold={c.edit.threshold} needs rule=threshold, not rule={c.rule}",
    ),
    (
        lambda c: c.smooth.weight and c.cfg_scale,
        "smooth.weight={c.smooth.weight} feeds embeddings, cfg_scale={c.cfg_scale} masks tokens; "
        "use one of them",
    ),
    (
        lambda c: c.rule == "origin" and c.schedule != "timesteps",
        "rule=origin draws by Dream's times; set schedule=timesteps, not {c.schedule}",
    ),
    (
        lambda c: c.rule == "verify" and c.cache not in (None, "none"),
        "rule=verify caches by verify.window; leave out cache={c.cache}",
    ),
    (
        lambda c: c.edit.on and c.remasking != "low_confidence",
        "edit.threshold={c.edit.threshold} compares probabilities; set remasking=low_confidence, "
        "not {c.remasking}",
    ),
    (
        lambda c: c.smooth.weight and (c.rule not in SMOOTH or c.remasking != "low_confidence"),
        "smooth.weight={c.smooth.weight} lowers a threshold on probabilities; set "
        "rule=threshold or hierarchy and remasking=low_confidence, not rule={c.rule} and "
        "remasking={c.remasking}",
    ),
    (
        lambda c: (
            c.edit.delete_id is not None
            and any(leaves(c)[name] not in (None, 0, False) for name in NOT_IN_INDEL)
        ),
        "edit.delete_id={c.edit.delete_id} is a greedy rule of its own; leave out "
        + ", ".join(NOT_IN_INDEL),
    ),
    (
        lambda c: c.verify.lookahead and c.cache not in (None, "none"),
        "verify.lookahead={c.verify.lookahead} hides what a cache keeps; set cache=none, "
        "not cache={c.cache}",
    ),
    (
        lambda c: c.verify.lookahead and c.parity not in ("none", "apd"),
        "verify.lookahead={c.verify.lookahead} is apd's; set parity=none or apd, "
        "not parity={c.parity}",
    ),
    (
        lambda c: c.verify.lookahead and c.edit.on,
        "verify.lookahead={c.verify.lookahead} sees masks only, "
        "edit.threshold={c.edit.threshold} tokens; use one of them",
    ),
    (
        lambda c: c.block_lengths and min(c.block_lengths) < 1,
        "block_lengths={c.block_lengths} are out of range: a block has 1 column or more",
    ),
    (
        lambda c: c.block_lengths and c.block_length not in (None, max(c.block_lengths)),
        "block_lengths={c.block_lengths} stand instead of block_length={c.block_length}; keep one",
    ),
    (
        lambda c: c.block_lengths and sum(c.block_lengths) < (c.gen_length or 0),
        "block_lengths={c.block_lengths} must sum to gen_length={c.gen_length} or more",
    ),
    (
        lambda c: c.block_lengths and c.align,
        "align=True counts equal blocks from column 0; leave out block_lengths={c.block_lengths}",
    ),
    (
        lambda c: c.block_lengths and c.parity not in ("none", "edit"),
        "parity={c.parity} has blocks of one length; leave out block_lengths={c.block_lengths}",
    ),
    (
        lambda c: c.exit.aims and c.cache not in (None, "none"),
        "exit.mode={c.exit.mode} was never compared with cache={c.cache}, which feeds a block "
        "alone; set cache=none, or a mode that reads logits",
    ),
    (
        lambda c: c.exit.on and c.edit.on,
        "exit.mode={c.exit.mode} leaves blocks whose tokens edit.threshold={c.edit.threshold} may "
        "still replace; use one of them",
    ),
    (
        lambda c: c.exit.on and c.parity not in ("none", "edit"),
        "exit.mode={c.exit.mode} is EDIT's; set parity=none or edit, not parity={c.parity}",
    ),
    (
        lambda c: c.exit.on and c.rule == "verify",
        "exit.mode={c.exit.mode} counts the steps of blocks; rule=verify has none, use rule=quota",
    ),
    (
        lambda c: c.parity == "edit" and c.schedule != "gaussian",
        "parity=edit has EDIT's schedule; set schedule=gaussian, not {c.schedule}",
    ),
    (
        lambda c: c.parity == "edit" and c.cache not in (None, "none"),
        "parity=edit has no cache; set cache=none, not cache={c.cache}",
    ),
    (
        lambda c: c.stop_fill and c.stop != "eos_block",
        "stop_fill belongs to stop=eos_block, not stop={c.stop}",
    ),
)


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Refuses a dataclass of settings one of whose values is not within its `ranges`.

    ValueError that names the field behind `prefix`.
    """
    for name, (low, high) in settings.ranges.items():
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(low <= one <= high for one in values):
            raise ValueError(
                f"{prefix}{name}={value} is out of range: it must lie in [{low}, {high}]"
            )


def check_read(
    values: Mapping[str, Any], defaults: Mapping[str, Any], names: Iterable[str], where: str
) -> None:
    """Refuses settings that nobody reads, but for the defaults; ValueError says who does."""
    for name in names:
        if values[name] != defaults[name]:
            raise ValueError(
                f"{name}={values[name]} is read by {where} only; leave it out, or take back what "
                f"a preset sets: {name}={defaults[name]}"
            )


def check_group(group: Any, name: str, switch: str = "") -> None:
    """Refuses a group of settings by the types and ranges of its fields; ValueError names one.

    While the field `switch` has its default, which is off, the others must have theirs.
    """
    prefix = f"{name}."
    check_fields(group, prefix)
    check_ranges(group, prefix)
    defaults = {f"{prefix}{f.name}": f.default for f in dataclasses.fields(group)}
    values = {f"{prefix}{field}": value for field, value in vars(group).items()}
    if switch and values[prefix + switch] == defaults[prefix + switch]:
        check_read(values, defaults, values, prefix + switch)


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuses names that are no `known` setting; ValueError has the new or the nearest names."""
    known = list(known)
    for name in names:
        if name in known:
            continue
        if name in RENAMED:
            raise ValueError(f"{name} is {RENAMED[name]} now")
        near = nearest_settings(name, known) or known
        raise ValueError(f"{name} is no decode setting; try {', '.join(near)}")


def refuse_old_names[T](owner: type[T]) -> type[T]:
    """Returns the dataclass; keywords of old raise ValueError with what they are called now."""
    init = owner.__init__

    @functools.wraps(init)
    def checked(self: T, *values: Any, **settings: Any) -> None:
        for name, value in settings.items():
            if name in RENAMED and not dataclasses.is_dataclass(value):
                group, _, field = RENAMED[name].partition(".")
                raise ValueError(
                    f"{name} is {RENAMED[name]} now: {group}={group.title()}({field}=...), of "
                    "jdllm.decode"
                )
        init(self, *values, **settings)

    owner.__init__ = checked
    return owner
