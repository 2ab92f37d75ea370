"""Dream-v0-7B, Dream-Coder and DiffuCoder: Qwen2's layers, bidirectional, and a mask token.

Logits keep Qwen2's place: row t predicts token t + 1. The forward pass leaves them there.
"""

import dataclasses
from typing import Any

from jdllm.convert import qwen2
from jdllm.convert.table import Family
from jdllm.model.config import ModelConfig

PAD = "<|dlm_pad|>"  # what DiffuCoder fills the rest of a canvas with, behind its answer


def facts(hf: dict[str, Any], special: dict[str, int]) -> ModelConfig:
    """Returns the facts in Dream's config.json. Text ends as Qwen2's, or at DiffuCoder's pad."""
    base = qwen2.facts(hf, special)
    pad = (special[PAD],) if PAD in special else ()
    return dataclasses.replace(
        base,
        stop_ids=(*pad, *base.stop_ids),
        family="dream",
        mask_id=hf["mask_token_id"],
        causal=False,
        shift_logits=True,
    )


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns a config.json that the published modelling code and `facts` both read."""
    return qwen2.hf_config(config) | {
        "architectures": ["DreamModel"],
        "mask_token_id": config.mask_id,
        "model_type": "Dream",
    }


FAMILY = Family(
    architectures=("DreamModel",),
    source="Dream-org/Dream-v0-Instruct-7B",
    facts=facts,
    rows=qwen2.rows,
    hf_config=hf_config,
    used=qwen2.FAMILY.used | {"mask_token_id"},
    inert=qwen2.FAMILY.inert | {"model_type": ("Dream",)},
)
