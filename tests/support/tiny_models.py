"""Tiny models with random weights, sharpened so that positions and confidences differ."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdllm import DecodeConfig
from jdllm.decode import Setup, decode
from jdllm.decode.aims import aimed
from jdllm.llm import LLM
from jdllm.load import BUNDLED
from jdllm.model.config import NAMED, ModelConfig
from jdllm.model.linear import modules
from jdllm.model.lora import Adapter, Factors
from jdllm.model.model import assemble, named
from jdllm.parity import make_setup
from jdllm.runtime import sharding
from jdllm.store.checkpoint import random_model, save_model
from jdllm.tokenizer import copy_tokenizer
from tests.support.plain_model import PlainModel

TINY = dataclasses.replace(
    NAMED["tiny"],
    layers=1, embed=32, heads=2, kv_heads=1, mlp=32, vocab=64, max_length=128,
    mask_id=61, eos_id=60, pad_id=60, stop_ids=(60, 59),
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shifted": {"shift_logits": True},
    "blocks": {"block_causal": 4},
    "judge": {"causal": True},
}


def write_small(folder: Path, width: int, **facts: Any) -> Path:
    """Returns `folder` as a converted one: random weights, the bundled tokenizer and lengths."""
    config = dataclasses.replace(
        NAMED["bundled"], layers=1, embed=width, heads=2, kv_heads=2, head_dim=width // 2,
        mlp=width, dtype="float32", **facts,
    )  # fmt: skip
    save_model(folder, random_model(config, sharding.parse_mesh("1x1"), seed=3))
    copy_tokenizer(BUNDLED, folder)
    return folder


@functools.cache
def weights(end_bias: float = 1.0, mask_bias: float = 1.0) -> dict[str, np.ndarray]:
    """Returns random weights by name; ends and [MASK] may be made likely."""
    model = random_model(TINY, sharding.parse_mesh("1x1"), seed=3)
    arrays = {name: np.array(leaf[...]) for name, leaf in named(model).items()}
    sharper = {"attention.q": 12, "attention.out": 4, "head": 3}
    for name in arrays:
        arrays[name] *= next((by for end, by in sharper.items() if name.endswith(end)), 1)
    arrays["head"][:, list(TINY.stop_ids)] *= end_bias
    arrays["head"][:, TINY.mask_id] *= mask_bias
    return arrays


@functools.cache
def tiny(kind: str = "plain", end_bias: float = 1.0, mask_bias: float = 1.0) -> LLM:
    facts = dataclasses.replace(TINY, **KINDS[kind])
    arrays = {name: jnp.array(x) for name, x in weights(end_bias, mask_bias).items()}
    return LLM(assemble(facts, arrays, sharding.parse_mesh("1x1")))


def plain(llm: LLM) -> PlainModel:
    """Returns the same model in numpy."""
    arrays = {name: np.array(x[...], np.float64) for name, x in named(llm.model).items()}
    own = llm.model.adapter.factors if llm.model.adapter else {}
    factors = {
        name: (np.array(f.a, np.float64), np.array(f.b, np.float64), f.scale)
        for name, f in own.items()
    }
    return PlainModel(llm.config, arrays, factors)


@functools.cache
def adapted(kind: str = "plain", end_bias: float = 1.0) -> LLM:
    """Returns the model with random factors for q, k and v, large enough to matter."""
    llm, rng = tiny(kind, end_bias), np.random.default_rng(5)
    own = modules(named(llm.model))
    names = [name for name in own if name.split(".")[-1] in "qkv"]

    def draw(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32)

    factors = {n: Factors(draw(*own[n].inputs, 4), draw(4, *own[n].outputs), 2.0) for n in names}
    return LLM(dataclasses.replace(llm.model, adapter=Adapter(factors)))


def random_prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TINY.stop_ids[-1], n).tolist() for n in lengths]


PROGRAMS: dict[tuple[ModelConfig, Setup, tuple[int, ...]], Any] = {}
"""Compiled loops: weights are arguments of theirs."""


def canvases(llm: LLM, config: DecodeConfig, prompts: list[list[int]], verifier: LLM | None = None):
    """Returns what the loop returns: whole canvases, NFE per row, and forwards."""
    config = llm.resolve(config)
    setup = make_setup(config, llm.config)
    request = llm._request(prompts, [0] * len(prompts), config, setup)
    setup = aimed(setup, llm.maps.aims(config.exit))
    key = (llm.config, setup, request.tokens.shape)
    judge = {"verifier": verifier.model} if verifier else {}
    if key not in PROGRAMS:
        quick = {"xla_backend_optimization_level": 0}  # compiles in half the time
        lowered = decode.lower(llm.model, request, setup, **judge)
        PROGRAMS[key] = lowered.compile(compiler_options=quick)
    state = PROGRAMS[key](llm.model, request, **judge)
    rows = [
        row[: setup.canvas_length(len(p))].tolist()
        for row, p in zip(np.asarray(state.rows.tokens), prompts, strict=True)
    ]
    return rows, state.rows.nfe.tolist(), int(state.forwards)
