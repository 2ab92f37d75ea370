"""Conversion of Dream and Qwen2: biases, tied heads, and what may not be mistaken for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdllm.convert import families
from jdllm.convert.commands import main
from jdllm.convert.published import flat_rope
from jdllm.convert.table import ConversionError, Row
from jdllm.model.config import NAMED, NO_ID, ModelConfig, count_parameters
from jdllm.model.model import abstract, named
from jdllm.store import checkpoint
from tests.convert.test_convert import (
    BF16,
    F32,
    assert_same_bits,
    config_with,
    failure,
    load_named,
    write_hf,
)

D, H, K, F, V, LAYERS = 16, 4, 4, 24, 32, 2
LAYER = "model.layers.{}."
HEAD = "lm_head.weight"
# family, key/value heads (as many as heads: one fused weight), tied head
KINDS = [("dream", 2, False), ("dream", H, False), ("qwen2", 2, True), ("qwen2", H, False)]
NAMES = ["dream-gqa", "dream-mha", "qwen2-tied", "qwen2-mha"]
kinds = pytest.mark.parametrize("family, kv_heads, tied", KINDS, ids=NAMES)


def hf_config(family: str, kv_heads: int = 2, tied: bool = False) -> dict[str, Any]:
    """A config.json with every key that the published ones have."""
    config = {
        "architectures": ["DreamModel"] if family == "dream" else ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 29,
        "eos_token_id": 29,
        "hidden_act": "silu",
        "hidden_size": D,
        "initializer_range": 0.02,
        "intermediate_size": F,
        "max_position_embeddings": 64,
        "max_window_layers": LAYERS,
        "model_type": "Dream" if family == "dream" else "qwen2",
        "num_attention_heads": H,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": V,
    }
    if family == "dream":
        config |= {"mask_token_id": 30, "pad_token_id": 28, "rope_scaling": None}
    return config


def random_tensors(
    kv_heads: int = 2, tied: bool = False, dtype: np.dtype = BF16
) -> dict[str, np.ndarray]:
    """Every tensor of the published format, written down without looking at the tables."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for i in range(LAYERS):
        sizes = {
            "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (H * K, D), "self_attn.q_proj.bias": (H * K,),
            "self_attn.k_proj.weight": (kv_heads * K, D), "self_attn.k_proj.bias": (kv_heads * K,),
            "self_attn.v_proj.weight": (kv_heads * K, D), "self_attn.v_proj.bias": (kv_heads * K,),
            "self_attn.o_proj.weight": (D, H * K), "mlp.gate_proj.weight": (F, D),
            "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F),
        }  # fmt: skip
        shapes |= {LAYER.format(i) + name: size for name, size in sizes.items()}
    shapes["model.norm.weight"] = (D,)
    if not tied:
        shapes[HEAD] = (V, D)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(size).astype(dtype) for name, size in shapes.items()}


# ---------------------------------------------------------------- weights, there and back


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@kinds
def test_round_trip_is_bit_identical(
    tmp_path: Path, family: str, kv_heads: int, tied: bool, dtype: np.dtype, files: int
):
    tensors = random_tensors(kv_heads, tied, dtype)
    source = write_hf(tmp_path / "hf", hf_config(family, kv_heads, tied), tensors, files)
    main([family, f"source={source}", f"output={tmp_path / 'ours'}"])
    config = checkpoint.read_config(tmp_path / "ours")
    assert (config.family, config.dtype, config.kv_heads) == (family, str(dtype), kv_heads)
    limit = "5_000_000_000" if files == 1 else "4000"
    words = [f"source={tmp_path / 'ours'}", f"output={tmp_path / 'back'}", f"shard_bytes={limit}"]
    main(["export", *words])
    written = sorted((tmp_path / "back").glob("*.safetensors"))
    assert (len(written) == 1) == (files == 1)
    back: dict[str, np.ndarray] = {}
    for path in written:
        back |= load_file(path)
    assert_same_bits(tensors, back)
    assert families.open_source(tmp_path / "back").config == config
    assert_same_bits(load_named(tmp_path / "ours"), load_named(source))


@kinds
def test_weights_land_where_they_belong(tmp_path: Path, family: str, kv_heads: int, tied: bool):
    tensors = random_tensors(kv_heads, tied, F32)
    ours = load_named(write_hf(tmp_path / "hf", hf_config(family, kv_heads, tied), tensors))
    for i in range(LAYERS):
        attention = {
            letter: tensors[f"{LAYER.format(i)}self_attn.{letter}_proj.bias"] for letter in "qkv"
        }
        name = f"layers.{i}.attention."
        if kv_heads == H:
            stacked = ours[name + "qkv_bias"]
            np.testing.assert_array_equal(stacked, [attention[x].reshape(H, K) for x in "qkv"])
        else:
            np.testing.assert_array_equal(ours[name + "q_bias"], attention["q"].reshape(H, K))
            for part, letter in enumerate("kv"):
                theirs = attention[letter].reshape(kv_heads, K)
                np.testing.assert_array_equal(ours[name + "kv_bias"][part], theirs)
        for part, word in enumerate(("gate", "up")):
            theirs = tensors[f"{LAYER.format(i)}mlp.{word}_proj.weight"]
            np.testing.assert_array_equal(ours[f"layers.{i}.mlp.gate_up"][:, part], theirs.T)
    assert ("head" in ours) == (not tied)
    if not tied:
        np.testing.assert_array_equal(ours["head"], tensors[HEAD].T)


def test_several_sources_need_a_place():
    with pytest.raises(ValueError, match=r"kv_bias: the rule \(GK\)->GK says not where"):
        Row("kv_bias", ("k", "v"), "(GK)->GK")


# ---------------------------------------------------------------- facts


def test_facts(tmp_path: Path):
    tensors = random_tensors()
    dream = families.open_source(write_hf(tmp_path / "dream", hf_config("dream"), tensors)).config
    qwen2 = families.open_source(write_hf(tmp_path / "qwen2", hf_config("qwen2"), tensors)).config
    assert (dream.mask_id, dream.eos_id, dream.pad_id, dream.stop_ids) == (30, 29, 28, (29,))
    assert (qwen2.mask_id, qwen2.eos_id, qwen2.pad_id, qwen2.stop_ids) == (NO_ID, 29, 29, (29,))
    assert dream.shift_logits and dream.qkv_bias and not dream.causal
    assert qwen2.causal and qwen2.qkv_bias and not qwen2.shift_logits


@pytest.mark.parametrize("eos, stops", [(29, (29, 27)), (27, (27,))])
def test_text_ends_at_the_end_of_turn_too(tmp_path: Path, eos: int, stops: tuple[int, ...]):
    source = write_hf(tmp_path / "hf", hf_config("dream") | {"eos_token_id": eos}, random_tensors())
    added = {"added_tokens": [{"content": "<|im_end|>", "id": 27}]}
    (source / "tokenizer.json").write_text(json.dumps(added))
    assert families.open_source(source).config.stop_ids == stops


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("dream-7b", 7_615_616_512),
        ("qwen2.5-0.5b", 494_032_768),
        ("llada-moe-7b", 7_356_880_896),
    ],
)
def test_named_shapes_are_those_of_the_published_configs(name: str, parameters: int):
    config = NAMED[name]
    entry = families.FAMILIES[config.family]
    hf = entry.hf_config(config)
    families.check_keys(entry, flat_rope(hf))
    assert entry.facts(hf, {}) == config  # no tokenizer.json: the end of turn is known by the size
    assert count_parameters(config) == parameters


@kinds
def test_parameters_are_counted(family: str, kv_heads: int, tied: bool):
    facts = families.FAMILIES[family].facts(hf_config(family, kv_heads, tied), {})
    leaves = named(abstract(facts))
    assert sum(leaf.size for leaf in leaves.values()) == count_parameters(facts)


def test_configs_written_before_these_facts_still_load():
    facts = json.loads(NAMED["tiny"].to_json())
    for name in ("qkv_bias", "causal", "tied_head", "shift_logits"):
        assert facts.pop(name) is False
    assert ModelConfig.from_json(json.dumps(facts)) == NAMED["tiny"]


# ---------------------------------------------------------------- bad input, one sentence each


def tensors_with(**changes: np.ndarray | None) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        names = {"bias": LAYER.format(0) + "self_attn.q_proj.bias", "head": HEAD}
        tensors = load_file(path) | {names[k]: v for k, v in changes.items()}
        save_file({k: v for k, v in tensors.items() if v is not None}, path)

    return change


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "sliding window": (
        config_with(use_sliding_window=True),
        ["use_sliding_window=True", "supported is False"],
    ),
    "scaled rope": (
        config_with(rope_scaling={"type": "yarn", "factor": 4.0}),
        ["rope_scaling={'type': 'yarn'", "supported is rope_type 'default' alone"],
    ),
    "sections of rope": (config_with(use_mrope=True), ["use_mrope=True", "supported is False"]),
    "activation": (config_with(hidden_act="gelu"), ["hidden_act='gelu'", "'silu'"]),
    "sliding layers": (
        config_with(layer_types=["full_attention", "sliding_attention"]),
        ["describes no model", "layer_types", "sliding_attention"],
    ),
    "other family's keys": (config_with(d_model=16), ["d_model=16", "allow_unknown=d_model"]),
    "missing key": (config_with(hidden_size=...), ["lacks the key 'hidden_size'"]),
    "ends that are text": (
        config_with(eos_token_id=[29, "27"]),
        ["eos_token_id=[29, '27']", "whole number of 0 or more, or a list of them"],
    ),
    "eos beyond the head": (config_with(eos_token_id=32), ["eos_id=32", "vocabulary's 32"]),
    "no bias": (tensors_with(bias=None), ["lacks 1 tensor(s)", "self_attn.q_proj.bias"]),
    "short bias": (tensors_with(bias=np.zeros(15, BF16)), ["q_proj.bias", "(15,)", "(16,)"]),
    "no head": (tensors_with(head=None), ["lacks 1 tensor(s)", HEAD]),
    "tied, with a head": (config_with(tie_word_embeddings=True), ["1 tensor(s)", HEAD, "takes"]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("family", ["dream", "qwen2"])
def test_bad_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, case: str
):
    spoil, words = BAD[case]
    source = write_hf(tmp_path / "hf", hf_config(family), random_tensors())
    spoil(source)
    message = failure(capsys, [family, f"source={source}", f"output={tmp_path / 'ours'}"])
    for word in words:
        assert word in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_dream_needs_a_mask_and_its_own_name(tmp_path: Path):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mask_token_id": ...}, "lacks the key 'mask_token_id'"),
        ({"mask_token_id": NO_ID}, "mask_id=-1 must be a whole number of 0 or more"),
        ({"model_type": "qwen2"}, "model_type='qwen2'; supported is 'Dream'"),
        ({"architectures": ["LLaDAModelLM"]}, "LLaDAModelLM, but .* of the family dream"),
    ]
    for number, (change, words) in enumerate(cases):
        source = write_hf(tmp_path / str(number), hf_config("dream"), random_tensors())
        config_with(**change)(source)
        with pytest.raises(ConversionError, match=words):
            families.open_source(source)


@pytest.mark.parametrize("found, asked", [("dream", "qwen2"), ("qwen2", "llada")])
def test_asking_for_another_family(tmp_path: Path, found: str, asked: str):
    source = write_hf(tmp_path / "hf", hf_config(found), random_tensors())
    with pytest.raises(ConversionError, match=f"of the family {found}, not {asked}"):
        families.open_source(source, asked)
