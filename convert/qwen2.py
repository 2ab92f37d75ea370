"""Qwen2 and Qwen2.5 as published: causal, the verifier of adaptive parallel decoding.

Its tensors and keys are also Dream's, which was trained on from Qwen2.5.
"""

from typing import Any

from jdllm.convert.table import ANY, BOOKKEEPING, Family, Row
from jdllm.model.config import NO_ID, ModelConfig

LAYER = "model.layers.{i}."
END = "<|im_end|>"
END_ID, END_VOCABS = 151645, (151936, 152064)  # the published tokenizer, where the folder has none


def facts(hf: dict[str, Any], special: dict[str, int]) -> ModelConfig:
    """Returns the facts in Qwen2's config.json; text ends at eos and at the end of a turn."""
    heads, vocab, eos = hf["num_attention_heads"], hf["vocab_size"], hf["eos_token_id"]
    kinds = set(hf.get("layer_types") or ())
    if kinds - {"full_attention"}:
        raise ValueError(f"layer_types may only be 'full_attention', not {sorted(kinds)}")
    pad = hf.get("pad_token_id")
    end = special.get(END, END_ID if vocab in END_VOCABS else None)
    return ModelConfig(
        layers=hf["num_hidden_layers"],
        embed=hf["hidden_size"],
        heads=heads,
        kv_heads=hf["num_key_value_heads"] or heads,
        head_dim=hf["hidden_size"] // heads,
        mlp=hf["intermediate_size"],
        vocab=vocab,
        max_length=hf["max_position_embeddings"],
        rope_theta=float(hf.get("rope_theta", 10000.0)),
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        mask_id=NO_ID,
        eos_id=eos,
        pad_id=eos if pad is None else pad,
        stop_ids=(eos,) if end in (None, eos) else (eos, end),
        family="qwen2",
        qkv_bias=True,
        causal=True,
        tied_head=bool(hf.get("tie_word_embeddings", False)),
    )


def attention_rows(config: ModelConfig) -> list[tuple[str, tuple[str, ...], str]]:
    """Returns the rows of attention: projections and biases, fused as the model holds them."""
    q, k, v = (f"self_attn.{letter}_proj" for letter in "qkv")
    if config.heads == config.kv_heads:
        fused = [("attention.qkv", (q, k, v), "(HK)D->DCHK", "(HK)->CHK")]
    else:
        fused = [
            ("attention.q", (q,), "(HK)D->DHK", "(HK)->HK"),
            ("attention.kv", (k, v), "(GK)D->DCGK", "(GK)->CGK"),
        ]
    table = []
    for name, sources, rule, bias_rule in fused:
        table.append((name, tuple(f"{s}.weight" for s in sources), rule))
        table.append((f"{name}_bias", tuple(f"{s}.bias" for s in sources), bias_rule))
    return table


def rows(config: ModelConfig) -> list[Row]:
    """Returns the table, in the order of the model."""
    layer = [
        ("attention_norm", ("input_layernorm.weight",), "D->D"),
        *attention_rows(config),
        ("attention.out", ("self_attn.o_proj.weight",), "D(HK)->HKD"),
        ("mlp_norm", ("post_attention_layernorm.weight",), "D->D"),
        ("mlp.gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "FD->DCF"),
        ("mlp.down", ("mlp.down_proj.weight",), "DF->FD"),
    ]
    table = [Row("embedding", ("model.embed_tokens.weight",), "VD->VD")]
    for i in range(config.layers):
        for name, sources, rule in layer:
            tensors = tuple(LAYER.format(i=i) + source for source in sources)
            table.append(Row(f"layers.{i}.{name}", tensors, rule))
    table.append(Row("norm", ("model.norm.weight",), "D->D"))
    if not config.tied_head:
        table.append(Row("head", ("lm_head.weight",), "VD->DV"))
    return table


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns a config.json that the published modelling code and `facts` both read."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "eos_token_id": config.eos_id,
        "hidden_act": "silu",
        "hidden_size": config.embed,
        "intermediate_size": config.mlp,
        "max_position_embeddings": config.max_length,
        "max_window_layers": config.layers,
        "model_type": "qwen2",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "pad_token_id": config.pad_id,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": config.dtype,
        "use_sliding_window": False,
        "vocab_size": config.vocab,
    }


FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    source="Qwen/Qwen2.5-0.5B",
    facts=facts,
    rows=rows,
    hf_config=hf_config,
    used=frozenset(
        [
            "eos_token_id",
            "hidden_size",
            "intermediate_size",
            "layer_types",
            "max_position_embeddings",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "pad_token_id",
            "rms_norm_eps",
            "rope_theta",
            "tie_word_embeddings",
            "vocab_size",
        ]
    ),
    inert=BOOKKEEPING
    | {
        "initializer_range": ANY,
        "model_type": ("qwen2",),
        # these two act only where use_sliding_window is true
        "max_window_layers": ANY,
        "sliding_window": ANY,
        # facts that this model has built in
        "hidden_act": ("silu",),
        "use_mrope": (False,),
        "use_sliding_window": (False,),
    },
)
