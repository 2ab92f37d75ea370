"""Presets: the settings of published recipes by name, `preset=NAME`; docs/training.md has them all.

Each holds what its source says and our settings can express; what a source does not say is left to
the defaults, and what we cannot copy is said in NOTES. None promises the gain that was published.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Note:
    """Where a preset comes from, and what of it is not known or not the same."""

    source: str
    reproduces: str
    unknown: str


_S1K = {
    "model": "GSAI-ML/LLaDA-8B-Instruct", "data": "simplescaling/s1K", "objective": "llada",
    "normalise": "micro", "batch": 8, "accumulation": 8, "length": 4096, "seed": 42,
    "recipe.learning_rate": 1e-5, "recipe.weight_decay": 0.1, "recipe.optimizer": "adamw_hf",
}  # fmt: skip
_D1_LORA = {
    "lora.rank": 128, "lora.alpha": 256, "lora.dropout": 0.05, "lora.targets": "q,k,v",
}  # fmt: skip
_NEMO = {
    "data": "allenai/tulu-3-sft-mixture", "batch": 32, "length": 1024, "epochs": 5,
    "group_by_length": True, "recipe.learning_rate": 2e-5, "recipe.schedule": "cosine",
    "recipe.weight_decay": 0.0, "lora.rank": 16, "lora.alpha": 32,
}  # fmt: skip

_QWEN = {"adapt.mask_id": 151665}  # the first id that Qwen2.5's tokenizer does not use
_A2D = {
    **_QWEN, "model": "Qwen/Qwen2.5-Coder-0.5B-Instruct", "data": "tatsu-lab/alpaca", "batch": 128,
    "length": 512, "epochs": 20, "group_by_length": True, "recipe.learning_rate": 1e-4,
    "recipe.schedule": "cosine", "recipe.warmup": 0.1,
}  # fmt: skip

PRESETS: dict[str, Settings] = {
    "edit-llada": {**_S1K, **_D1_LORA, "epochs": 2},
    "d1-sft": {**_S1K, **_D1_LORA, "epochs": 20, "save_every": 100},
    "d1-sdsft": {
        **_D1_LORA, "model": "GSAI-ML/LLaDA-8B-Instruct", "data": "openai/gsm8k/main",
        "objective": "distil", "hidden_reasoning": "128:256", "padding": "none",
        "normalise": "micro", "batch": 4, "accumulation": 4, "length": 1024, "epochs": 20,
        "seed": 42, "recipe.learning_rate": 1e-5, "recipe.weight_decay": 0.1,
        "recipe.optimizer": "adamw_hf",
    },
    "llada-sft": {
        "model": "GSAI-ML/LLaDA-8B-Base", "objective": "llada-examples", "batch": 256,
        "length": 4096, "epochs": 3, "recipe.learning_rate": 2.5e-5, "recipe.warmup": 50,
        "recipe.schedule": "constant", "recipe.cooldown": 0.1, "recipe.floor": 0.1,
        "recipe.weight_decay": 0.1,
    },
    "dllm-llada": {
        "model": "GSAI-ML/LLaDA-8B-Base", "data": "allenai/tulu-3-sft-mixture",
        "objective": "llada", "batch": 32, "length": 1024, "epochs": 5, "group_by_length": True,
        "recipe.learning_rate": 2e-5, "recipe.schedule": "cosine", "recipe.warmup": 0.1,
        "lora.rank": 32, "lora.alpha": 64, "lora.dropout": 0.05, "lora.targets": "all",
    },
    "dream-coder-sft": {
        "model": "Dream-org/Dream-Coder-v0-Base-7B", "objective": "dream", "batch": 576,
        "accumulation": 12, "length": 4000, "epochs": 7, "remat": "layers",
        "recipe.learning_rate": 5e-6, "recipe.warmup": 0.1, "recipe.weight_decay": 0.01,
        "recipe.beta2": 0.95,
    },
    "dream-sft": {"model": "Dream-org/Dream-v0-Base-7B", "objective": "dream", "epochs": 3},
    "llada2-sft": {
        "model": "inclusionAI/LLaDA2.0-mini", "data": "openai/gsm8k/main", "objective": "llada2",
        "batch": 8, "length": 2048, "epochs": 1, "recipe.learning_rate": 1e-5,
        "recipe.schedule": "cosine", "recipe.warmup": 0.03, "recipe.weight_decay": 0.1,
    },
    "nemo-llada-lora": {
        **_NEMO, "model": "GSAI-ML/LLaDA-8B-Base", "objective": "llada", "lora.targets": "all",
    },
    "nemo-llada2-lora": {
        **_NEMO, "model": "inclusionAI/LLaDA2.1-mini", "objective": "llada2-plain",
        "lora.targets": "all",
    },
    "a2d": {**_A2D, "adapt.sees": "full", "objective": "llada"},
    "a2d-blocks": {**_A2D, "adapt.sees": "blocks", "adapt.block": 32, "objective": "blocks"},
    "fastdllm2": {
        **_QWEN, "model": "Qwen/Qwen2.5-1.5B-Instruct", "adapt.sees": "blocks", "adapt.block": 32,
        "adapt.shift": True, "objective": "fast-dllm-v2", "batch": 256, "length": 2048,
        "packing": True, "recipe.steps": 6000,
    },
    "rainbow": {
        "model": "GSAI-ML/LLaDA-8B-Base", "objective": "llada", "padding": "rainbow:7", "epochs": 1,
        "lora.rank": 32,
    },
}  # fmt: skip

NOTES: dict[str, Note] = {
    "edit-llada": Note(
        "EDIT, arXiv 2512.00670", "the adapter whose gradient dynamics EDIT reads",
        "trains on all 1000 rows, not on 990; its moments were bfloat16",
    ),
    "d1-sft": Note(
        "d1, arXiv 2504.12216", "the adapter before diffu-GRPO",
        "it keeps the checkpoint of least eval loss: choose it by `eval_data`",
    ),
    "d1-sdsft": Note(
        "d1, SFT/self_distillation_train.py", "its self-distillation on gsm8k",
        "its prompts ask in other words, and it stops at the answer, without an end of turn; it "
        "has 4 rows per device; no result is published",
    ),
    "llada-sft": Note(
        "LLaDA, arXiv 2502.09992", "LLaDA-8B-Instruct",
        "its 4.5M pairs are not published: name `data`; the peak rate is not confirmed",
    ),
    "dllm-llada": Note(
        "dllm, examples/llada", "dllm's LoRA run", "it has 4 rows per device, this 32 in all",
    ),
    "dream-coder-sft": Note(
        "Dream-Coder, run_sft.sh", "Dream-Coder-Instruct",
        "name `data`; betas, decay and warm-up are defaults of a copy of Dream's configuration",
    ),
    "dream-sft": Note(
        "Dream's blog", "Dream-Instruct",
        "its 1.8M pairs, batch and rates are not published; three epochs are not confirmed",
    ),
    "llada2-sft": Note(
        "inclusionAI's dFactory", "its gsm8k example of LLaDA2.0-mini",
        "no result is published; flash has a batch of 16",
    ),
    "nemo-llada-lora": Note("NeMo Automodel", "its LoRA run of LLaDA", "no result is published"),
    "nemo-llada2-lora": Note(
        "NeMo Automodel", "its LoRA run of LLaDA2.1, plain masked diffusion",
        "no result is published",
    ),
    "a2d": Note(
        "dllm, examples/a2d/mdlm", "its example of a causal model made one of masked diffusion",
        "its base is Qwen3-0.6B, which is not loaded here; it made others of this one; Tiny-A2D "
        "itself: four data sets, 10 epochs, batch 2048, 1024 columns",
    ),
    "a2d-blocks": Note(
        "dllm, examples/a2d/bd3lm", "the same, block by block",
        "as above; it pads with eos up to a whole block only",
    ),
    "fastdllm2": Note(
        "Fast-dLLM v2, arXiv 2509.26328", "Fast-dLLM-v2-1.5B",
        "name `data`; its rates were not found; steps and batch are second hand; it pads with "
        "masks to whole blocks where this pads with eos",
    ),
    "rainbow": Note(
        "arXiv 2510.03680", "one epoch of LoRA with rainbow padding",
        "data, rank and rates were not found: name `data`",
    ),
}  # fmt: skip


REFUSED: dict[str, str] = {
    "sdar-sft": (
        "SDAR's models have the layers of Qwen3, which jdllm does not load; its noise and view are "
        "objective=blocks loss.low=0.1 loss.high=0.9 on a model that attends block by block"
    ),
}
"""Published recipes that cannot be run here, and why."""


def table() -> str:
    """The presets as docs/training.md lists them."""
    rows = [f"| {k} | {n.reproduces} | {n.source} | {n.unknown} |" for k, n in NOTES.items()]
    return "\n".join(rows)
