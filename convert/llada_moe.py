"""LLaDA-MoE-7B-A1B, Base and Instruct: every layer has experts, attention is bidirectional.

Its `model_type` is LLaDA's; `architectures` tells them apart. Read besides what the published model
uses: dense layers, a shared expert, a bias on the experts' scores, partial rotary embedding.
"""

from typing import Any

from jdllm.convert.experts import expert_rows, mlp_rows
from jdllm.convert.table import ANY, BOOKKEEPING, Family, Row
from jdllm.model.config import ModelConfig, MoEConfig

MASK, TURN_END = "<|mask|>", "<|role_end|>"
MASK_ID, VOCAB = 156895, 157184  # of the published tokenizer, where the folder has none


def mask_id(hf: dict[str, Any], special: dict[str, int]) -> int:
    """Returns the mask's id, from config.json where it is (exports), else from the tokenizer."""
    found = hf.get("mask_token_id")
    found = special.get(MASK) if found is None else found
    if found is None and hf["vocab_size"] == VOCAB:
        return MASK_ID
    if found is None:
        raise ValueError(
            f"there is neither mask_token_id nor a tokenizer.json with {MASK}; add the mask's id "
            "to config.json as mask_token_id"
        )
    return found


def stop_ids(hf: dict[str, Any], special: dict[str, int]) -> tuple[int, ...]:
    """Returns eos, and the chat template's end of turn where the tokenizer has one."""
    eos, end = hf["eos_token_id"], special.get(TURN_END)
    return (eos,) if end in (None, eos) else (eos, end)


def pad_id(hf: dict[str, Any]) -> int:
    """Returns the padding's id, or eos."""
    pad = hf.get("pad_token_id")
    return hf["eos_token_id"] if pad is None else pad


def facts(hf: dict[str, Any], special: dict[str, int]) -> ModelConfig:
    """Returns the facts in LLaDA-MoE's config.json."""
    layers, heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    head_dim = hf["hidden_size"] // heads
    kinds = hf.get("moe_layer_freq") or [1] * layers
    if len(kinds) != layers:
        raise ValueError(f"moe_layer_freq has {len(kinds)} entries for {layers} layers")
    return ModelConfig(
        layers=layers,
        embed=hf["hidden_size"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp=hf.get("dense_intermediate_size") or hf["expert_intermediate_size"],
        vocab=hf["vocab_size"],
        max_length=hf["max_position_embeddings"],
        rope_theta=float(hf["rope_theta"]),
        norm_eps=float(hf.get("rms_norm_eps", 1e-5)),
        mask_id=mask_id(hf, special),
        eos_id=hf["eos_token_id"],
        pad_id=pad_id(hf),
        stop_ids=stop_ids(hf, special),
        family="llada_moe",
        qk_norm=bool(hf.get("qk_layernorm", True)),
        rotary_dim=int(head_dim * hf.get("partial_rotary_factor", 1)),
        moe=MoEConfig(
            experts=hf["num_experts"],
            top_k=hf["num_experts_per_tok"],
            expert_mlp=hf["expert_intermediate_size"],
            shared_mlp=hf.get("shared_expert_intermediate_size") or 0,
            dense_layers=tuple(i for i, kind in enumerate(kinds) if not kind),
            expert_bias="score" if hf.get("moe_router_enable_expert_bias") else "none",
        ),
    )


def layer_rows(config: ModelConfig, number: int) -> list[Row]:
    """Returns the rows of one layer."""
    ours, theirs = f"layers.{number}", f"model.layers.{number}"
    q, k, v, out = (f"{theirs}.self_attn.{name}_proj.weight" for name in "qkvo")
    table = [Row(f"{ours}.attention_norm", (f"{theirs}.input_layernorm.weight",), "D->D")]
    if config.heads == config.kv_heads:
        table.append(Row(f"{ours}.attention.qkv", (q, k, v), "(HK)D->DCHK"))
    else:
        table.append(Row(f"{ours}.attention.q", (q,), "(HK)D->DHK"))
        table.append(Row(f"{ours}.attention.kv", (k, v), "(GK)D->DCGK"))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            source = f"{theirs}.self_attn.{name}.weight"
            table.append(Row(f"{ours}.attention.{name}", (source,), "K->K"))
    table.append(Row(f"{ours}.attention.out", (out,), "D(HK)->HKD"))
    table.append(Row(f"{ours}.mlp_norm", (f"{theirs}.post_attention_layernorm.weight",), "D->D"))
    moe, mlp = config.moe_layer(number), f"{theirs}.mlp"
    if moe is None:
        return table + mlp_rows(f"{ours}.mlp", mlp)
    return table + expert_rows(ours, mlp, f"{mlp}.expert_bias", f"{theirs}.shared_expert", moe)


def rows(config: ModelConfig) -> list[Row]:
    """Returns the table, in the order of the model."""
    table = [Row("embedding", ("model.embed_tokens.weight",), "VD->VD")]
    for number in range(config.layers):
        table += layer_rows(config, number)
    table.append(Row("norm", ("model.norm.weight",), "D->D"))
    table.append(Row("head", ("lm_head.weight",), "VD->DV"))
    return table


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns a config.json that the published modelling code and `facts` both read."""
    moe = config.moe
    if moe is None:
        raise ValueError("a model without experts is not of this family")
    return {
        "architectures": ["LLaDAMoEModelLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "dense_intermediate_size": config.mlp,
        "eos_token_id": config.eos_id,
        "expert_intermediate_size": moe.expert_mlp,
        "hidden_act": "silu",
        "hidden_size": config.embed,
        "mask_token_id": config.mask_id,
        "max_position_embeddings": config.max_length,
        "model_type": "llada",
        "moe_layer_freq": [int(i not in moe.dense_layers) for i in range(config.layers)],
        "moe_router_enable_expert_bias": moe.expert_bias == "score",
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "num_attention_heads": config.heads,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "pad_token_id": config.pad_id,
        "partial_rotary_factor": (config.rotary_dim or config.head_dim) / config.head_dim,
        "qk_layernorm": config.qk_norm,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "routed_scaling_factor": 1,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": moe.shared_mlp or None,
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
        "vocab_size": config.vocab,
    }


FAMILY = Family(
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    source="inclusionAI/LLaDA-MoE-7B-A1B-Instruct",
    facts=facts,
    rows=rows,
    hf_config=hf_config,
    used=frozenset(
        [
            "dense_intermediate_size",
            "eos_token_id",
            "expert_intermediate_size",
            "hidden_size",
            "mask_token_id",
            "max_position_embeddings",
            "moe_layer_freq",
            "moe_router_enable_expert_bias",
            "num_attention_heads",
            "num_experts",
            "num_experts_per_tok",
            "num_hidden_layers",
            "num_key_value_heads",
            "pad_token_id",
            "partial_rotary_factor",
            "qk_layernorm",
            "rms_norm_eps",
            "rope_theta",
            "shared_expert_intermediate_size",
            "vocab_size",
        ]
    ),
    inert=BOOKKEEPING
    | {
        "initializer_range": ANY,
        "model_type": ("llada", "lladamoe", "llada_moe"),
        "output_router_logits": ANY,
        # training only
        "router_aux_loss_coef": ANY,
        # facts that this model has built in
        "attention_bias": (False,),
        "clip_qkv": (None,),
        "hidden_act": ("silu",),
        "moe_router_score_function": ("softmax",),
        "norm_topk_prob": (None, False),
        "routed_scaling_factor": (1, None),
        "router_num_group": (None,),
        "router_topk_group": (None,),
        "tie_word_embeddings": (False,),
    },
)
