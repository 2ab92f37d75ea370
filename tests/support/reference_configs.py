"""Turns the parameters of recorded runs into DecodeConfigs, by family of recordings."""

from typing import Any

from jdllm.decode import DecodeConfig


def given(params: dict[str, Any], *ignored: str) -> dict[str, Any]:
    """Returns the parameters that were set and that the algorithm reads."""
    return {k: v for k, v in params.items() if v is not None and k not in ignored}


def llada_config(params: dict[str, Any]) -> DecodeConfig:
    """Returns the config of LLaDA's generate.py: no cache, fixed steps, no stop."""
    settings = given(params, "mask_id", "eos_id")
    if settings.get("remasking") == "random":
        settings.pop("confidence_eos_eot_inf", None)  # it changes what then nobody looks at
    return DecodeConfig.of({"rule": "quota", "stop": "none", "parity": "llada"} | settings)


def fast_llada_config(params: dict[str, Any]) -> DecodeConfig:
    """Returns the config of Fast-dLLM's generate; a factor wins over a threshold."""
    settings = given(params, "mask_id", "eos_id")
    variant = settings.pop("variant")
    rule: Any = next((name for name in ("factor", "threshold") if name in settings), "quota")
    for unread in {"factor", "threshold", "steps"} - {"steps" if rule == "quota" else rule}:
        settings.pop(unread, None)
    early = settings.pop("early_stop", False)
    parity = "fast_dllm" if variant == "nvlabs" else "none"
    return DecodeConfig(rule=rule, stop="eos_fill" if early else "none", parity=parity, **settings)


def dream_config(params: dict[str, Any]) -> DecodeConfig:
    """Returns the config of Dream's sampler over the canvas, or Fast-dLLM's for it."""
    alg: Any = params["alg"]
    by_threshold, origin = alg == "confidence_threshold", alg == "origin"
    ignored = ["alg", "block_length", "dual_cache", "eps" if by_threshold else "threshold"]
    ignored += ["alg_temp"] if by_threshold or origin else []
    settings = given(params, *ignored)
    ranks = {"maskgit_plus": "low_confidence", "origin": "low_confidence"}
    ranks["confidence_threshold"] = "low_confidence"
    rules: dict[str, Any] = {"origin": "origin", "confidence_threshold": "allowance"}
    rank: Any = ranks.get(alg, alg)
    return DecodeConfig(
        gen_length=settings.pop("max_new_tokens"),
        block_length=0,
        rule=rules.get(alg, "quota"),
        remasking=rank,
        schedule="masks" if by_threshold else "timesteps",
        sampling="categorical",
        cache="none",
        stop="none",
        parity="dream",
        **settings,
    )


def fast_dream_config(params: dict[str, Any]) -> DecodeConfig:
    """Returns the config of Fast-dLLM's block sampler for Dream; most algs rank by entropy."""
    by_threshold = params["alg"] == "confidence_threshold"
    unread = ("eps", "alg_temp", "steps") if by_threshold else ("threshold",)
    settings = given(params, "alg", *unread)
    return DecodeConfig(
        gen_length=settings.pop("max_new_tokens"),
        rule="threshold" if by_threshold else "quota",
        remasking="low_confidence" if by_threshold else "entropy",
        schedule="masks" if by_threshold else "timesteps",
        sampling="categorical",
        cache="dual" if settings.pop("dual_cache", False) else "prefix",
        stop="none",
        parity="fast_dream",
        **settings,
    )


DINFER_DECODERS: dict[str, dict[str, Any]] = {
    "threshold": {"rule": "threshold", "edge": "slack"},
    "credit": {"rule": "threshold", "edge": "slack", "credit.alpha": 0.7},
    "hierarchy": {"rule": "hierarchy", "threshold": 1.0, "low_threshold": 0.4},
}
DINFER_NAMES = {
    "credit_alpha": "credit.alpha",
    "boost_gamma": "credit.gamma",
    "decay_beta": "credit.beta",
    "cache_update_freq": "refresh_every",
    "start_block_align": "align",
    "prefix_look": "vicinity.before",
    "after_look": "vicinity.after",
    "warmup_steps": "vicinity.warmup",
    "cont_weight": "smooth.weight",
    "cont_weight_init": "smooth.init",
    "cont_weight_growth": "smooth.growth",
    "threshold_decay": "smooth.decay",
    "expected_tpf": "dinfer.expected_tpf",
    "maximum_unroll": "dinfer.maximum_unroll",
}
SMOOTH_NAMES = ("cont_weight", "cont_weight_init", "cont_weight_growth", "threshold_decay")
# What a decoder or an engine does not read, though its caller may say it.
DINFER_UNREAD: dict[str, tuple[str, ...]] = {
    "all": ("llm", "use_float64", "use_shift", "mask_id", "eos_id", "steps", "cache"),
    "threshold": ("low_threshold", "credit_alpha", "boost_gamma", "decay_beta"),
    "credit": ("low_threshold",),
    "hierarchy": ("credit_alpha", "boost_gamma", "decay_beta"),
    "no cache": ("cache_update_freq",),
    "no vicinity": ("prefix_look", "after_look", "warmup_steps"),
    "no smoothing": SMOOTH_NAMES,
    "script": ("maximum_unroll", "expected_tpf"),
    "blocks": ("start_block_align",),
}


def dinfer_config(params: dict[str, Any]) -> DecodeConfig:
    """Returns the config of dInfer's block runners, which recordings spell in two ways."""
    flat = dict(params)
    decoder = flat.pop("decoder", "hierarchy")
    if isinstance(decoder, dict):
        flat |= {"decoder_args": {k: v for k, v in decoder.items() if k != "type"}}
        decoder = decoder["type"]
    engine = flat.pop("engine", {})
    kind = (engine.get("type") or flat.pop("llm", "script")).lower()
    flat |= {k: v for k, v in engine.items() if k != "type"} | flat.pop("decoder_args", {})
    script, smooth, vicinity = kind == "script", "iter" in kind, "vicinity" in kind
    blocks = kind.startswith(("bd", "blockdiffusion"))
    cached_blocks = blocks and "mask" not in kind
    cache: Any = "block" if cached_blocks else (flat.get("cache") or "none")
    cache = "none" if blocks and not cached_blocks else cache
    unread = ["all", decoder]
    unread += ["no cache"] * (cache not in ("prefix", "dual")) + ["no vicinity"] * (not vicinity)
    unread += ["no smoothing"] * (not smooth) + ["script"] * script + ["blocks"] * blocks
    fills = flat.pop("early_stop", True)
    read = given(flat, *(name for part in unread for name in DINFER_UNREAD[part]))
    settings: dict[Any, Any] = {DINFER_NAMES.get(k, k): v for k, v in read.items()}
    if smooth:
        settings.setdefault("smooth.weight", 0.3)
    # Without early_stop only block diffusion with its cache goes on behind an eos.
    endless = script or (cached_blocks and not fills)
    return DecodeConfig.of(
        DINFER_DECODERS[decoder]
        | settings
        | {
            "cache": cache,
            "stop": "none" if endless else "eos_block",
            "stop_fill": fills and not script,
            "parity": "none" if script else "dinfer",
        }
    )


def apd_config(params: dict[str, Any]) -> DecodeConfig:
    """Returns the config of apd; without a mixture weight it takes a fixed number of tokens."""
    unread = ("alg", "apd_mixture_weight", "max_lookahead", "max_new_tokens", "tokens_per_step")
    common: dict[str, Any] = given(params, *unread, "kv_window", "steps", "eps", "alg_temp") | {
        "gen_length": params["max_new_tokens"],
        "block_length": 0,
        "verify.lookahead": params.get("max_lookahead") or 0,
        "verify.window": params.get("kv_window") or 0,
        "sampling": "categorical",
        "cache": "none",
        "stop": "eos_any",
        "parity": "apd",
    }
    weight = params.get("apd_mixture_weight")
    if weight is not None:
        return DecodeConfig.of({"rule": "verify", "verify.weight": weight} | common)
    tokens = params.get("tokens_per_step") or 1
    left = {"rule": "quota", "remasking": "leftright", "tokens_per_step": tokens}
    return DecodeConfig.of(left | common)


def official_config(params: dict[str, Any]) -> DecodeConfig:
    """Returns the config of LLaDA2's generate; 2.1's edits and ignores `steps`.

    Both filter only where they draw.
    """
    edits = "editing_threshold" in params
    ignored = ("steps", "minimal_topk") if edits else ("max_post_steps", "num_to_transfer")
    filters = () if params.get("temperature") else ("top_p", "top_k")
    settings = given(params, "eos_id", "mask_id", *ignored, *filters)
    early = settings.pop("eos_early_stop", False)
    if edits:
        settings["tokens_per_step"] = settings.pop("num_to_transfer", 1)
        settings["edit.threshold"] = settings.pop("editing_threshold")
        settings["edit.passes"] = settings.pop("max_post_steps", 16)
    after: dict[bool, Any] = {
        True: "eos_block" if early else "none",
        False: "eos_return" if early else "eos_block",
    }
    return DecodeConfig.of(
        {
            "schedule": "masks" if edits else "columns",
            "sampling": "categorical",
            "cache": "none",
            "stop": after[edits],
            "parity": "llada2",
        }
        | settings
    )


def sglang_config(params: dict[str, Any], algorithm: str) -> DecodeConfig:
    """Returns the config of SGLang's LowConfidence, JointThreshold or JointThresholdInDel."""
    names = {
        "edit_threshold": "edit.threshold",
        "max_post_edit_steps": "edit.passes",
        "penalty_lambda": "edit.penalty",
        "delete_token_id": "edit.delete_id",
        "split_token_id": "edit.split_id",
    }
    unread = {
        "low_confidence": tuple(names),
        "joint_threshold": ("delete_token_id", "split_token_id"),
        "joint_threshold_indel": ("penalty_lambda",),
    }[algorithm.removeprefix("sglang.")]
    read = given(params, "eos_id", "mask_id", *unread)
    settings: dict[str, Any] = {names.get(k, k): v for k, v in read.items()}
    if not algorithm.endswith("low_confidence"):
        settings = {"threshold": 0.5, "edit.threshold": 0.0, **settings}
    return DecodeConfig.of({"cache": "none", "stop": "eos_block", "parity": "sglang"} | settings)


CONFIGS = {
    "apd": apd_config,
    "dinfer": dinfer_config,
    "dream": dream_config,
    "fast_dream": fast_dream_config,
    "fast_llada": fast_llada_config,
    "llada": llada_config,
    "traces_dinfer": dinfer_config,
    "traces_dinfer_itersmooth": dinfer_config,
    "traces_llada_loop": llada_config,
    "traces_official": official_config,
    "traces_sglang": sglang_config,
}
