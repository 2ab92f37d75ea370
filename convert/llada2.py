"""LLaDA2.0 and 2.1: sigmoid routing in groups, a shared expert, block-causal attention.

config.json does not name the block length that the models were trained with; it is 32.
"""

from typing import Any

from jdllm.convert.experts import expert_rows, mlp_rows
from jdllm.convert.llada_moe import mask_id, pad_id, stop_ids
from jdllm.convert.table import ANY, BOOKKEEPING, Family, Row
from jdllm.model.config import ModelConfig, MoEConfig

BLOCK_LENGTH = 32


def facts(hf: dict[str, Any], special: dict[str, int]) -> ModelConfig:
    """Returns the facts in LLaDA2's config.json; `num_key_value_heads` 0 means all heads."""
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    rotary_dim = int(head_dim * hf.get("partial_rotary_factor", 1))
    if hf.get("rotary_dim", rotary_dim) != rotary_dim:
        raise ValueError(
            f"rotary_dim={hf['rotary_dim']} contradicts partial_rotary_factor, which gives "
            f"{rotary_dim}"
        )
    return ModelConfig(
        layers=hf["num_hidden_layers"],
        embed=hf["hidden_size"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        mlp=hf["intermediate_size"],
        vocab=hf["vocab_size"],
        max_length=hf["max_position_embeddings"],
        rope_theta=float(hf["rope_theta"]),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        mask_id=mask_id(hf, special),
        eos_id=hf["eos_token_id"],
        pad_id=pad_id(hf),
        stop_ids=stop_ids(hf, special),
        family="llada2",
        qk_norm=bool(hf.get("use_qk_norm", True)),
        rotary_dim=rotary_dim,
        block_causal=BLOCK_LENGTH,
        moe=MoEConfig(
            experts=hf["num_experts"],
            top_k=hf["num_experts_per_tok"],
            expert_mlp=hf["moe_intermediate_size"],
            shared_mlp=hf["moe_intermediate_size"] * (hf.get("num_shared_experts") or 0),
            dense_layers=tuple(range(hf["first_k_dense_replace"])),
            score="sigmoid",
            renormalise=True,
            scale=float(hf["routed_scaling_factor"]),
            groups=hf["n_group"],
            top_groups=hf["topk_group"],
            expert_bias="selection" if hf.get("moe_router_enable_expert_bias", True) else "none",
        ),
    )


def attention_rows(config: ModelConfig, ours: str, theirs: str) -> list[Row]:
    """Returns the rows of attention: one weight holds all queries, then keys, then values."""
    fused = f"{theirs}.query_key_value.weight"
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    first, second = queries + keys, queries + 2 * keys
    spans = ((0, queries), (queries, first), (first, second))
    if config.heads == config.kv_heads:
        table = [Row(f"{ours}.qkv", (fused,) * 3, "(HK)D->DCHK", spans)]
    else:
        table = [
            Row(f"{ours}.q", (fused,), "(HK)D->DHK", spans[:1]),
            Row(f"{ours}.kv", (fused,) * 2, "(GK)D->DCGK", spans[1:]),
        ]
    if config.qk_norm:
        table.append(Row(f"{ours}.q_norm", (f"{theirs}.query_layernorm.weight",), "K->K"))
        table.append(Row(f"{ours}.k_norm", (f"{theirs}.key_layernorm.weight",), "K->K"))
    table.append(Row(f"{ours}.out", (f"{theirs}.dense.weight",), "D(HK)->HKD"))
    return table


def rows(config: ModelConfig) -> list[Row]:
    """Returns the table, in the order of the model."""
    table = [Row("embedding", ("model.word_embeddings.weight",), "VD->VD")]
    for number in range(config.layers):
        ours, theirs = f"layers.{number}", f"model.layers.{number}"
        after, mlp = f"{theirs}.post_attention_layernorm.weight", f"{theirs}.mlp"
        table.append(Row(f"{ours}.attention_norm", (f"{theirs}.input_layernorm.weight",), "D->D"))
        table += attention_rows(config, f"{ours}.attention", f"{theirs}.attention")
        table.append(Row(f"{ours}.mlp_norm", (after,), "D->D"))
        moe = config.moe_layer(number)
        if moe is None:
            table += mlp_rows(f"{ours}.mlp", mlp)
        else:
            bias = f"{mlp}.gate.expert_bias"
            table += expert_rows(ours, mlp, bias, f"{mlp}.shared_experts", moe)
    table.append(Row("norm", ("model.norm.weight",), "D->D"))
    table.append(Row("head", ("lm_head.weight",), "VD->DV"))
    return table


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns a config.json that the published modelling code and `facts` both read."""
    moe, rotary_dim = config.moe, config.rotary_dim or config.head_dim
    if moe is None:
        raise ValueError("a model without experts is not of this family")
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "dtype": config.dtype,
        "eos_token_id": config.eos_id,
        "first_k_dense_replace": len(moe.dense_layers),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.embed,
        "intermediate_size": config.mlp,
        "mask_token_id": config.mask_id,
        "max_position_embeddings": config.max_length,
        "model_type": "llada2_moe",
        "moe_intermediate_size": moe.expert_mlp,
        "moe_router_enable_expert_bias": moe.expert_bias == "selection",
        "n_group": moe.groups,
        "norm_topk_prob": True,
        "num_attention_heads": config.heads,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "num_shared_experts": moe.shared_mlp // moe.expert_mlp or None,
        "pad_token_id": config.pad_id,
        "partial_rotary_factor": rotary_dim / config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "rotary_dim": rotary_dim,
        "routed_scaling_factor": moe.scale,
        "score_function": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": moe.top_groups,
        "use_bias": False,
        "use_qk_norm": config.qk_norm,
        "use_qkv_bias": False,
        "vocab_size": config.vocab,
    }


FAMILY = Family(
    architectures=("LLaDA2MoeModelLM",),
    source="inclusionAI/LLaDA2.0-mini",
    facts=facts,
    rows=rows,
    hf_config=hf_config,
    used=frozenset(
        [
            "eos_token_id",
            "first_k_dense_replace",
            "head_dim",
            "hidden_size",
            "intermediate_size",
            "mask_token_id",
            "max_position_embeddings",
            "moe_intermediate_size",
            "moe_router_enable_expert_bias",
            "n_group",
            "num_attention_heads",
            "num_experts",
            "num_experts_per_tok",
            "num_hidden_layers",
            "num_key_value_heads",
            "num_shared_experts",
            "pad_token_id",
            "partial_rotary_factor",
            "rms_norm_eps",
            "rope_theta",
            "rotary_dim",
            "routed_scaling_factor",
            "topk_group",
            "use_qk_norm",
            "vocab_size",
        ]
    ),
    inert=BOOKKEEPING
    | {
        "initializer_range": ANY,
        "model_type": ("llada2_moe", "llada2_moe_veomni"),
        "output_router_logits": ANY,
        # dropout acts in training only, and ours has none
        "embedding_dropout": ANY,
        "output_dropout": ANY,
        # read by no published code: the mask alone decides
        "max_window_layers": ANY,
        "sliding_window": ANY,
        # facts that this model has built in
        "hidden_act": ("silu",),
        "norm_head": (False,),
        "norm_softmax": (False,),
        "norm_topk_prob": (True,),
        "router_dtype": ("fp32", "float32"),
        "score_function": ("sigmoid",),
        "tie_word_embeddings": (False,),
        "use_bias": (False,),
        "use_qkv_bias": (False,),
        "use_rmsnorm": (True,),
        "use_sliding_window": (False,),
        "using_split_qkv_in_self_attention": (False,),
    },
)
