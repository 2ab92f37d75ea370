"""Adapters that PEFT wrote: read, replayed, merged, written again; and what is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (names bfloat16 for numpy)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdllm import LLM, DecodeConfig
from jdllm.arguments import ModelArgs
from jdllm.convert import adapters, commands
from jdllm.convert.families import FAMILIES
from jdllm.convert.shards import Shards
from jdllm.convert.table import restore_sources
from jdllm.load import load_model
from jdllm.model import linear, lora
from jdllm.model.lora import Adapter, Factors
from jdllm.model.mask import Mask
from jdllm.model.model import Model, named
from jdllm.model.weights import dense
from jdllm.runtime import sharding
from tests.support.recordings import load, with_mask

GOLDENS = Path(__file__).parents[1] / "goldens"
# Recorded adapters, and what they adapt.
CASES = {
    "llada_qkv": "llada",
    "llada_all": "llada",
    "llada_gqa_attn": "llada_gqa",
    "dream_all": "dream",
    "llada2_moe_attn_mlp": "llada2_moe",
    "llada_moe_attn": "llada_moe",
}
ATOL = 5e-4


@jax.jit
def logits_of(model: Model, tokens_BT: jax.Array, mask: Mask) -> jax.Array:
    columns_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return model.logits(model(model.embed(tokens_BT), columns_BT, mask).hidden)


def one_device() -> jax.sharding.Mesh:
    return sharding.parse_mesh("1x1")


def adapted(case: str) -> Model:
    model = load(GOLDENS / CASES[case])
    factors = adapters.read_factors(GOLDENS / "peft" / case, model.config)
    placed = adapters.place(factors, model.config, one_device())
    return dataclasses.replace(model, adapter=Adapter(placed))


def recorded(case: str) -> dict[str, Any]:
    with np.load(GOLDENS / "peft" / case / "logits.npz") as stored:
        return dict(stored)


def mask_of(model: Model, stored: dict[str, Any]) -> Mask:
    config = dataclasses.replace(
        model.config, block_causal=int(stored.get("block_length", 0)) or None
    )
    return Mask.of(config, jnp.ones(stored["tokens"].shape, bool))


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_the_recorded_logits(case):
    model, stored = adapted(case), recorded(case)
    got = logits_of(model, stored["tokens"], mask_of(model, stored))
    np.testing.assert_allclose(got, stored["adapted_logits"], atol=ATOL)


def merged_tensors(model: Model, factors: dict[str, Factors]) -> dict[str, np.ndarray]:
    """Hugging Face's tensors, with the factors added to the weights."""
    whole = dataclasses.replace(model, params=lora.joined(model.params, Adapter(factors)))
    arrays = {name: np.asarray(dense(leaf)) for name, leaf in named(whole).items()}
    return restore_sources(FAMILIES[model.config.family], model.config, arrays)


@pytest.mark.parametrize("case", ["llada_all", "dream_all", "llada2_moe_attn_mlp"])
def test_merged_weights_are_those_of_peft(case):
    model, stored = adapted(case), recorded(case)
    assert model.adapter
    tensors = merged_tensors(model, model.adapter.factors)
    merged = {k.removeprefix("merged__"): v for k, v in stored.items() if k.startswith("merged__")}
    assert len(merged) == 2
    for name, value in merged.items():
        np.testing.assert_allclose(tensors[name], value, atol=1e-6)


# Writing, and reading back


def written(folder: Path, model: Model, factors: dict[str, Factors], **settings: Any) -> Path:
    folder.mkdir()
    scaling = adapters.Scaling(**settings) if settings else None
    adapters.write_adapter(folder, model.config, factors, "base/name", scaling)
    return folder


def random_factors(model: Model, targets: str, ranks: tuple[int, ...] = (4,), scale: float = 2.0):
    """By module, ranks in turn; A and B normal."""
    own = linear.modules(named(model))
    rng, found = np.random.default_rng(0), dict[str, Any]()
    for i, name in enumerate(lora.find(own, targets)):
        shape = lora.shapes(own[name], ranks[i % len(ranks)])
        a, b = (rng.normal(size=shape[side][0]).astype(np.float32) for side in "ab")
        found[name] = Factors(a, b, scale)  # pyright: ignore[reportArgumentType]
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_peft_wrote_is_written_again_bit_for_bit(case, tmp_path):
    model, source = load(GOLDENS / CASES[case]), GOLDENS / "peft" / case
    theirs = json.loads((source / adapters.CONFIG).read_text())
    settings = {"rank": theirs["r"], "alpha": theirs["lora_alpha"],
                "rslora": theirs["use_rslora"], "dropout": theirs["lora_dropout"]}  # fmt: skip
    factors = adapters.read_factors(source, model.config)
    folder = written(tmp_path / "out", model, factors, **settings)
    a, b = (load_file(path / adapters.WEIGHTS) for path in (source, folder))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    ours = json.loads((folder / adapters.CONFIG).read_text())
    for key in ("r", "lora_alpha", "use_rslora", "lora_dropout", "peft_type", "bias"):
        assert ours[key] == theirs[key], key
    assert ours["rank_pattern"] == ours["alpha_pattern"] == {} and ours["task_type"] is None
    assert list(ours) == sorted(ours) and set(ours) <= set(theirs)
    paths = {re.fullmatch(r"base_model\.model\.(.*)\.lora_A\.weight", k) for k in a} - {None}
    every = {path.removesuffix(".weight") for path in Shards(GOLDENS / CASES[case]).shapes}
    wanted = {match[1] for match in paths if match}
    assert {path for path in every if re.fullmatch(ours["target_modules"], path)} == wanted


def same_function(model: Model, first: dict[str, Factors], second: dict[str, Factors]) -> None:
    """Both change the weights alike."""
    tokens = np.arange(12, dtype=np.int32)[None]
    mask = Mask.of(model.config, jnp.ones(tokens.shape, bool))

    def logits(factors: dict[str, Factors]) -> jax.Array:
        placed = adapters.place(factors, model.config, one_device())
        return logits_of(dataclasses.replace(model, adapter=Adapter(placed)), tokens, mask)

    wanted = logits(first)
    assert np.abs(wanted - logits({})).max() > 1
    np.testing.assert_allclose(logits(second), wanted, atol=2e-3)


def test_three_As_of_a_fused_module_are_written_as_one(tmp_path):
    """LLaDA2's query_key_value: rank 3 r, block-diagonal B; the other modules keep their rank."""
    model = load(GOLDENS / "llada2_moe")
    factors = random_factors(model, "q,k,v,out,down", ranks=(2, 3, 4, 3, 3))
    folder = written(tmp_path / "out", model, factors, rank=3, alpha=6)
    fused = "model.layers.0.attention.query_key_value"
    tensors = load_file(folder / adapters.WEIGHTS)
    assert tensors[f"base_model.model.{fused}.lora_A.weight"].shape == (9, 64)
    assert tensors[f"base_model.model.{fused}.lora_B.weight"].shape == (128, 9)
    facts = json.loads((folder / adapters.CONFIG).read_text())
    assert facts["rank_pattern"][fused] == 9 and facts["alpha_pattern"][fused] == 18
    assert "model.layers.0.mlp.down_proj" not in facts["rank_pattern"]
    same_function(model, factors, adapters.read_factors(folder, model.config))


def test_experts_are_modules_of_their_own(tmp_path):
    model = load(GOLDENS / "llada_moe")
    factors = random_factors(model, "q,experts,router")
    folder = written(tmp_path / "out", model, factors)
    assert "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_A.weight" in load_file(
        folder / adapters.WEIGHTS
    )
    back = adapters.read_factors(folder, model.config)
    for name, part in factors.items():
        np.testing.assert_array_equal(back[name].a, part.a)
        np.testing.assert_array_equal(back[name].b, part.b)
    facts = json.loads((folder / adapters.CONFIG).read_text())
    assert facts["lora_alpha"] == 8 and facts["alpha_pattern"] == {}


def test_a_single_layer_is_a_pattern_too(tmp_path):
    model = load(GOLDENS / "llada")
    folder = written(tmp_path / "out", model, random_factors(model, "layers.2.attention.q,down"))
    pattern = json.loads((folder / adapters.CONFIG).read_text())["target_modules"]
    assert re.fullmatch(pattern, "model.transformer.blocks.2.q_proj")
    assert not re.fullmatch(pattern, "model.transformer.blocks.1.q_proj")
    assert not re.fullmatch(pattern, "model.transformer.ff_out")


# What is refused


def spoiled(tmp_path: Path, **facts: Any) -> Path:
    """A copy of an adapter with other settings."""
    folder = Path(shutil.copytree(GOLDENS / "peft" / "llada_qkv", tmp_path / "spoiled"))
    path = folder / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return folder


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"use_dora": True}, "use_dora=True, which is not supported"),
        ({"modules_to_save": ["ff_out"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path, facts, words):
    config = load(GOLDENS / "llada").config
    with pytest.raises(ValueError, match=words):
        adapters.read_factors(spoiled(tmp_path, **facts), config)


def test_an_adapter_of_another_base_is_refused():
    source = GOLDENS / "peft"
    llada, grouped = (load(GOLDENS / name).config for name in ("llada", "llada_gqa"))
    with pytest.raises(ValueError, match="made for dream.* has no module model.layers.0"):
        adapters.read_factors(source / "dream_all", llada)
    with pytest.raises(ValueError, match=r"lora_B of .*k_proj has shape \(64, 4\), not \(32, 4\)"):
        adapters.read_factors(source / "llada_qkv", grouped)


def test_a_folder_without_a_whole_adapter_is_refused(tmp_path):
    config = load(GOLDENS / "llada").config
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        adapters.read_factors(tmp_path, config)
    folder = spoiled(tmp_path)
    (tmp_path / "adapter").symlink_to(folder)
    with pytest.raises(ValueError, match=f"this run's adapter is {tmp_path / 'adapter'}"):
        adapters.read_factors(tmp_path, config)
    tensors = load_file(folder / adapters.WEIGHTS)
    for wrong, words in (
        ({k: v for k, v in tensors.items() if "1.q_proj.lora_B" not in k}, "only one factor of"),
        (tensors | {"base_model.model.lm_head.weight": np.ones(2)}, "no factor of LoRA"),
        ({}, "holds no factors"),
    ):
        save_file(wrong, folder / adapters.WEIGHTS)
        with pytest.raises(ValueError, match=words):
            adapters.read_factors(folder, config)
    (folder / adapters.WEIGHTS).write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        adapters.read_factors(folder, config)
    (folder / adapters.CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="describes no LoRA adapter"):
        adapters.read_factors(folder, config)


def test_bfloat16_adapters_are_widened(tmp_path):
    """EDIT and d1 train adapters in bfloat16."""
    config, folder = load(GOLDENS / "llada").config, spoiled(tmp_path)
    tensors = load_file(folder / adapters.WEIGHTS)
    save_file({k: v.astype("bfloat16") for k, v in tensors.items()}, folder / adapters.WEIGHTS)
    found = adapters.read_factors(folder, config)["layers.0.attention.q"]
    key = "base_model.model.model.transformer.blocks.0.q_proj.lora_A.weight"
    np.testing.assert_array_equal(found.a, tensors[key].T.astype("bfloat16").astype(np.float32))


# adapter= and merge


@pytest.mark.parametrize(
    "case", ["llada_all", pytest.param("llada2_moe_attn_mlp", marks=pytest.mark.slow)]
)
def test_adapter_and_merged_model_are_one_function(case, tmp_path):
    """merge takes a Hugging Face folder and a converted one alike; load_model the adapter."""
    base, folder = with_mask(GOLDENS / CASES[case], tmp_path), GOLDENS / "peft" / case
    commands.main([CASES[case].removesuffix("_moe"), f"source={base}", f"output={tmp_path / 'b'}"])
    for source, output in ((base, "first"), (tmp_path / "b", "second")):
        words = [f"source={source}", f"adapter={folder}", f"output={tmp_path / output}"]
        commands.main(["merge", *words])
    two = [
        load_model(str(tmp_path / name), one_device(), "float32") for name in ("first", "second")
    ]
    for a, b in zip(*(named(model).values() for model in two), strict=True):
        np.testing.assert_array_equal(a[...], b[...])
    model, stored = adapted(case), recorded(case)
    got = logits_of(two[0], stored["tokens"], mask_of(model, stored))
    np.testing.assert_allclose(got, stored["adapted_logits"], atol=ATOL)


def test_adapter_reaches_the_library_and_its_fingerprint(tmp_path):
    """Results with an adapter are never taken for results without one."""
    base, folder = str(GOLDENS / "llada"), GOLDENS / "peft" / "llada_all"
    plain, llm = LLM.load(base, "1x1"), LLM.load(base, "1x1", adapter=folder)
    assert llm.model.adapter and len(llm.model.adapter.factors) == 21
    assert llm.fingerprint() != plain.fingerprint()
    (found,) = llm.generate([[5, 6, 7]], DecodeConfig(gen_length=8, block_length=8, cache="none"))
    assert found.nfe > 0 and len(found.ids) > 0
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        ModelArgs(model="random:tiny", adapter=tmp_path).load_llm()
    with pytest.raises(ValueError, match="does not fit this llada model"):
        LLM.load("random:tiny", "1x1", adapter=GOLDENS / "peft" / "dream_all")


def test_merge_refuses_what_does_not_fit(tmp_path, capsys):
    words = ["source=bundled", f"adapter={GOLDENS / 'peft' / 'llada_all'}"]
    with pytest.raises(SystemExit) as ended:
        commands.main(["merge", *words, f"output={tmp_path / 'out'}"])
    assert ended.value.code == 1 and "has shape" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
