"""How the parameters of recorded runs read as DecodeConfigs, by family of recordings."""

from typing import Any

from jdllm.decode import DecodeConfig


def llada_config(params: dict[str, Any]) -> DecodeConfig:
    """LLaDA's generate.py: no cache, a fixed number of steps, no stop."""
    settings: dict[str, Any] = {k: v for k, v in params.items() if k != "mask_id"}
    return DecodeConfig(rule="quota", stop="none", parity="llada", **settings)


def fast_llada_config(params: dict[str, Any]) -> DecodeConfig:
    """Fast-dLLM's generate functions, and dInfer's copy of them."""
    settings = dict(params)
    variant = settings.pop("variant")
    rule: Any = next((name for name in ("threshold", "factor") if name in settings), "quota")
    if rule != "quota":
        settings.pop("steps")
    early = settings.pop("early_stop", False)
    parity = "fast_dllm" if variant == "nvlabs" else "none"
    return DecodeConfig(rule=rule, stop="eos_fill" if early else "none", parity=parity, **settings)


def dream_config(params: dict[str, Any]) -> DecodeConfig:
    """Dream's sampler over the whole canvas, and Fast-dLLM's threshold for it."""
    settings = dict(params)
    alg: Any = settings.pop("alg")
    ranks: dict[Any, Any] = {
        "maskgit_plus": "low_confidence",
        "confidence_threshold": "low_confidence",
    }
    rules: dict[str, Any] = {"origin": "origin", "confidence_threshold": "allowance"}
    return DecodeConfig(
        gen_length=settings.pop("max_new_tokens"),
        block_length=0,
        rule=rules.get(alg, "quota"),
        remasking="low_confidence" if alg == "origin" else ranks.get(alg, alg),
        schedule="masks" if alg == "confidence_threshold" else "timesteps",
        sampling="categorical",
        cache="none",
        stop="none",
        parity="dream",
        **settings,
    )


def fast_dream_config(params: dict[str, Any]) -> DecodeConfig:
    """Fast-dLLM's block sampler for Dream; any alg but its threshold ranks by entropy."""
    settings = dict(params)
    by_threshold = settings.pop("alg") == "confidence_threshold"
    steps = settings.pop("steps")
    return DecodeConfig(
        gen_length=settings.pop("max_new_tokens"),
        rule="threshold" if by_threshold else "quota",
        remasking="low_confidence" if by_threshold else "entropy",
        steps=None if by_threshold else steps,
        schedule="masks" if by_threshold else "timesteps",
        sampling="categorical",
        cache="dual" if settings.pop("dual_cache") else "prefix",
        stop="none",
        parity="fast_dream",
        **settings,
    )


DINFER_DECODERS: dict[str, dict[str, Any]] = {
    "threshold": {"rule": "threshold", "edge": "slack"},
    "credit": {"rule": "threshold", "edge": "slack", "credit": True},
    "hierarchy": {"rule": "hierarchy"},
}
DINFER_NAMES = {
    "boost_gamma": "credit_gamma",
    "decay_beta": "credit_beta",
    "cache_update_freq": "refresh_every",
    "start_block_align": "align",
    "warmup_steps": "warmup",
    "cont_weight_init": "cont_init",
    "cont_weight_growth": "cont_growth",
}


def dinfer_config(params: dict[str, Any]) -> DecodeConfig:
    """dInfer's block runners: both ways in which the recordings spell them."""
    flat = dict(params)
    decoder = flat.pop("decoder", "hierarchy")
    if isinstance(decoder, dict):
        flat |= {"decoder_args": {k: v for k, v in decoder.items() if k != "type"}}
        decoder = decoder["type"]
    engine = flat.pop("engine", {})
    kind = engine.get("type") or flat.pop("llm", "script")
    flat |= {k: v for k, v in engine.items() if k != "type"} | flat.pop("decoder_args", {})
    for name in ("use_float64", "use_shift", "mask_id", "eos_id", "steps"):
        flat.pop(name, None)
    if flat.get("threshold", 0) is None:
        flat["threshold"] = 1.0
    fills = flat.pop("early_stop", True)
    smooth = "iter" in kind.lower()
    cache = "block" if kind == "bd" else flat.pop("cache", None) or "none"
    settings: dict[Any, Any] = {DINFER_NAMES.get(k, k): v for k, v in flat.items()}
    if smooth:
        settings.setdefault("cont_weight", 0.3)
    return DecodeConfig(
        **DINFER_DECODERS[decoder],
        **settings,
        cache=cache,
        stop="none" if kind == "script" else "eos_block",
        stop_fill=fills and kind != "script",
        parity="none" if kind == "script" else "dinfer",
    )


def apd_config(params: dict[str, Any]) -> DecodeConfig:
    """Adaptive parallel decoding, and the fixed number of tokens that it is compared with."""
    common: dict[str, Any] = {
        "gen_length": params["max_new_tokens"],
        "block_length": 0,
        "cache": "none",
        "stop": "eos_any",
        "parity": "apd",
    }
    if params["alg"] == "leftright":
        return DecodeConfig(
            rule="quota",
            remasking="leftright",
            tokens_per_step=params["tokens_per_step"],
            **common,
        )
    return DecodeConfig(
        rule="verify",
        verify_weight=params["apd_mixture_weight"],
        lookahead=params.get("max_lookahead"),
        kv_window=params.get("kv_window"),
        **common,
    )


def official_config(params: dict[str, Any]) -> DecodeConfig:
    """LLaDA2.0's and 2.1's generate; the latter edits and ignores `steps`."""
    settings: dict[str, Any] = {k: v for k, v in params.items() if k not in ("eos_id", "mask_id")}
    early = settings.pop("eos_early_stop")
    edits = "editing_threshold" in settings
    if edits:
        settings = {k: v for k, v in settings.items() if k not in ("steps", "minimal_topk")}
        settings["tokens_per_step"] = settings.pop("num_to_transfer")
        settings["edit_threshold"] = settings.pop("editing_threshold")
        settings["edit_passes"] = settings.pop("max_post_steps")
    after: dict[bool, Any] = {
        True: "eos_block" if early else "none",
        False: "eos_return" if early else "eos_block",
    }
    return DecodeConfig(
        schedule="masks" if edits else "columns",
        cache="none",
        stop=after[edits],
        parity="llada2",
        **settings,
    )


def sglang_config(params: dict[str, Any], algorithm: str) -> DecodeConfig:
    """SGLang's LowConfidence, JointThreshold and JointThresholdInDel."""
    names = {
        "max_post_edit_steps": "edit_passes",
        "penalty_lambda": "edit_penalty",
        "delete_token_id": "delete_id",
        "split_token_id": "split_id",
    }
    settings: dict[str, Any] = {
        names.get(k, k): v for k, v in params.items() if k not in ("eos_id", "mask_id")
    }
    if not algorithm.endswith("low_confidence"):
        settings = {"threshold": 0.5, "edit_threshold": 0.0, **settings}
    return DecodeConfig(cache="none", stop="eos_block", parity="sglang", **settings)


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
