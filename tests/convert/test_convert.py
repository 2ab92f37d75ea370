"""Conversion from Hugging Face folders and back: exact weights, atomic output, clear errors."""

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jdllm.convert import families
from jdllm.convert.commands import main
from jdllm.convert.fetch import converted_folder
from jdllm.convert.shards import Shards
from jdllm.convert.table import ConversionError, apply, source_shape, undo
from jdllm.load import load_model
from jdllm.model.config import is_converted
from jdllm.model.model import named
from jdllm.runtime import files, sharding
from jdllm.store import checkpoint
from jdllm.store.checkpoint import pieces

ROOT = Path(__file__).parents[2]
GOLDENS = Path(__file__).parents[1] / "goldens"
D, H, K, F, V, LAYERS = 16, 4, 4, 24, 32, 3
BLOCK = "model.transformer.blocks.{}."
WTE, Q0 = "model.transformer.wte.weight", BLOCK.format(0) + "q_proj.weight"
BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype("float32")
BITS = {2: np.uint16, 4: np.uint32}


def hf_config(kv_heads: int = H) -> dict[str, Any]:
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": D,
        "n_heads": H,
        "n_kv_heads": kv_heads,
        "n_layers": LAYERS,
        "mlp_hidden_size": F,
        "mlp_ratio": 4,
        "vocab_size": V - 2,
        "embedding_size": V,
        "max_sequence_length": 64,
        "rope_theta": 500000.0,
        "mask_token_id": 30,
        "eos_token_id": 29,
        "pad_token_id": None,
        "weight_tying": False,
        "init_std": 0.02,
    }


def shapes(kv_heads: int = H) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published format, written down without looking at the tables."""
    found: dict[str, tuple[int, ...]] = {WTE: (V, D)}
    for i in range(LAYERS):
        sizes = {
            "attn_norm": (D,), "q_proj": (H * K, D), "k_proj": (kv_heads * K, D),
            "v_proj": (kv_heads * K, D), "attn_out": (D, H * K), "ff_norm": (D,),
            "ff_proj": (F, D), "up_proj": (F, D), "ff_out": (D, F),
        }  # fmt: skip
        found |= {f"{BLOCK.format(i)}{name}.weight": size for name, size in sizes.items()}
    return found | {
        "model.transformer.ln_f.weight": (D,),
        "model.transformer.ff_out.weight": (V, D),
    }


def random_tensors(kv_heads: int = H, dtype: np.dtype = BF16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes(kv_heads).items()
    }


def write_hf(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], files: int = 1
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(files):
        part = {name: tensors[name] for name in list(tensors)[i::files]}
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        bits = BITS[a[name].dtype.itemsize]
        np.testing.assert_array_equal(a[name].view(bits), b[name].view(bits), err_msg=name)


def load_named(folder: Path, dtype: str = "auto") -> dict[str, np.ndarray]:
    mesh = sharding.parse_mesh("1x1")
    model = load_model(str(folder), mesh, dtype)
    return {name: np.asarray(leaf[...]) for name, leaf in named(model).items()}


def convert(*words: object) -> None:
    main(["llada", *map(str, words)])


def failure(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one line on stderr with which a command fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    lines = capsys.readouterr().err.splitlines()
    progress = ("weights/s", "warning: ")
    messages = [line for line in lines if line and not any(word in line for word in progress)]
    assert stop.value.code == 1
    assert len(messages) == 1 and messages[0].startswith("error: "), messages
    assert "Traceback" not in messages[0]
    return messages[0]


# ---------------------------------------------------------------- weights, there and back


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_round_trip_is_bit_identical(tmp_path: Path, kv_heads: int, dtype: np.dtype, files: int):
    tensors = random_tensors(kv_heads, dtype)
    source = write_hf(tmp_path / "hf", hf_config(kv_heads), tensors, files)
    convert(f"source={source}", f"output={tmp_path / 'ours'}")
    config = checkpoint.read_config(tmp_path / "ours")
    assert (config.dtype, config.kv_heads, config.vocab) == (str(dtype), kv_heads, V)
    assert config.pad_id == config.eos_id == 29 and config.stop_ids == (29,)
    limit = "5_000_000_000" if files == 1 else "5000"
    words = [f"source={tmp_path / 'ours'}", f"output={tmp_path / 'back'}", f"shard_bytes={limit}"]
    main(["export", *words])
    written = sorted((tmp_path / "back").glob("*.safetensors"))
    assert (len(written) == 1) == (files == 1)
    back: dict[str, np.ndarray] = {}
    for path in written:
        back |= load_file(path)
    assert_same_bits(tensors, back)
    assert families.open_source(tmp_path / "back").config == config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "ours"]


@pytest.mark.parametrize("kv_heads", [H, 2])
def test_weights_land_where_they_belong(tmp_path: Path, kv_heads: int):
    tensors = random_tensors(kv_heads, F32)
    source = write_hf(tmp_path / "hf", hf_config(kv_heads), tensors, files=2)
    convert(f"source={source}", f"output={tmp_path / 'ours'}")
    ours = load_named(tmp_path / "ours", "float32")
    for i in range(LAYERS):
        theirs = {n: tensors[f"{BLOCK.format(i)}{n}.weight"] for n in ("q_proj", "k_proj", "v_proj",
                  "attn_out", "ff_proj", "up_proj", "ff_out", "attn_norm", "ff_norm")}  # fmt: skip
        name = f"layers.{i}."
        q = ours.get(name + "attention.q", ours.get(name + "attention.qkv", np.empty(0)))
        kv = ours.get(name + "attention.kv")
        if kv is None:
            q, kv = q[:, 0], q[:, 1:]
        for d, h, k in np.ndindex(D, H, K):
            assert q[d, h, k] == theirs["q_proj"][h * K + k, d]
            assert ours[name + "attention.out"][h, k, d] == theirs["attn_out"][d, h * K + k]
        for d, g, k in np.ndindex(D, kv_heads, K):
            assert kv[d, 0, g, k] == theirs["k_proj"][g * K + k, d]
            assert kv[d, 1, g, k] == theirs["v_proj"][g * K + k, d]
        np.testing.assert_array_equal(ours[name + "mlp.gate_up"][:, 0], theirs["ff_proj"].T)
        np.testing.assert_array_equal(ours[name + "mlp.gate_up"][:, 1], theirs["up_proj"].T)
        np.testing.assert_array_equal(ours[name + "mlp.down"], theirs["ff_out"].T)
        np.testing.assert_array_equal(ours[name + "attention_norm"], theirs["attn_norm"])
        np.testing.assert_array_equal(ours[name + "mlp_norm"], theirs["ff_norm"])
    np.testing.assert_array_equal(ours["embedding"], tensors[WTE])
    np.testing.assert_array_equal(ours["head"], tensors["model.transformer.ff_out.weight"].T)
    np.testing.assert_array_equal(ours["norm"], tensors["model.transformer.ln_f.weight"])


@pytest.mark.parametrize("golden", ["llada", "llada_gqa"])
def test_converted_equals_loaded_directly(tmp_path: Path, golden: str):
    convert(f"source={GOLDENS / golden}", f"output={tmp_path / 'ours'}")
    assert_same_bits(load_named(GOLDENS / golden), load_named(tmp_path / "ours"))


def test_dtype_can_be_chosen(tmp_path: Path):
    tensors = random_tensors(dtype=F32)
    source = write_hf(tmp_path / "hf", hf_config(), tensors)
    convert(f"source={source}", f"output={tmp_path / 'half'}", "dtype=bfloat16")
    assert checkpoint.read_config(tmp_path / "half").dtype == "bfloat16"
    main(["export", f"source={tmp_path / 'half'}", f"output={tmp_path / 'back'}", "dtype=float32"])
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert_same_bits(back, {name: t.astype(BF16).astype(F32) for name, t in tensors.items()})
    with pytest.raises(SystemExit) as stop:
        convert(f"source={source}", f"output={tmp_path / 'x'}", "dtype=int8")
    assert stop.value.code == 2
    with pytest.raises(ValueError, match=r"dtype=int8 must be one of float32, .*bfloat16"):
        families.open_source(source, dtype="int8")


def test_a_precise_tensor_among_others_is_not_rounded_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tensors = random_tensors()
    norm = BLOCK.format(1) + "attn_norm.weight"
    tensors[norm] = tensors[norm].astype(F32) + np.float32(1e-5)
    source = write_hf(tmp_path / "hf", hf_config(), tensors)
    words = [f"source={source}", f"output={tmp_path / 'ours'}"]
    message = failure(capsys, ["llada", *words])
    assert norm in message and "float32" in message and "dtype=bfloat16" in message
    convert(*words, "dtype=float32")
    exact = load_named(tmp_path / "ours")["layers.1.attention_norm"]
    np.testing.assert_array_equal(exact, tensors[norm])


def test_narrow_tensors_among_wide_ones_are_widened(tmp_path: Path):
    tensors = random_tensors(dtype=F32)
    tensors[Q0] = tensors[Q0].astype(BF16)
    source = families.open_source(write_hf(tmp_path / "hf", hf_config(), tensors))
    assert source.config.dtype == "float32"


def test_tokenizer_files_come_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_hf(tmp_path / "hf", hf_config(), random_tensors())
    convert(f"source={source}", f"output={tmp_path / 'without'}")
    assert "no tokenizer.json" in capsys.readouterr().err
    added = {"added_tokens": [{"content": "<|eot_id|>", "id": 28}]}
    (source / "tokenizer.json").write_text(json.dumps(added))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    convert(f"source={source}", f"output={tmp_path / 'with'}")
    assert "no tokenizer.json" not in capsys.readouterr().err
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "with" / name).read_bytes() == (source / name).read_bytes()
    assert checkpoint.read_config(tmp_path / "with").stop_ids == (29, 28)


def test_another_mask_in_the_same_architecture(tmp_path: Path):
    """As of a LLaDA with a tokenizer of its own: nothing is assumed of the published one."""
    facts = hf_config(kv_heads=2) | {"mask_token_id": 5, "eos_token_id": 1, "pad_token_id": 0}
    source = write_hf(tmp_path / "hf", facts, random_tensors(kv_heads=2))
    added = {"added_tokens": [{"content": "<|eot_id|>", "id": 7}]}
    (source / "tokenizer.json").write_text(json.dumps(added))
    config = families.open_source(source).config
    assert (config.mask_id, config.eos_id, config.pad_id, config.stop_ids) == (5, 1, 0, (1, 7))


def test_default_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JDLLM_HOME", str(tmp_path / "home"))
    source = write_hf(tmp_path / "hf", hf_config(), random_tensors())
    convert(f"source={source}")
    assert is_converted(tmp_path / "home" / "models" / "hf")
    monkeypatch.chdir(source)
    assert converted_folder(".") == tmp_path / "home" / "models" / "hf"
    assert converted_folder("owner/name").name == "owner--name"


# ---------------------------------------------------------------- mixtures of experts

SPARSE = {"llada_moe": "llada_moe", "llada_moe_ext": "llada_moe", "llada2_moe": "llada2"}


def sparse_source(folder: Path, golden: str, dtype: np.dtype = F32) -> dict[str, np.ndarray]:
    """Copies a recorded checkpoint, with its mask named; expert biases stay float32."""
    facts = json.loads((GOLDENS / golden / "config.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    for path in sorted((GOLDENS / golden).glob("*.safetensors")):
        tensors |= load_file(path)
    for name in tensors:
        if not name.endswith("expert_bias"):
            tensors[name] = tensors[name].astype(dtype)
    write_hf(folder, facts | {"mask_token_id": facts["vocab_size"] - 1}, tensors, files=2)
    return tensors


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("golden", SPARSE)
def test_experts_round_trip_is_bit_identical(tmp_path: Path, golden: str, dtype: np.dtype):
    tensors = sparse_source(tmp_path / "hf", golden, dtype)
    main([SPARSE[golden], f"source={tmp_path / 'hf'}", f"output={tmp_path / 'ours'}"])
    config = checkpoint.read_config(tmp_path / "ours")
    assert config.moe and config.moe.router_stored == config.dtype == str(dtype)
    assert config == families.open_source(tmp_path / "hf").config
    main(["export", f"source={tmp_path / 'ours'}", f"output={tmp_path / 'back'}"])
    assert_same_bits(tensors, load_file(tmp_path / "back" / "model.safetensors"))
    assert families.open_source(tmp_path / "back").config == config
    ours = load_named(tmp_path / "ours", "bfloat16")
    precise = {name for name, array in ours.items() if array.dtype == F32}
    assert precise == {n for n in ours if n.endswith(("experts.router", "experts.bias"))}
    assert_same_bits(load_named(tmp_path / "hf"), load_named(tmp_path / "ours"))


def test_experts_land_where_they_belong(tmp_path: Path):
    theirs = sparse_source(tmp_path / "hf", "llada2_moe")
    ours = load_named(tmp_path / "hf")
    mlp = "model.layers.2.mlp."
    for e in range(16):
        gate, up, down = (
            theirs[f"{mlp}experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")
        )
        np.testing.assert_array_equal(ours["layers.2.experts.gate_up"][e, :, 0], gate.T)
        np.testing.assert_array_equal(ours["layers.2.experts.gate_up"][e, :, 1], up.T)
        np.testing.assert_array_equal(ours["layers.2.experts.down"][e], down.T)
    np.testing.assert_array_equal(ours["layers.2.experts.router"], theirs[mlp + "gate.weight"].T)
    fused = theirs["model.layers.2.attention.query_key_value.weight"]  # 4 + 2 + 2 heads of 16
    q, kv = ours["layers.2.attention.q"], ours["layers.2.attention.kv"]
    np.testing.assert_array_equal(q[:, 3], fused[48:64].T)
    np.testing.assert_array_equal(kv[:, 0, 1], fused[80:96].T)
    np.testing.assert_array_equal(kv[:, 1, 0], fused[96:112].T)


@pytest.mark.parametrize("limit", [1, 37, 1000])
def test_pieces_of_any_size_make_the_same_experts(tmp_path: Path, limit: int):
    sparse_source(tmp_path / "hf", "llada2_moe")
    units = dict(families.open_source(tmp_path / "hf").units())
    for name, lazy in units["layers.1"].items():
        whole, joined = np.asarray(lazy), np.empty(lazy.shape, lazy.dtype)
        for index in pieces(lazy.shape, [1] * len(lazy.shape), max(limit, lazy.size // 20)):
            joined[index] = lazy.read(index)
        np.testing.assert_array_equal(joined, whole, err_msg=name)


@pytest.mark.parametrize(
    ("golden", "changes", "words"),
    [
        ("llada_moe", {"mask_token_id": ...}, "neither mask_token_id nor .* add the mask's id"),
        ("llada_moe", {"norm_topk_prob": True}, "norm_topk_prob=True; supported is None or False"),
        ("llada_moe", {"moe_layer_freq": [1]}, "moe_layer_freq has 1 entries for 2 layers"),
        ("llada_moe", {"num_experts": 9}, "experts.8"),
        ("llada2_moe", {"expert_capacity": 4}, "expert_capacity=4"),
        ("llada2_moe", {"rotary_dim": 4}, "rotary_dim=4 contradicts"),
        ("llada2_moe", {"n_group": 3}, "whole groups"),
        ("llada2_moe", {"num_attention_heads": 6}, "query_key_value"),
    ],
)
def test_bad_sparse_input(tmp_path: Path, golden: str, changes: dict[str, Any], words: str):
    sparse_source(tmp_path / "hf", golden)
    config_with(**changes)(tmp_path / "hf")
    with pytest.raises(ConversionError, match=words):
        families.open_source(tmp_path / "hf")


# ---------------------------------------------------------------- bad input, one sentence each


def config_with(**changes: Any) -> Callable[[Path], object]:
    """Changes keys of config.json; a value of ... drops the key."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return change


def tensors_with(**changes: np.ndarray | None) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        names = {"extra": "extra.weight", "q": Q0, "wte": WTE}
        tensors = load_file(path) | {names[k]: v for k, v in changes.items()}
        save_file({k: v for k, v in tensors.items() if v is not None}, path)

    return change


def bytes_of(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def no_file(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


FLOAT8 = np.zeros((H * K, D), ml_dtypes.float8_e4m3fn)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
BAD_SINGLE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (no_file("config.json"), ["has no config.json"]),
    "config not json": (bytes_of("config.json", lambda b: b[:-1]), ["not valid JSON"]),
    "config a list": (bytes_of("config.json", lambda b: b"[]"), ["JSON object, not a list"]),
    "other architecture": (
        config_with(architectures=["MistralForCausalLM"]),
        ["MistralForCausalLM", "not supported", "supported are LLaDAModelLM (llada)"],
    ),
    "no architecture": (config_with(architectures=...), ["(none)", "LLaDAModelLM"]),
    "other family, this name": (config_with(model_type="Dream"), ["model_type='Dream'", "'llada'"]),
    "other family's keys": (config_with(num_experts=64), ["num_experts=64", "allow_unknown="]),
    "inert key, other value": (config_with(alibi=True), ["alibi=True", "supported is False"]),
    "missing key": (config_with(d_model=...), ["config.json lacks the key 'd_model'"]),
    "null": (config_with(n_layers=None), ["config.json", "layers=None", "whole number"]),
    "text": (config_with(d_model="16"), ["config.json gives d_model='16'", "must not be text"]),
    "no heads": (config_with(n_heads=0), ["config.json", "describes no model"]),
    "ungrouped heads": (config_with(n_kv_heads=3), ["multiple", "heads=4", "kv_heads=3"]),
    "quantised": (config_with(quantization_config={"bits": 4}), ["quantised"]),
    "float8": (tensors_with(q=FLOAT8), [Q0, "F8_E4M3", "F32, F16, BF16", "quantised"]),
    "integers": (tensors_with(q=np.zeros((16, 16), "int8")), [Q0, "I8"]),
    "wrong shape": (tensors_with(q=np.zeros((H * K, D + 1), BF16)), [Q0, "(16, 17)", "(16, 16)"]),
    "missing tensor": (tensors_with(q=None), ["lacks 1 tensor(s)", Q0]),
    "leftover tensor": (tensors_with(extra=np.zeros(3, BF16)), ["1 tensor(s)", "extra.weight"]),
    "no weights": (no_file("model.safetensors"), ["neither", "there are no weights"]),
    "truncated": (bytes_of("model.safetensors", lambda b: b[:-7]), ["truncated", "download"]),
    "empty": (bytes_of("model.safetensors", lambda b: b""), ["truncated", "model.safetensors"]),
    "LFS pointer": (bytes_of("model.safetensors", lambda b: LFS), ["truncated or damaged"]),
    "tokenizer damaged": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        ["tokenizer.json is not valid JSON"],
    ),
}
SECOND = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
BAD_SEVERAL: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (no_file(SECOND), [SECOND, "missing", "download"]),
    "truncated shard": (bytes_of(SECOND, lambda b: b[: len(b) // 2]), [SECOND, "truncated"]),
    "index not json": (bytes_of(INDEX, lambda b: b"{"), [INDEX, "damaged"]),
    "index without map": (bytes_of(INDEX, lambda b: b"{}"), [INDEX, "weight_map"]),
    "index promises more": (
        bytes_of(INDEX, lambda b: b.replace(b'map": {', f'map": {{"more": "{SECOND}", '.encode())),
        ["lacks more", INDEX],
    ),
    "tensor twice": (
        lambda folder: save_file(random_tensors(), folder / SECOND),
        ["is in both", SECOND],
    ),
}  # fmt: skip
BAD = {name: (1, *case) for name, case in BAD_SINGLE.items()}
BAD |= {name: (3, *case) for name, case in BAD_SEVERAL.items()}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str):
    files, spoil, words = BAD[case]
    source = write_hf(tmp_path / "hf", hf_config(), random_tensors(), files)
    spoil(source)
    message = failure(capsys, ["llada", f"source={source}", f"output={tmp_path / 'ours'}"])
    for word in words:
        assert word in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_asking_for_another_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(families.FAMILIES, "other", families.FAMILIES["llada"])
    source = write_hf(tmp_path / "hf", hf_config(), random_tensors())
    with pytest.raises(ConversionError, match="of the family llada, not other"):
        families.open_source(source, "other")


def test_unknown_keys_can_be_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_hf(tmp_path / "hf", hf_config() | {"flavour": 1, "colour": 2}, random_tensors())
    words = [f"source={source}", f"output={tmp_path / 'ours'}"]
    message = failure(capsys, ["llada", *words])
    assert "flavour=1, colour=2" in message and "--allow_unknown flavour colour" in message
    message = failure(capsys, ["llada", *words, "allow_unknown=flavour"])
    assert "colour=2" in message and "pass allow_unknown=colour" in message
    main(["llada", *words, "--allow_unknown", "flavour", "colour"])
    assert is_converted(tmp_path / "ours")


def test_a_source_that_is_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    message = failure(capsys, ["llada", f"source={tmp_path / 'no'}", f"output={tmp_path / 'x'}"])
    assert "neither a folder nor a Hugging Face id" in message
    message = failure(capsys, ["export", f"source={tmp_path}", f"output={tmp_path / 'x'}"])
    assert "not a converted model" in message


def test_exporting_an_unknown_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_hf(tmp_path / "hf", hf_config(), random_tensors())
    convert(f"source={source}", f"output={tmp_path / 'ours'}")
    config_with(family="later")(tmp_path / "ours")
    words = ["export", f"source={tmp_path / 'ours'}", f"output={tmp_path / 'back'}"]
    message = failure(capsys, words)
    assert "family later" in message and f"supported are {', '.join(families.FAMILIES)}" in message
    assert not (tmp_path / "back").exists()


def test_the_page_lists_every_key():
    page = (ROOT / "docs" / "convert.md").read_text()
    for name, family in families.FAMILIES.items():
        missing = [key for key in family.inert if f"`{key}`" not in page]
        assert missing == [], name


# ---------------------------------------------------------------- all or nothing


def test_existing_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "ours").mkdir()
    # refused before the source is looked at: nothing is downloaded in vain
    message = failure(capsys, ["llada", "source=owner/name", f"output={tmp_path / 'ours'}"])
    assert "exists already" in message and "another output" in message


@pytest.mark.parametrize("command", ["llada", "export"])
def test_too_small_a_disk(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
):
    source = write_hf(tmp_path / "hf", hf_config(), random_tensors())
    if command == "export":
        convert(f"source={source}", f"output={tmp_path / 'ours'}")
        source = tmp_path / "ours"
    before = sorted(path.name for path in tmp_path.iterdir())
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    message = failure(capsys, [command, f"source={source}", f"output={tmp_path / 'out'}"])
    assert "GB free" in message and "make room" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_disk_full_halfway(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    source = write_hf(tmp_path / "hf", hf_config(), random_tensors())
    words = ["llada", f"source={source}", f"output={tmp_path / 'ours'}"]
    whole, calls = Shards.map, []

    def failing(self: Shards, name: str) -> np.ndarray:
        calls.append(name)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, name)

    monkeypatch.setattr(Shards, "map", failing)
    message = failure(capsys, words)
    assert "filled up" in message and "layers." in message
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    monkeypatch.undo()
    main(words)
    assert is_converted(tmp_path / "ours")


DRIVER = """
import sys, time
from pathlib import Path
from jdllm.convert.commands import convert
from jdllm.convert.families import Source, open_source

class Stuck(Source):
    def units(self):
        units = super().units()
        yield next(units)
        print("written", flush=True)
        time.sleep(600)

source = open_source(Path(sys.argv[1]))
convert(Stuck(source.family, source.config, source.shards), Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_halfway(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_hf(tmp_path / "hf", hf_config(), random_tensors())
    output = tmp_path / "ours"
    command = [sys.executable, "-c", DRIVER, str(source), str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout and process.stdout.readline() == "written\n"
        message = failure(capsys, ["llada", f"source={source}", f"output={output}"])
        assert "another process is writing" in message
        process.kill()
    left = [path for path in tmp_path.iterdir() if path != source]
    assert len(left) == 1 and not output.exists()
    assert (left[0] / "weights" / "embedding").is_dir()
    assert not is_converted(left[0])
    with pytest.raises((ValueError, OSError)):
        load_named(left[0])
    convert(f"source={source}", f"output={output}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]
    assert_same_bits(load_named(output), load_named(source))


# ---------------------------------------------------------------- the arithmetic

RULES = ["(HK)D->DHK", "(GK)D->DGK", "D(HK)->HKD", "VD->DV", "VD->VD", "FD->DF", "DF->FD", "D->D"]
RULES += ["(HK)D->DCHK", "(GK)D->DCGK", "FD->DCF", "(HK)->HK", "(HK)->CHK", "(GK)->CGK"]
SIZES = st.fixed_dictionaries({letter: st.integers(1, 7) for letter in "DHGKFV"})


@given(st.sampled_from(RULES), SIZES, st.sampled_from([BF16, F32]), st.integers(0, 2**32 - 1))
def test_undo_inverts_apply(rule: str, size: dict[str, int], dtype: np.dtype, seed: int):
    shape = source_shape(rule, size)
    left, right = rule.split("->")
    assert math.prod(shape) == math.prod(size[x] for x in left if x.isalpha())
    bits = np.random.default_rng(seed).integers(
        0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8
    )
    array = bits.view(dtype)  # NaNs and infinities included
    ours = apply(rule, array, size)
    assert ours.shape == tuple(size[x] for x in right if x != "C")
    back = np.ascontiguousarray(undo(rule, ours, size))
    assert back.shape == array.shape
    np.testing.assert_array_equal(back.view(np.uint8), bits)


def test_source_shapes_by_hand():
    size = {"D": 5, "H": 3, "G": 1, "K": 2, "F": 7, "V": 11}
    assert source_shape("(HK)D->DHK", size) == (6, 5)
    assert source_shape("D(HK)->HKD", size) == (5, 6)
    assert source_shape("VD->DV", size) == (11, 5)
    assert source_shape("D->D", size) == (5,)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), st.data())
def test_pieces_tile_an_array(axes: list[tuple[int, int]], data: st.DataObject):
    shape, chunk = [n for n, _ in axes], [min(n, c) for n, c in axes]
    limit = data.draw(st.integers(1, 200))
    seen = np.zeros(shape, int)
    for index in pieces(shape, chunk, limit):
        seen[index] += 1
        assert seen[index].size <= max(limit, math.prod(chunk))
        for part, size, step in zip(index, shape, chunk, strict=True):
            assert part.start % step == 0 and (part.stop % step == 0 or part.stop == size)
    assert (seen == 1).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2000))
def test_pieces_of_any_size_make_the_same_weights(limit: int):
    source = families.open_source(GOLDENS / "llada")
    for _, arrays in list(source.units())[:2]:
        for name, lazy in arrays.items():
            whole, joined = np.asarray(lazy), np.empty(lazy.shape, lazy.dtype)
            assert whole.dtype == lazy.dtype and whole.shape == lazy.shape, name
            for index in pieces(lazy.shape, [1] * len(lazy.shape), max(limit, lazy.size // 20)):
                joined[index] = lazy.read(index)
            np.testing.assert_array_equal(joined, whole, err_msg=name)


@pytest.mark.slow
def test_memory_stays_below_one_shard(tmp_path: Path):
    script = ROOT / "experiments" / "convert_memory.py"
    result = tmp_path / "memory.json"
    command = [sys.executable, str(script), f"folder={tmp_path}", f"result={result}"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    measured = json.loads(result.read_text())
    assert measured["checkpoint_bytes"] >= 1_000_000_000
    assert measured["convert_growth"] <= 1.15 * measured["largest_shard"]
