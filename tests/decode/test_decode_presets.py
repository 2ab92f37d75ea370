"""Presets: every one parses, resolves and decodes; what is given explicitly wins."""

import dataclasses

import pytest

from jdllm import LLM
from jdllm.decode import DecodeConfig
from jdllm.decode.presets import PRESETS, preset_settings
from jdllm.evaluation.harness import read_settings
from jdllm.generation import GenerateConfig
from jdllm.runtime import cli
from tests.support.marks import quick

# Some of every kind; the others differ from these in numbers, or are decoded elsewhere.
DECODED = [
    "llada-1.5-gsm8k", "fast-dllm-factor", "dinfer-hierarchy", "dinfer-vicinity",
    "dinfer-itersmooth", "llada2", "dream", "blockinfer-entropy", "d3llm",
]  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_command_line_and_python_read_a_preset_alike(name: str):
    words = ["prompt=x", f"decode.preset={name}"]
    if PRESETS[name].get("rule") == "verify":
        words.append("verifier=FOLDER")
    parsed = cli.parse(GenerateConfig, words, "prog").decode
    assert parsed == DecodeConfig.named(name) == DecodeConfig.of(PRESETS[name])
    assert parsed == read_settings({"decode.preset": name}, {"decode": DecodeConfig()})["decode"]
    assert parsed.parity == "none" and parsed.stop == "eos"
    assert dataclasses.asdict(parsed.resolve())["gen_length"]


def test_what_is_given_wins_over_the_preset():
    line = ["prompt=x", "decode.rule=threshold", "decode.preset=llada", "decode.parity=llada"]
    parsed = cli.parse(GenerateConfig, line, "prog").decode
    assert (parsed.rule, parsed.parity, parsed.cache) == ("threshold", "llada", "none")
    assert DecodeConfig.named("llada", rule="threshold", parity="llada") == parsed
    words = {"decode.preset": "llada", "decode.rule": "threshold"}
    assert read_settings(words, {"decode": DecodeConfig(parity="llada")}) == {"decode": parsed}


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"preset=dinfer-credits is unknown; did you mean dinfer-"):
        DecodeConfig.named("dinfer-credits")
    with pytest.raises(ValueError, match="there are llada, llada-official"):
        preset_settings("zzz")


@pytest.fixture(scope="module")
def tiny() -> LLM:
    return LLM.load("random:tiny", "1x1")


@pytest.mark.parametrize("name", quick(DECODED, "dinfer-hierarchy", "llada2", "dream", "d3llm"))
def test_a_preset_decodes(name: str, tiny: LLM):
    """On a small canvas every column gets a token, in a bounded number of calls."""
    block = min(PRESETS[name]["block_length"], 8)
    options = DecodeConfig.named(name, gen_length=16, block_length=block, stop="none")
    (found,) = tiny.generate([[5, 6, 7, 8, 9]], options)
    assert tiny.config.mask_id not in found.ids
    assert len(found.ids) == 16 or found.finish_reason == "stop"
    passes = options.edit.passes * 3 if options.edit.on else 0
    assert 1 <= found.nfe <= 2 * 16 + 4 + passes
