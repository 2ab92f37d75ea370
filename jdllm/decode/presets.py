"""Presets: published settings by name, as the defaults that `decode.preset=NAME` starts from.

Each holds what its source says, by dotted names, and leaves the rest to the defaults. Those named
after a method leave the length open; those named after a task fix it. None copies a reference's
idle calls: add `decode.parity=` for that (docs/decoding.md).
"""

from collections.abc import Mapping
from typing import Any

from jdllm.runtime.hints import asked, nearest

Settings = Mapping[str, Any]

_FAST_DLLM = {"block_length": 32}
_DINFER = {"block_length": 64, "align": True, "cache": "dual"}
_LLADA = {"rule": "quota", "cache": "none"}
_LLADA_15 = {**_LLADA, "confidence_eos_eot_inf": True}
_LLADA2 = {
    "block_length": 32, "align": True, "cache": "block", "edge": "above", "sampling": "categorical",
}  # fmt: skip
_DREAM = {
    "rule": "quota", "block_length": 0, "schedule": "timesteps", "sampling": "categorical",
    "cache": "none",
}  # fmt: skip
_BLOCKINFER = {
    "block_length": 4, "schedule": "columns", "sampling": "categorical", "temperature": 1.0,
}  # fmt: skip

_EDIT = {
    "rule": "quota", "schedule": "gaussian", "cache": "none", "exit.mode": "code",
}  # fmt: skip
# EDIT's files, from the second block on: 1/peak, 1/width, patience and threshold. The first block
# has 64 columns, 1/4, 1/5, 6 and 0.05; all are finished in two calls.
_EDIT_REST: dict[str, tuple[float, float, int, float]] = {
    "countdown-128": (4, 4, 6, 0.05), "countdown-256": (4, 4, 12, 0.55),
    "countdown-512": (4, 5, 12, 0.45), "sudoku-128": (4, 3, 6, 0.1),
    "sudoku-256": (6, 5, 6, 0.05), "sudoku-512": (6, 4, 6, 0.05),
    "math500-128": (4, 5, 6, 0.1), "math500-256": (4, 3, 6, 0.05),
    "math500-512": (4, 6, 6, 0.025), "gsm8k-128": (4, 3, 6, 0.05),
    "gsm8k-256": (4, 4, 6, 0.025), "gsm8k-512": (4, 4, 6, 0.025),
}  # fmt: skip


def edit(gen_length: int, rest: tuple[float, float, int, float]) -> Settings:
    """EDIT's settings for a length, given those of the blocks behind the first."""
    peak, width, patience, threshold = rest
    return _EDIT | {
        "gen_length": gen_length, "steps": gen_length // 2, "block_length": 64,
        "gaussian.peak": (1 / 4, 1 / peak), "gaussian.width": (1 / 5, 1 / width),
        "exit.threshold": (0.05, threshold), "exit.patience": (6, patience), "exit.polish": (2,),
    }  # fmt: skip


def _edit_presets() -> dict[str, Settings]:
    found = {
        f"edit-{name}": edit(int(name.rpartition("-")[2]), rest)
        for name, rest in _EDIT_REST.items()
    }
    # one file has two blocks only, of 64 and 192 columns
    odd = dict(found["edit-countdown-256"])
    del odd["block_length"]
    return found | {"edit-countdown-256": odd | {"block_lengths": (64, 192)}}


PRESETS: dict[str, Settings] = {
    # LLaDA: generate.py's defaults: one block over all, one token per step
    "llada": {**_LLADA, "block_length": 0},
    # LLaDA: EVAL.md, Instruct model, one block over all
    "llada-official-gsm8k": {
        **_LLADA, "gen_length": 512, "block_length": 512, "confidence_eos_eot_inf": True,
    },
    "llada-official-math": {
        **_LLADA, "gen_length": 512, "block_length": 512, "confidence_eos_eot_inf": True,
    },
    "llada-official-gpqa": {
        **_LLADA, "gen_length": 64, "block_length": 64, "confidence_eos_eot_inf": True,
    },
    "llada-official-humaneval": {
        **_LLADA, "gen_length": 512, "block_length": 512, "logits_eos_inf": True,
    },
    "llada-official-mbpp": {
        **_LLADA, "gen_length": 256, "block_length": 256, "confidence_eos_eot_inf": True,
    },
    # LLaDA: EVAL.md, Instruct model, block by block, without the flags
    "llada-official-gsm8k-blocks": {**_LLADA, "gen_length": 256, "block_length": 8},
    "llada-official-math-blocks": {**_LLADA, "gen_length": 512, "block_length": 64},
    # LLaDA-1.5: its table of evaluation settings; the flag everywhere but for GPQA
    "llada-1.5-gsm8k": {**_LLADA_15, "gen_length": 256, "block_length": 16},
    "llada-1.5-math": {**_LLADA_15, "gen_length": 1024, "block_length": 128},
    "llada-1.5-gpqa": {**_LLADA, "gen_length": 256, "block_length": 16},
    "llada-1.5-humaneval": {**_LLADA_15, "gen_length": 512, "block_length": 32},
    "llada-1.5-mbpp": {**_LLADA_15, "gen_length": 512, "block_length": 32},
    "llada-1.5-ifeval": {**_LLADA_15, "gen_length": 256, "block_length": 16},
    # Fast-dLLM: its README's LLaDA rows: block 32, threshold 0.9
    "fast-dllm-none": {**_FAST_DLLM, "threshold": 0.9, "cache": "none"},
    "fast-dllm-prefix": {**_FAST_DLLM, "threshold": 0.9, "cache": "prefix"},
    "fast-dllm-dual": {**_FAST_DLLM, "threshold": 0.9, "cache": "dual"},
    # Fast-dLLM: the later dynamic count; no factor is published in what we read, 1 is ours
    "fast-dllm-factor": {**_FAST_DLLM, "rule": "factor", "factor": 1.0, "cache": "dual"},
    # dInfer: block 64 of its documentation, the decoder's own default threshold
    "dinfer-threshold": {**_DINFER, "threshold": 0.9, "edge": "slack"},
    # dInfer: the documentation's pair of thresholds
    "dinfer-hierarchy": {
        **_DINFER, "rule": "hierarchy", "threshold": 0.92, "low_threshold": 0.62,
    },
    # dInfer: CreditThresholdParallelDecoder's defaults
    "dinfer-credit": {
        **_DINFER, "threshold": 0.9, "edge": "slack",
        "credit.alpha": 0.7, "credit.beta": 0.8, "credit.gamma": 0.2,
    },
    # dInfer: SamplingParams' defaults: threshold 0.9, 16 columns each side, 4 warm passes
    "dinfer-vicinity": {
        **_DINFER, "threshold": 0.9, "edge": "slack",
        "vicinity.before": 16, "vicinity.after": 16, "vicinity.warmup": 4,
    },
    # dInfer: the documentation's weight, the class's schedule
    "dinfer-itersmooth": {
        **_DINFER, "threshold": 0.9, "edge": "slack", "smooth.weight": 0.3,
        "smooth.init": 0.15, "smooth.growth": 0.02, "smooth.decay": 0.02,
    },
    # LLaDA2.0: generate's defaults; 32 steps over 32 columns are at least one token per step
    "llada2": {**_LLADA2, "threshold": 0.95, "schedule": "columns", "steps": 32},
    # LLaDA2.1: generate's defaults
    "llada2.1": {**_LLADA2, "threshold": 0.95, "edit.threshold": 0.9, "edit.passes": 16},
    # LLaDA2.1: the README gives ranges, 0.5-0.7 with 0-0.5, and 0.7 upwards with 0.5
    "llada2.1-speed": {**_LLADA2, "threshold": 0.5, "edit.threshold": 0.0, "edit.passes": 16},
    "llada2.1-quality": {**_LLADA2, "threshold": 0.7, "edit.threshold": 0.5, "edit.passes": 16},
    # SGLang: LowConfidence's defaults
    "sglang-low-confidence": {**_LLADA2, "threshold": 0.95},
    # SGLang: JointThreshold's defaults
    "sglang-joint-threshold": {
        **_LLADA2, "threshold": 0.5, "edit.threshold": 0.0, "edit.passes": 16, "edit.penalty": 0.0,
    },
    # Dream: the generation config's defaults
    "dream-origin": {**_DREAM, "rule": "origin", "eps": 1e-3, "temperature": 0.0},
    # Dream: alg=entropy; temperature and top_p as its README recommends, from memory
    "dream": {
        **_DREAM, "remasking": "entropy", "eps": 1e-3, "temperature": 0.2, "top_p": 0.95,
    },
    # Fast-dLLM for Dream: the block sampler's defaults (prefix; for dual add decode.cache=dual)
    "dream-fast-dllm": {
        "block_length": 32, "threshold": 0.9, "sampling": "categorical", "cache": "prefix",
    },
    # DiffuCoder: the demo of the instruct model (the base model's has temperature 0.2)
    "diffucoder": {
        **_DREAM, "remasking": "entropy", "eps": 1e-3, "temperature": 0.3, "top_p": 0.95,
    },
    # BlockInfer: SamplingParams' defaults: four steps over blocks of four, temperature 1
    "blockinfer-sequential": {
        **_BLOCKINFER, "rule": "quota", "remasking": "leftright", "steps": 4,
    },
    "blockinfer-static": {**_BLOCKINFER, "rule": "quota", "steps": 4},
    "blockinfer-dynamic": {
        **_BLOCKINFER, "rule": "threshold", "threshold": 0.9, "edge": "above", "steps": 4,
    },
    "blockinfer-entropy": {
        "block_length": 4, "sampling": "categorical", "temperature": 1.0,
        "rule": "entropy_bound", "remasking": "entropy", "entropy_bound": 0.35,
    },
    # d3LLM: entropy at most 0.5 for LLaDA, under 0.4 for Dream; its block pipeline is not copied
    "d3llm": {"block_length": 32, "remasking": "entropy", "threshold": 0.5, "cache": "none"},
    "d3llm-dream": {
        "block_length": 32, "remasking": "entropy", "threshold": 0.4, "edge": "above",
        "cache": "none",
    },
    # apd: its harness; the weight and the windows have no published default
    "apd": {
        "rule": "verify", "block_length": 0, "sampling": "categorical", "temperature": 0.2,
        "top_p": 0.95,
    },
    # apd: what it is compared with, one token per step from left to right
    "leftright": {**_LLADA, "block_length": 0, "remasking": "leftright"},
    # KLASS: GSM8K with LLaDA
    "klass": {
        "rule": "klass", "block_length": 64, "threshold": 0.6, "klass.kl": 0.015, "klass.steps": 2,
        "cache": "none",
    },
    # EDIT: its twelve files of settings; they need its adapter, adapter=FOLDER
    **_edit_presets(),
}  # fmt: skip


def preset_settings(name: str) -> dict[str, Any]:
    """The settings of a preset; ValueError with the nearest names where there is none."""
    if name in PRESETS:
        return dict(PRESETS[name])
    hint = asked(nearest(name, PRESETS)) or f"there are {', '.join(PRESETS)}"
    raise ValueError(f"preset={name} is unknown; {hint}")
