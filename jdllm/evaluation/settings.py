"""Settings: what they came to; short names, the model asked and the JSON file of decoding."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jdllm.decode import DecodeConfig
from jdllm.runtime.fields import leaves, replaced
from jdllm.runtime.files import write_json


def placed(llm: Any) -> dict[str, Any]:
    """What mesh= and dtype= came to when a model was loaded."""
    mesh = f"{llm.mesh.shape['data']}x{llm.mesh.shape['model']}"
    return {"mesh": mesh, "dtype": llm.config.dtype}


def longest(loaded: dict[str, dict[str, Any]]) -> int:
    """The most columns that one of the tasks asks for, in whole blocks of 32."""
    tasks = [task for tasks in loaded.values() for task in tasks["tasks"].values()]
    asked = [(task.config.generation_kwargs or {}).get("max_gen_toks") or 128 for task in tasks]
    return -(-max(asked) // 32) * 32


def changed(config: Any) -> dict[str, Any]:
    """The settings of a dataclass that are not the defaults, by dotted names."""
    default = leaves(type(config)())
    return {name: value for name, value in leaves(config).items() if value != default[name]}


def label(config: DecodeConfig) -> str:
    """A short name for settings, as one would type them: the rule, cache, block, what is changed.

    gen_length is left out, which settings that are compared have in common.
    """
    number = {"threshold": "threshold", "factor": "factor", "quota": "steps"}.get(config.rule)
    shown = {"rule": config.rule} if config.rule != "threshold" else {}
    shown |= {number: getattr(config, number)} if number else {}
    shown |= {"cache": config.cache, "block_length": config.block_length}
    shown = {name: value for name, value in shown.items() if value is not None}
    more = {name: v for name, v in changed(config).items() if name not in {*shown, "gen_length"}}
    return " ".join(f"{name}={value}" for name, value in (shown | more).items())


def decode_config(facts: Any, origin: str) -> DecodeConfig:
    """DecodeConfig from JSON-like facts, nested or by dotted names.

    ValueError, behind `origin`, for names that are unknown and what makes no sense.
    """
    if not isinstance(facts, dict):
        raise ValueError(f"{origin} must be an object of decode settings, such as threshold: 0.9")
    try:
        return DecodeConfig.of(facts)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def check_verifier(verifier: str | None, settings: Iterable[DecodeConfig]) -> None:
    """ValueError unless a verifier and a setting that asks it come together."""
    asks = any(one.rule == "verify" for one in settings)
    if asks and not verifier:
        raise ValueError("rule=verify asks a causal model: name it, verifier=FOLDER")
    if verifier and not asks:
        raise ValueError(
            f"verifier={verifier} is asked by decode.rule=verify alone (decode.preset=apd has it); "
            "leave it out, or set the rule"
        )


def read_decode(path: Path, over: DecodeConfig | None = None) -> DecodeConfig:
    """Settings from a file, changed by those of `over` that are not the defaults.

    ValueError where the file is missing, is no JSON, or has unknown names.
    """
    try:
        facts = json.loads(path.read_text())
    except OSError:
        raise ValueError(f"decode_file={path} cannot be read") from None
    except ValueError as error:
        raise ValueError(f"decode_file={path} is not JSON: {error}") from None
    base = decode_config(facts, f"decode_file={path}")
    return replaced(base, changed(over or DecodeConfig()))


def write_decode(path: Path, config: DecodeConfig) -> None:
    """Writes every setting, so that later defaults change nothing."""
    write_json(path, dataclasses.asdict(config))
