"""Published checkpoints as they are on the hub and as fine-tuning tools write them."""

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jdllm import load
from jdllm.convert import families
from jdllm.convert.commands import ConvertConfig, main
from jdllm.convert.plan import PlanConfig, describe_model
from jdllm.convert.table import ConversionError, sizes, source_shapes
from jdllm.evaluation import bench, grid, harness, sweeps, tuning
from jdllm.evaluation import run as evaluation
from jdllm.evaluation.config import EvalConfig
from jdllm.generation import GenerateConfig, complete
from jdllm.llm import LLM
from jdllm.model.config import NAMED, count_parameters
from jdllm.runtime import cli, sharding
from jdllm.runtime.journal import Journal
from jdllm.training.config import SFTConfig
from tests.convert.test_convert import (
    BF16,
    F32,
    GOLDENS,
    SPARSE,
    assert_same_bits,
    config_with,
    load_named,
    sparse_source,
    write_hf,
)
from tests.convert.test_families import hf_config
from tests.convert.test_families import random_tensors as qwen2_tensors


def tokenizer(folder: Path, named: dict[str, Any], **ids: int) -> None:
    """Tokenizer files that name special tokens: texts by id, and which of them is which."""
    added = [{"content": text, "id": i} for text, i in ids.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def generation(folder: Path, eos: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


def as_on_the_hub(folder: Path, golden: str, **changes: Any) -> dict[str, np.ndarray]:
    """A recorded checkpoint whose config.json has the keys of the published one, and no others."""
    tensors = sparse_source(folder, golden)
    gone = {"mask_token_id": ...}
    if golden == "llada2_moe":
        gone |= {"eos_token_id": ..., "use_qk_norm": ..., "sliding_window": ...}
        gone |= {"dtype": ..., "torch_dtype": "float32", "use_rmsnorm": True}
        gone |= {"using_split_qkv_in_self_attention": False}
    else:
        gone |= {"architectures": ["LLaDAMoEModel"]}
    config_with(**gone | changes)(folder)
    return tensors


# ---------------------------------------------------------------- LLaDA2 and LLaDA-MoE on the hub


def test_llada2_takes_eos_and_mask_from_its_tokenizer(tmp_path: Path):
    as_on_the_hub(tmp_path / "hf", "llada2_moe")
    ids = {"<|endoftext|>": 310, "<|role_end|>": 311, "[M]": 312, "<|mask|>": 313}
    named = {"eos_token": {"content": "<|endoftext|>"}, "mask_token": "[M]"}
    tokenizer(tmp_path / "hf", named, **ids)
    config = families.open_source(tmp_path / "hf").config
    assert (config.eos_id, config.mask_id, config.pad_id) == (310, 312, 316)
    assert config.stop_ids == (310, 311) and config.qk_norm
    tokenizer(tmp_path / "hf", {}, **ids)  # no names: the padding ends, the usual text masks
    (tmp_path / "hf" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "[M]"}))
    config = families.open_source(tmp_path / "hf").config
    assert (config.eos_id, config.mask_id) == (312, 313)
    (tmp_path / "hf" / "special_tokens_map.json").unlink()
    config = families.open_source(tmp_path / "hf").config
    assert (config.eos_id, config.mask_id, config.stop_ids) == (316, 313, (316, 311))
    config_with(pad_token_id=...)(tmp_path / "hf")
    with pytest.raises(ConversionError, match="config.json lacks the key 'eos_token_id'"):
        families.open_source(tmp_path / "hf")
    generation(tmp_path / "hf", [309, 308])
    config = families.open_source(tmp_path / "hf").config
    assert (config.eos_id, config.stop_ids) == (309, (308, 309, 311))


@pytest.mark.parametrize("golden", ["llada_moe", "llada2_moe"])
def test_what_is_on_the_hub_converts(tmp_path: Path, golden: str):
    """The same weights as under the keys that the recorded checkpoint has."""
    as_on_the_hub(tmp_path / "hf", golden)
    tokenizer(tmp_path / "hf", {}, **{"<|mask|>": 319})
    sparse_source(tmp_path / "full", golden)
    main([SPARSE[golden], f"source={tmp_path / 'hf'}", f"output={tmp_path / 'ours'}"])
    assert load.read_facts(str(tmp_path / "ours")) == load.read_facts(str(tmp_path / "full"))
    assert_same_bits(load_named(tmp_path / "ours"), load_named(tmp_path / "full"))


def test_every_id_that_ends_a_text_outlives_an_export(tmp_path: Path):
    """Those of config.json's own list, which no file of the tokenizer has, too."""
    as_on_the_hub(tmp_path / "hf", "llada_moe", eos_token_id=[310, 307, 305])
    tokenizer(tmp_path / "hf", {}, **{"<|mask|>": 319})
    main(["llada_moe", f"source={tmp_path / 'hf'}", f"output={tmp_path / 'ours'}"])
    main(["export", f"source={tmp_path / 'ours'}", f"output={tmp_path / 'back'}"])
    there, back = (families.open_source(tmp_path / name).config for name in ("hf", "back"))
    assert back == there and {310, 307, 305} <= set(back.stop_ids)


SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size",
    "num_attention_heads", "max_position_embeddings",
)  # fmt: skip
COMMON = {
    "num_key_value_heads": 4, "head_dim": 128, "rotary_dim": 64, "vocab_size": 157184,
    "pad_token_id": 156892, "num_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, published",
    [
        ("llada2-flash", (32, 4096, 9216, 1024, 32, 16384)),
        ("llada2-mini", (20, 2048, 5120, 512, 16, 32768)),
    ],
)
def test_named_shapes_are_those_of_the_published_configs(
    tmp_path: Path, name: str, published: tuple[int, ...]
):
    as_on_the_hub(tmp_path / "hf", "llada2_moe", torch_dtype="bfloat16")
    config_with(**COMMON | dict(zip(SIZES, published, strict=True)))(tmp_path / "hf")
    family, config = families.read_facts(tmp_path / "hf")
    assert config.moe and NAMED[name].moe
    moe = dataclasses.replace(config.moe, router_stored="bfloat16")  # which the weights say
    assert (family, dataclasses.replace(config, moe=moe)) == ("llada2", NAMED[name])


@pytest.mark.parametrize(
    "name, tensors, parameters, size",
    [
        ("llada2-mini", 14_813, 16_255_643_392, 32_511_296_512),
        ("llada2-flash", 24_161, 102_889_705_216, 205_779_426_304),
        ("llada-moe-7b", 3_219, 7_356_880_896, 14_713_761_792),
    ],
)
def test_sizes_are_those_of_the_published_tables(
    name: str, tensors: int, parameters: int, size: int
):
    """Expert biases are stored in float32, everything else in bfloat16."""
    config = NAMED[name]
    shapes = source_shapes(families.FAMILIES[config.family].rows(config), sizes(config))
    width = {key: 4 if key.endswith("expert_bias") else 2 for key in shapes}
    assert (len(shapes), count_parameters(config)) == (tensors, parameters)
    assert sum(width[key] * int(np.prod(shape)) for key, shape in shapes.items()) == size


# ---------------------------------------------------------------- merged experts


def merge(tensors: dict[str, np.ndarray], form: str) -> dict[str, np.ndarray]:
    """Experts of a layer in one tensor each, as dFactory's and dInfer's converters stack them."""
    merged = {name: x for name, x in tensors.items() if ".mlp.experts." not in name}
    for layer in sorted({name.partition(".mlp.experts.")[0] for name in tensors.keys() - merged}):
        mlp, part = f"{layer}.mlp", {}
        count = sum(name.startswith(f"{mlp}.experts.") for name in tensors) // 3
        for kind in ("gate_proj", "up_proj", "down_proj"):
            each = [tensors[f"{mlp}.experts.{e}.{kind}.weight"] for e in range(count)]
            part[kind] = np.stack(each)
        if form == "dfactory":
            merged |= {f"{mlp}.experts.{kind}": x for kind, x in part.items()}
        else:
            merged[f"{mlp}.w1"] = np.concatenate([part["gate_proj"], part["up_proj"]], axis=1)
            merged[f"{mlp}.w2"] = part["down_proj"]
    return merged


@pytest.mark.parametrize("form", ["dfactory", "dinfer"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("golden", SPARSE)
def test_merged_experts_are_the_same_model(tmp_path: Path, golden: str, dtype: np.dtype, form: str):
    tensors = sparse_source(tmp_path / "apart", golden, dtype)
    facts = json.loads((tmp_path / "apart" / "config.json").read_text())
    if golden == "llada2_moe":
        facts |= {"model_type": "llada2_moe_veomni"}
    write_hf(tmp_path / "merged", facts, merge(tensors, form), files=3)
    assert len(merge(tensors, form)) < len(tensors)
    main([SPARSE[golden], f"source={tmp_path / 'merged'}", f"output={tmp_path / 'ours'}"])
    for folder in ("merged", "ours"):  # streamed onto the devices, and through a conversion
        assert_same_bits(load_named(tmp_path / folder), load_named(tmp_path / "apart"))
    main(["export", f"source={tmp_path / 'ours'}", f"output={tmp_path / 'back'}"])
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), tensors)


def test_merged_experts_that_do_not_fit(tmp_path: Path):
    facts = json.loads((GOLDENS / "llada2_moe" / "config.json").read_text())
    tensors = merge(sparse_source(tmp_path / "apart", "llada2_moe"), "dfactory")
    name = "model.layers.1.mlp.experts.up_proj"
    cases = {
        "lacks 1 tensor.*layers.1.mlp.experts.up_proj": {
            k: tensors[k] for k in tensors if k != name
        },
        r"up_proj has shape \(16, 64, 32\), but .* asks for \(16, 32, 64\)": tensors
        | {name: np.ascontiguousarray(tensors[name].swapaxes(1, 2))},
    }
    for words, spoilt in cases.items():
        folder = write_hf(tmp_path / words[:4], facts | {"mask_token_id": 319}, spoilt)
        with pytest.raises(ConversionError, match=words):
            families.open_source(folder)


# ---------------------------------------------------------------- rotary embedding


PLAIN = "supported is rope_type 'default' alone"
NESTED = {"rope_type": "default", "rope_theta": 12345.0}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_transformers_5_nests_the_rotary_embedding(tmp_path: Path, key: str):
    facts = hf_config("dream") | {key: NESTED}
    source = write_hf(
        tmp_path / "hf", {k: v for k, v in facts.items() if k != "rope_theta"}, qwen2_tensors()
    )
    assert families.open_source(source).config.rope_theta == 12345.0
    old = {"type": "default", "rope_theta": 12345, "partial_rotary_factor": 1.0}
    config_with(**{key: old, "rope_theta": 12345.0})(source)
    assert families.open_source(source).config.rope_theta == 12345.0
    as_on_the_hub(tmp_path / "sparse", "llada2_moe", rope_theta=..., partial_rotary_factor=...)
    config_with(**{key: NESTED | {"partial_rotary_factor": 0.5}, "mask_token_id": 1})(
        tmp_path / "sparse"
    )
    config = families.open_source(tmp_path / "sparse").config
    assert (config.rope_theta, config.rotary_dim) == (12345.0, 8)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rope_parameters": NESTED | {"rope_type": "yarn"}}, "rope_parameters=.*'yarn'.*" + PLAIN),
        ({"rope_parameters": NESTED | {"factor": 4.0}}, "rope_parameters=.*factor.*" + PLAIN),
        ({"rope_parameters": {"full_attention": NESTED}}, "full_attention.*" + PLAIN),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling=.*linear.*" + PLAIN),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn'; supported"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": ...}, "no rope_theta; add"),
        ({"rope_parameters": NESTED}, "rope_theta=1000000.0, but rope_theta=12345.0 in rope_para"),
        (
            {"rope_parameters": NESTED | {"partial_rotary_factor": 0.5}, "rope_theta": ...},
            "partial_rotary_factor=0.5, whose meaning is not known",
        ),
    ],
)
def test_other_rotary_embeddings_are_refused(tmp_path: Path, changes: dict[str, Any], words: str):
    source = write_hf(tmp_path / "hf", hf_config("dream"), qwen2_tensors())
    config_with(**changes)(source)
    with pytest.raises(ConversionError, match=words):
        families.open_source(source)


def test_an_allowed_rotary_embedding_still_gives_its_theta(tmp_path: Path):
    source = write_hf(tmp_path / "hf", hf_config("dream"), qwen2_tensors())
    config_with(rope_theta=..., rope_parameters=NESTED | {"rope_type": "yarn"})(source)
    opened = families.open_source(source, allow_unknown=["rope_parameters"])
    assert opened.config.rope_theta == 12345.0


# ---------------------------------------------------------------- ends of a text


def test_diffucoder_ends_at_its_padding(tmp_path: Path):
    source = write_hf(tmp_path / "hf", hf_config("dream"), qwen2_tensors())
    tokenizer(source, {}, **{"<|im_end|>": 27, "<|dlm_pad|>": 26})
    assert families.open_source(source).config.stop_ids == (26, 29, 27)
    stops = NAMED["diffucoder-7b"].stop_ids
    assert stops == (151667, *NAMED["dream-7b"].stop_ids)


@pytest.mark.parametrize(
    "own, more, eos, stops",
    [
        (29, [27, 29, 25], 29, (25, 29, 27)),
        (29, 24, 29, (24, 29, 27)),
        ([29, 23], None, 29, (23, 29, 27)),
        ([29, 27], [29, 27], 29, (29, 27)),
        (..., [22, 21], 22, (21, 22, 27)),
        (None, 22, 22, (22, 27)),
    ],
)
def test_every_end_of_a_text_is_read(
    tmp_path: Path, own: Any, more: Any, eos: int, stops: tuple[int, ...]
):
    """The last one is the end of a turn, which fine-tuning writes behind an answer."""
    source = write_hf(tmp_path / "hf", hf_config("dream"), qwen2_tensors())
    config_with(eos_token_id=own)(source)
    tokenizer(source, {}, **{"<|im_end|>": 27})
    generation(source, more)
    config = families.open_source(source).config
    assert (config.eos_id, config.stop_ids) == (eos, stops)


@pytest.mark.parametrize("text", ["[1]", "{", '{"eos_token_id": "29"}', '{"eos_token_id": [-1]}'])
def test_a_broken_generation_config_is_named(tmp_path: Path, text: str):
    source = write_hf(tmp_path / "hf", hf_config("dream"), qwen2_tensors())
    (source / "generation_config.json").write_text(text)
    with pytest.raises(ConversionError, match=r"generation_config\.json (is|must|gives)"):
        families.open_source(source)


# ---------------------------------------------------------------- keys that are allowed

KEYS = {"flavour": 1, "colour": 2}


@pytest.mark.parametrize("keys", [("flavour", "colour"), "flavour colour"])
def test_allowed_keys_are_allowed_wherever_the_advice_is_printed(tmp_path: Path, keys: Any):
    source = write_hf(tmp_path / "hf", hf_config("dream") | KEYS, qwen2_tensors())
    mesh = sharding.parse_mesh("1x1")
    doors: dict[str, Callable[..., Any]] = {
        "convert": lambda **allow: families.open_source(source, **allow).config,
        "plan": lambda **allow: describe_model(str(source), **allow),
        "facts": lambda **allow: load.read_facts(str(source), **allow),
        "weights": lambda **allow: load.load_model(str(source), mesh, **allow).config,
        "LLM.load": lambda **allow: LLM.load(str(source), mesh, **allow).config,
        "verifier": lambda **allow: LLM.load("random:tiny", mesh, verifier=str(source), **allow),
    }
    for name, door in doors.items():
        with pytest.raises(ConversionError, match="--allow_unknown flavour colour"):
            door()
        assert door(allow_unknown=keys), name


def test_a_download_with_allowed_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Hugging Face id is opened before it is loaded, and the mesh is chosen before that."""
    source = write_hf(tmp_path / "hf", hf_config("dream") | KEYS, qwen2_tensors())
    monkeypatch.setenv("JDLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(load, "fetch", lambda model: source)
    with pytest.raises(ConversionError, match="flavour"):
        load.locate("owner/name")
    assert load.locate("owner/name", tuple(KEYS)) == source
    mesh = load.choose_mesh("auto", "owner/name", "bfloat16", tuple(KEYS), memory=10**9)
    assert mesh.shape["data"] == jax.device_count()


def test_commands_hand_allowed_keys_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen: list[Any] = []

    def stop(cls: type, *given: Any, **options: Any) -> None:
        names = inspect.signature(whole).parameters
        seen.append((dict(zip(names, given, strict=False)) | options)["allow_unknown"])
        raise InterruptedError

    whole, work = LLM.load, tmp_path / "finished.jsonl"
    monkeypatch.setattr(LLM, "load", classmethod(stop))
    allow: Any = {"model": "owner/name", "allow_unknown": ("flavour",)}
    runs: dict[str, Callable[[], object]] = {
        "eval": lambda: evaluation.evaluate(EvalConfig(**allow)),
        "generate": lambda: complete(GenerateConfig(prompt="x", **allow)),
        "bench": lambda: bench.main(bench.BenchConfig(**allow)),
        "grid": lambda: grid.main(grid.GridConfig(**allow)),
        "harness": lambda: harness.JdllmLM(**allow),
        "sweep": lambda: list(sweeps.perform(sweeps.SweepConfig(**allow).runs(), Journal(work))),
    }
    for name, run in runs.items():
        with pytest.raises(InterruptedError):
            run()
        assert seen.pop() == ("flavour",), name


COMMANDS = [EvalConfig, GenerateConfig, bench.BenchConfig, grid.GridConfig]
COMMANDS += [sweeps.SweepConfig, tuning.TuneConfig, SFTConfig, ConvertConfig, PlanConfig]


@pytest.mark.parametrize("config", COMMANDS, ids=lambda config: config.__name__)
def test_every_command_that_loads_a_model_takes_allowed_keys(config: type):
    needed = {
        "GenerateConfig": ["prompt=x"], "SFTConfig": ["output=x", "task=sudoku"],
        "ConvertConfig": ["source=x"], "PlanConfig": ["model=x"],
    }  # fmt: skip
    words = needed.get(config.__name__, [])
    parsed: Any = cli.parse(config, [*words, "allow_unknown=flavour"], "x")
    assert parsed.allow_unknown == ("flavour",)
    parsed = cli.parse(config, [*words, "--allow_unknown", "flavour", "colour"], "x")
    assert parsed.allow_unknown == ("flavour", "colour")
    if config is sweeps.SweepConfig or config is tuning.TuneConfig:
        assert {run.allow_unknown for run in parsed.runs()} == {("flavour", "colour")}
