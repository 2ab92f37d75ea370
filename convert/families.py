"""The table of families, and how a Hugging Face folder is recognised as one of them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jdllm.checkpoint import LazyArray
from jdllm.configs import ModelConfig
from jdllm.convert import dream, llada, llada2, llada_moe, qwen2
from jdllm.convert.shards import DTYPES, Shards
from jdllm.convert.table import ANY, ConversionError, Family, check, kept, stream
from jdllm.tokenizer import added_tokens

FAMILIES: dict[str, Family] = {
    "llada": llada.FAMILY,
    "llada_moe": llada_moe.FAMILY,
    "llada2": llada2.FAMILY,
    "dream": dream.FAMILY,
    "qwen2": qwen2.FAMILY,
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A Hugging Face folder that was checked and can be streamed."""

    family: str
    config: ModelConfig
    shards: Shards

    def units(self) -> Iterator[tuple[str, dict[str, LazyArray]]]:
        """Our parameters in the config's dtype, one unit at a time."""
        return stream(FAMILIES[self.family], self.config, self.shards)


def recognise(hf: dict[str, Any], folder: Path) -> str:
    """The family that the `architectures` key of a config.json names."""
    names = hf.get("architectures")
    if not isinstance(names, list) or not names:
        names = ["(none)"]
    for family, entry in FAMILIES.items():
        if entry.architecture in names:
            return family
    supported = ", ".join(f"{e.architecture} ({name})" for name, e in FAMILIES.items())
    raise ConversionError(
        f"{folder} is of architecture {', '.join(map(str, names))}, which is not supported; "
        f"supported are {supported}"
    )


def check_keys(family: Family, hf: dict[str, Any], allow_unknown: Sequence[str] = ()) -> None:
    """Refuses any key of config.json that is neither used nor known to change nothing."""
    if hf.get("quantization_config"):
        raise ConversionError(
            "config.json has a quantization_config: quantised checkpoints cannot be converted, use "
            "the one it was made from"
        )
    known = family.used | set(family.inert) | set(allow_unknown)
    if unknown := [key for key in hf if key not in known]:
        own = next((name for name, f in FAMILIES.items() if hf.keys() <= f.used | set(f.inert)), "")
        if own:
            raise ConversionError(
                f"config.json names the architecture {family.architecture}, but its keys are those "
                f"of the family {own}, whose architecture is {FAMILIES[own].architecture}; is it "
                "mislabelled?"
            )
        option = f"allow_unknown={unknown[0]}"
        if len(unknown) > 1:
            option = f"--allow_unknown {' '.join(unknown)}"
        raise ConversionError(
            f"config.json has {', '.join(f'{key}={hf[key]!r}' for key in unknown)}, whose meaning "
            f"is not known here; if it changes nothing, pass {option}"
        )
    for key in sorted(set(hf) & set(family.inert) - set(allow_unknown)):
        allowed = family.inert[key]
        if allowed is not ANY and hf[key] not in allowed:
            raise ConversionError(
                f"config.json has {key}={hf[key]!r}; supported is "
                f"{' or '.join(repr(value) for value in allowed)}"
            )


def special_tokens(folder: Path) -> dict[str, int]:
    """Ids of the tokenizer's added tokens, by text; empty without a tokenizer."""
    try:
        return {token["content"]: token["id"] for token in added_tokens(folder)}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConversionError(f"the tokenizer in {folder} cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _read_facts(family: Family, hf: dict[str, Any], folder: Path) -> ModelConfig:
    """The ModelConfig; ConversionError for a missing key or a value that cannot be."""
    path = folder / "config.json"
    try:
        config = family.facts(hf, special_tokens(folder))
    except KeyError as error:
        raise ConversionError(f"{path} lacks the key {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{path} describes no model of this family: {error}") from None
    for name, value in dataclasses.asdict(config).items():
        if name == "mask_id" and config.causal:
            continue  # it has none
        lowest = 0 if name.endswith("_id") else 1
        numeric = ModelConfig.__annotations__[name] is int
        if numeric and (type(value) is not int or value < lowest):
            raise ConversionError(
                f"{path} gives {name}={value!r}, which must be a whole number of {lowest} or more"
            )
    return config


def read_facts(
    folder: Path, family: str | None = None, allow_unknown: Sequence[str] = ()
) -> tuple[str, ModelConfig]:
    """Family and facts of a Hugging Face folder, of which only config.json need be there.

    `family` insists on one; the dtype is what config.json names. Raises ConversionError, in one
    sentence, where it describes nothing that is supported.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ConversionError(f"{folder} has no config.json: it is not a Hugging Face model")
    hf = _read_json(path)
    found = recognise(hf, folder)
    if family not in (None, found):
        raise ConversionError(f"{folder} holds a model of the family {found}, not {family}")
    entry = FAMILIES[found]
    check_keys(entry, hf, allow_unknown)
    config = _read_facts(entry, hf, folder)
    dtype = hf.get("dtype") or hf.get("torch_dtype")
    return found, dataclasses.replace(
        config, dtype=dtype if dtype in DTYPES.values() else config.dtype
    )


def open_source(
    folder: Path,
    family: str | None = None,
    dtype: str | None = None,
    allow_unknown: Sequence[str] = (),
) -> Source:
    """Checks a Hugging Face folder completely, from its headers, and returns it ready to stream.

    `family` insists on one; `dtype` defaults to that of the weights, which then must not lose
    precision. Raises ConversionError or ShardError, in one sentence, for anything that would load
    wrongly.
    """
    found, config = read_facts(folder, family, allow_unknown)
    entry, shards = FAMILIES[found], Shards(folder)
    check(entry, config, shards)
    apart = kept(entry, config)
    config = dataclasses.replace(config, dtype=shards.resolve_dtype(dtype, apart))
    if config.moe:
        routers = (shards.dtypes[name] for name in apart if name.endswith("gate.weight"))
        stored = next(routers, "float32")
        config = dataclasses.replace(
            config, moe=dataclasses.replace(config.moe, router_stored=stored)
        )
    return Source(found, config, shards)
