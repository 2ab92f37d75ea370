"""LLaDA-8B-Base and -Instruct, LLaDA-1.5, and grouped-query models of the same architecture."""

from typing import Any

from jdllm.convert.table import ANY, BOOKKEEPING, Family, Row
from jdllm.model.config import ModelConfig

BLOCK = "model.transformer.blocks.{i}."
EOT = "<|eot_id|>"
EOT_ID, EOT_VOCAB = 126348, 126464  # the published tokenizer, where the folder has none


def facts(hf: dict[str, Any], special: dict[str, int]) -> ModelConfig:
    """Returns the facts in LLaDA's config.json; text ends at eos and at the end of a turn."""
    heads, vocab = hf["n_heads"], hf.get("embedding_size") or hf["vocab_size"]
    pad = hf.get("pad_token_id")
    eot = special.get(EOT, EOT_ID if vocab == EOT_VOCAB else None)
    eos = hf["eos_token_id"]
    return ModelConfig(
        layers=hf["n_layers"],
        embed=hf["d_model"],
        heads=heads,
        kv_heads=hf.get("n_kv_heads") or heads,
        head_dim=hf["d_model"] // heads,
        mlp=hf.get("mlp_hidden_size") or hf["mlp_ratio"] * hf["d_model"],
        vocab=vocab,
        max_length=hf["max_sequence_length"],
        rope_theta=float(hf.get("rope_theta", 10000.0)),
        norm_eps=float(hf.get("rms_norm_eps", 1e-5)),
        mask_id=hf["mask_token_id"],
        eos_id=eos,
        pad_id=eos if pad is None else pad,
        stop_ids=(eos,) if eot in (None, eos) else (eos, eot),
    )


def rows(config: ModelConfig) -> list[Row]:
    """Returns the table, in the order of the model."""
    if config.heads == config.kv_heads:
        attention = [("attention.qkv", ("q_proj", "k_proj", "v_proj"), "(HK)D->DCHK")]
    else:
        attention = [
            ("attention.q", ("q_proj",), "(HK)D->DHK"),
            ("attention.kv", ("k_proj", "v_proj"), "(GK)D->DCGK"),
        ]
    layer = [
        ("attention_norm", ("attn_norm",), "D->D"),
        *attention,
        ("attention.out", ("attn_out",), "D(HK)->HKD"),
        ("mlp_norm", ("ff_norm",), "D->D"),
        ("mlp.gate_up", ("ff_proj", "up_proj"), "FD->DCF"),
        ("mlp.down", ("ff_out",), "DF->FD"),
    ]
    table = [Row("embedding", ("model.transformer.wte.weight",), "VD->VD")]
    for i in range(config.layers):
        for name, sources, rule in layer:
            tensors = tuple(BLOCK.format(i=i) + source + ".weight" for source in sources)
            table.append(Row(f"layers.{i}.{name}", tensors, rule))
    table.append(Row("norm", ("model.transformer.ln_f.weight",), "D->D"))
    table.append(Row("head", ("model.transformer.ff_out.weight",), "VD->DV"))
    return table


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns a config.json that the published modelling code and `facts` both read."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": config.embed,
        "embedding_size": config.vocab,
        "eos_token_id": config.eos_id,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": config.mask_id,
        "max_sequence_length": config.max_length,
        "mlp_hidden_size": config.mlp,
        "model_type": "llada",
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "n_layers": config.layers,
        "pad_token_id": config.pad_id,
        "rms_norm_eps": config.norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": config.rope_theta,
        "scale_logits": False,
        "torch_dtype": config.dtype,
        "vocab_size": config.vocab,
        "weight_tying": False,
    }


FAMILY = Family(
    architectures=("LLaDAModelLM",),
    source="GSAI-ML/LLaDA-8B-Instruct",
    facts=facts,
    rows=rows,
    hf_config=hf_config,
    used=frozenset(
        [
            "d_model",
            "embedding_size",
            "eos_token_id",
            "mask_token_id",
            "max_sequence_length",
            "mlp_hidden_size",
            "mlp_ratio",
            "n_heads",
            "n_kv_heads",
            "n_layers",
            "pad_token_id",
            "rms_norm_eps",
            "rope_theta",
            "vocab_size",
        ]
    ),
    inert=BOOKKEEPING
    | {
        "flash_attention": ANY,
        "init_cutoff_factor": ANY,
        "init_device": ANY,
        "init_fn": ANY,
        "init_std": ANY,
        "model_type": ("llada",),
        "precision": ANY,
        # dropout acts in training only, and ours has none
        "embedding_dropout": ANY,
        "residual_dropout": ANY,
        # facts that this model has built in
        "activation_type": ("silu",),
        "alibi": (False,),
        "alibi_bias_max": ANY,
        "attention_layer_norm": (False,),
        "attention_layer_norm_with_affine": ANY,
        "bias_for_layer_norm": (False, None),
        "block_group_size": ANY,
        "block_type": ("llama",),
        "include_bias": (False,),
        "include_qkv_bias": (False, None),
        "input_emb_norm": (False,),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "multi_query_attention": (None, False),
        "rope": (True,),
        "rope_full_precision": (True,),
        "scale_logits": (False,),
        "weight_tying": (False,),
    },
)
