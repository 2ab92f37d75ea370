"""What a DecodeConfig may not say: values out of range, and combinations that make no sense."""

from collections.abc import Callable
from typing import Any

INFINITY = float("inf")

# name -> least and greatest value; None is always allowed
RANGES: dict[str, tuple[float, float]] = {
    "gen_length": (1, INFINITY), "block_length": (0, INFINITY), "lookahead": (1, INFINITY),
    "threshold": (0, INFINITY), "low_threshold": (0, 1), "factor": (0, INFINITY),
    "entropy_bound": (0, INFINITY), "verify_weight": (0, 1), "steps": (1, INFINITY),
    "tokens_per_step": (1, INFINITY), "minimal_topk": (1, INFINITY), "eps": (0, 1),
    "temperature": (0, INFINITY), "top_p": (0, 1), "top_k": (1, INFINITY),
    "alg_temp": (0, INFINITY), "cfg_scale": (0, INFINITY), "edit_passes": (0, INFINITY),
    "edit_threshold": (0, 1), "cont_weight": (0, 1), "refresh_every": (1, INFINITY),
    "prefix_look": (0, INFINITY), "after_look": (0, INFINITY), "warmup": (0, INFINITY),
    "kv_window": (1, INFINITY), "stable_steps": (1, INFINITY), "max_forwards": (1, INFINITY),
    "expected_tpf": (1, INFINITY), "maximum_unroll": (1, INFINITY),
    "edit_penalty": (0, INFINITY), "credit_alpha": (0, INFINITY), "credit_beta": (0, 1),
    "credit_gamma": (0, INFINITY), "cont_init": (0, 1), "cont_growth": (0, 1),
    "threshold_decay": (0, 1), "delete_id": (0, INFINITY), "split_id": (0, INFINITY),
    "seed": (-(2**63), 2**63 - 1),
}  # fmt: skip

BY_THRESHOLD = ("threshold", "hierarchy", "allowance")
SMOOTH = ("threshold", "hierarchy")
COUNTLESS = ("factor", "hierarchy", "entropy_bound", "verify")
NOT_IN_INDEL = (
    "temperature", "top_p", "top_k", "credit", "edit_penalty", "cont_weight", "logits_eos_inf",
    "confidence_eos_eot_inf", "steps", "tokens_per_step",
)  # fmt: skip
BY_PROBABILITY = ("factor", "hierarchy", "allowance")


def _counts(c: Any) -> bool:
    """Whether a schedule spreads steps."""
    by_steps = c.rule in ("quota", "origin") or (c.rule == "threshold" and c.steps)
    return bool(by_steps and not c.tokens_per_step)


# Options that would be ignored elsewhere: their names, whether a config reads them, and the words
# for where they are read.
READERS: tuple[tuple[tuple[str, ...], Callable[[Any], Any], str], ...] = (
    (
        ("threshold",),
        lambda c: c.rule in BY_THRESHOLD,
        "rule=threshold, hierarchy or allowance",
    ),
    (("edge",), lambda c: c.rule == "threshold", "rule=threshold"),
    (("low_threshold",), lambda c: c.rule == "hierarchy", "rule=hierarchy"),
    (("factor",), lambda c: c.rule == "factor", "rule=factor"),
    (("entropy_bound",), lambda c: c.rule == "entropy_bound", "rule=entropy_bound"),
    (("verify_weight",), lambda c: c.rule == "verify", "rule=verify"),
    (
        ("top_k_first",),
        lambda c: c.top_p is not None and c.top_k is not None,
        "top_p together with top_k",
    ),
    (("alg_temp",), lambda c: c.rule == "quota", "rule=quota"),
    (("schedule",), _counts, "rule=quota or origin, and rule=threshold with steps"),
    (
        ("minimal_topk",),
        lambda c: _counts(c) or c.rule == "allowance",
        "rule=quota, origin or allowance, and rule=threshold with steps",
    ),
    (("eps",), lambda c: c.schedule == "timesteps", "schedule=timesteps"),
    (
        ("remasking", "credit", "logits_eos_inf"),
        lambda c: c.rule != "verify",
        "other rules than verify",
    ),
    (("remasking",), lambda c: c.rule != "origin", "other rules than origin"),
    (
        ("confidence_eos_eot_inf",),
        lambda c: c.remasking == "low_confidence" and c.rule not in ("origin", "verify"),
        "rules that rank by remasking=low_confidence",
    ),
    (("credit_alpha", "credit_beta", "credit_gamma"), lambda c: c.credit, "credit=true"),
    (
        ("edit_passes", "edit_penalty"),
        lambda c: c.edit_threshold is not None or c.parity == "sglang",
        "edit_threshold",
    ),
    (("cont_init", "cont_growth", "threshold_decay"), lambda c: c.cont_weight, "cont_weight"),
    # dInfer's prefix cache sees to the canvas's end anyway, and takes an after_look that reaches it
    (
        ("after_look",),
        lambda c: c.cache in (None, "dual") or c.parity == "dinfer",
        "cache=dual",
    ),
    (("expected_tpf", "maximum_unroll"), lambda c: c.parity == "dinfer", "parity=dinfer"),
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
        lambda c: c.tokens_per_step and c.rule not in ("quota", "threshold"),
        "tokens_per_step={c.tokens_per_step} belongs to rule=quota or threshold, not rule={c.rule}",
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
            (c.prefix_look or c.after_look or c.warmup or c.refresh_every)
            and c.cache in ("none", "block")
        ),
        "prefix_look, after_look, warmup and refresh_every need cache=prefix or dual, "
        "not cache={c.cache}",
    ),
    (
        lambda c: c.parity in ("llada", "dream") and c.cache not in (None, "none"),
        "parity={c.parity} has no cache; set cache=none, not cache={c.cache}",
    ),
    (
        lambda c: (c.delete_id is None) != (c.split_id is None),
        "delete_id={c.delete_id} and split_id={c.split_id} go together; set both or neither",
    ),
    (
        lambda c: c.delete_id is not None and c.edit_threshold is None,
        "delete_id={c.delete_id} edits tokens; set edit_threshold too",
    ),
    (
        lambda c: c.edit_threshold is not None and c.rule != "threshold",
        "edit_threshold={c.edit_threshold} needs rule=threshold, not rule={c.rule}",
    ),
    (
        lambda c: c.cont_weight and c.cfg_scale,
        "cont_weight={c.cont_weight} feeds embeddings, cfg_scale={c.cfg_scale} masks tokens; "
        "use one of them",
    ),
    (
        lambda c: c.rule == "origin" and c.schedule != "timesteps",
        "rule=origin draws by Dream's times; set schedule=timesteps, not {c.schedule}",
    ),
    (
        lambda c: c.rule == "verify" and c.cache not in (None, "none"),
        "rule=verify caches by kv_window; leave out cache={c.cache}",
    ),
    (
        lambda c: c.edit_threshold is not None and c.remasking != "low_confidence",
        "edit_threshold={c.edit_threshold} compares probabilities; set remasking=low_confidence, "
        "not {c.remasking}",
    ),
    (
        lambda c: c.cont_weight and (c.rule not in SMOOTH or c.remasking != "low_confidence"),
        "cont_weight={c.cont_weight} lowers a threshold on probabilities; set rule=threshold or "
        "hierarchy and remasking=low_confidence, not rule={c.rule} and remasking={c.remasking}",
    ),
    (
        lambda c: c.delete_id is not None and c.delete_id == c.split_id,
        "delete_id={c.delete_id} and split_id={c.split_id} must differ",
    ),
    (
        lambda c: (
            c.delete_id is not None
            and any(getattr(c, name) not in (None, 0, False) for name in NOT_IN_INDEL)
        ),
        "delete_id={c.delete_id} is a greedy rule of its own; leave out " + ", ".join(NOT_IN_INDEL),
    ),
    (
        lambda c: c.lookahead and c.cache not in (None, "none"),
        "lookahead={c.lookahead} hides what a cache keeps; set cache=none, not cache={c.cache}",
    ),
    (
        lambda c: c.lookahead and c.parity not in ("none", "apd"),
        "lookahead={c.lookahead} is apd's; set parity=none or apd, not parity={c.parity}",
    ),
    (
        lambda c: c.lookahead and c.edit_threshold is not None,
        "lookahead={c.lookahead} sees masks only, edit_threshold={c.edit_threshold} tokens; "
        "use one of them",
    ),
    (
        lambda c: c.kv_window and c.rule != "verify",
        "kv_window={c.kv_window} belongs to rule=verify, not rule={c.rule}; see cache",
    ),
    (
        lambda c: c.stop_fill and c.stop != "eos_block",
        "stop_fill belongs to stop=eos_block, not stop={c.stop}",
    ),
)
