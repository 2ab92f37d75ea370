"""EDIT's recorded runs: the tiny LoRA model that made them, as a model that the loop can call."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdllm import DecodeConfig
from jdllm.model.config import ModelConfig
from jdllm.model.head import Best, Special, best
from jdllm.model.transformer import Output
from jdllm.stop.dynamics import Aim, aim_at

FOLDER = Path(__file__).parents[1] / "goldens" / "edit"
SCENARIOS = sorted(path.stem.removeprefix("generate_") for path in FOLDER.glob("generate_*.npz"))
PREFIX = "base_model.model.model."
BLOCKS, LETTERS = 2, "qkv"


def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TinyModel:
    """Two attention blocks without norms, q, k and v each with LoRA; it hands over B's outputs."""

    weights: dict[str, jax.Array]
    config: ModelConfig = dataclasses.field(metadata={"static": True})

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        return self.weights["transformer.wte.weight"][tokens_BT]

    def __call__(
        self, x: jax.Array, positions_BT: jax.Array, mask: Any, cache: None,
        probes: Sequence[str] | None = None,
    ) -> Output:  # fmt: skip
        x, found = x + self.weights["transformer.wpe.weight"][positions_BT], {}
        for number in range(BLOCKS):
            qkv = []
            for letter in LETTERS:
                name = f"transformer.blocks.{number}.{letter}_proj"
                a, b = (self.weights[f"{name}.lora_{side}.default.weight"] for side in "AB")
                key = f"{PREFIX}{name}.lora_B.default"
                found[key] = x @ a.T @ b.T
                qkv.append(x @ self.weights[f"{name}.base_layer.weight"].T + 2.0 * found[key])
            q, k, v = qkv
            x += jax.nn.softmax(q @ k.swapaxes(1, 2) / jnp.sqrt(12.0), axis=-1) @ v
        return Output(x, None, {name: found[name] for name in probes or ()})

    def logits(self, hidden_BND: jax.Array) -> jax.Array:
        return hidden_BND @ self.weights["head.weight"].T + self.weights["head.bias"]

    def best(self, hidden_BND: jax.Array, special: Special, sampling: None = None) -> Best:
        bias = self.weights["head.bias"]
        one = jnp.ones((*hidden_BND.shape[:2], 1))
        head = jnp.concatenate([self.weights["head.weight"].T, bias[None]])
        return best(jnp.concatenate([hidden_BND, one], axis=-1), head, special)


def tiny_model(run: dict[str, np.ndarray]) -> TinyModel:
    start = f"w/{PREFIX}"
    weights = {k.removeprefix(start): jnp.asarray(v) for k, v in run.items() if k.startswith("w/")}
    weights |= {k.removeprefix("w/base_model.model."): v for k, v in weights.items() if "head" in k}
    mask_id = int(run["mask_id"])
    config = ModelConfig(
        vocab=32, embed=12, layers=BLOCKS, heads=1, kv_heads=1, head_dim=12, mlp=12,
        max_length=80, rope_theta=1e4, norm_eps=1e-5, mask_id=mask_id, eos_id=0, pad_id=0,
        stop_ids=(0,), dtype="float32",
    )  # fmt: skip
    return TinyModel(weights, config)


def settings_of(run: dict[str, np.ndarray]) -> DecodeConfig:
    """The settings that EDIT's JSON of a scenario stands for."""
    facts, gen = json.loads(str(run["config_json"])), int(run["gen_length"])
    rows, first = facts["token_schedule"], facts["first_block_length"]
    block = int(run["block_length"])
    rest = (facts["num_blocks"] or 1) - first // block
    lengths = (first, *[(gen - first) // rest] * rest) if facts["num_blocks"] else ()

    def every(name: str) -> tuple[Any, ...]:
        return tuple(row[name] for row in rows)

    return DecodeConfig.of(
        {
            "rule": "quota", "schedule": "gaussian", "gen_length": gen, "steps": int(run["steps"]),
            "block_length": None if lengths else block, "block_lengths": lengths,
            "gaussian.peak": tuple(1 / x for x in every("center")),
            "gaussian.width": tuple(1 / x for x in every("std")),
            "exit.mode": "code", "exit.threshold": every("threshold"),
            "exit.patience": every("stability_span"), "exit.required": every("required_stable"),
            "exit.polish": every("polish_steps"), "stop": "none", "parity": "edit",
            "cfg_scale": float(run["check_acts"].shape[2] - 1),
        }
    ).resolve()  # fmt: skip


def aims_of(run: dict[str, np.ndarray]) -> dict[str, Aim]:
    return {name: aim_at(jnp.asarray(run[f"map/{name}.weight"])) for name in run["modules"]}
