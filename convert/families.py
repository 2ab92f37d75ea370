"""The table of families, and how a Hugging Face folder is recognised as one of them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdllm.configs import ModelConfig
from jdllm.convert import llada
from jdllm.convert.shards import Shards
from jdllm.convert.table import ANY, ConversionError, Family, check, stream

FAMILIES: dict[str, Family] = {"llada": llada.FAMILY}


@dataclasses.dataclass(frozen=True)
class Source:
    """A Hugging Face folder that was checked and can be streamed."""

    family: str
    config: ModelConfig
    shards: Shards

    def units(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Our parameters in the config's dtype, one unit at a time."""
        return stream(FAMILIES[self.family], self.config, self.shards, self.config.dtype)


def recognise(hf: dict[str, Any], folder: Path) -> str:
    """The family that the `architectures` key of a config.json names."""
    names = hf.get("architectures") or ["(none)"]
    for family, entry in FAMILIES.items():
        if entry.architecture in names:
            return family
    supported = ", ".join(f"{e.architecture} ({name})" for name, e in FAMILIES.items())
    raise ConversionError(
        f"{folder} is of architecture {', '.join(names)}, which is not supported; "
        f"supported are {supported}"
    )


def check_keys(family: Family, hf: dict[str, Any], allow_unknown: Sequence[str] = ()) -> None:
    """Refuses any key of config.json that is neither used nor known to change nothing."""
    for key, value in hf.items():
        if key in family.used or key in allow_unknown:
            continue
        if key not in family.inert:
            raise ConversionError(
                f"config.json has the key {key}={value!r}, whose meaning is not known here; if "
                f"it changes nothing, pass allow_unknown={key}"
            )
        allowed = family.inert[key]
        if allowed is not ANY and value not in allowed:
            raise ConversionError(
                f"config.json has {key}={value!r}; supported is "
                f"{' or '.join(repr(v) for v in allowed)}"
            )


def special_tokens(folder: Path) -> dict[str, int]:
    """Ids of the added tokens in tokenizer.json, by text; empty without that file."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    return {token["content"]: token["id"] for token in added}


def open_source(
    folder: Path,
    family: str | None = None,
    dtype: str | None = None,
    allow_unknown: Sequence[str] = (),
) -> Source:
    """Checks a Hugging Face folder completely, from its headers, and returns it ready to stream.

    `family` insists on one; `dtype` defaults to the one most weights are stored in. Raises
    ConversionError or ShardError, in one sentence, for anything that would load wrongly.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ConversionError(f"{folder} has no config.json: it is not a Hugging Face model")
    try:
        hf = json.loads(path.read_text())
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from None
    found = recognise(hf, folder)
    if family not in (None, found):
        raise ConversionError(f"{folder} holds a model of the family {found}, not {family}")
    entry = FAMILIES[found]
    check_keys(entry, hf, allow_unknown)
    try:
        config = entry.facts(hf, special_tokens(folder))
    except KeyError as error:
        raise ConversionError(f"{path} lacks the key {error}") from None
    shards = Shards(folder)
    check(entry, config, shards)
    return Source(found, dataclasses.replace(config, dtype=dtype or shards.dtype), shards)
