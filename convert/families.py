"""The table of families, and how a Hugging Face folder is recognised as one of them."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jdllm.convert import dream, llada, llada2, llada_moe, qwen2
from jdllm.convert.published import complete, flat_rope, read_json, special_tokens
from jdllm.convert.shards import DTYPES, Shards
from jdllm.convert.table import ANY, ConversionError, Family, check, kept, stream
from jdllm.model.config import ModelConfig
from jdllm.store.checkpoint import LazyArray

FAMILIES: dict[str, Family] = {
    "llada": llada.FAMILY,
    "llada_moe": llada_moe.FAMILY,
    "llada2": llada2.FAMILY,
    "dream": dream.FAMILY,
    "qwen2": qwen2.FAMILY,
}
# Subcommands that convert: the family of each, and the Hugging Face id that it converts by default.
COMMANDS = {name: (name, family.source) for name, family in FAMILIES.items()} | {
    "diffucoder": ("dream", "apple/DiffuCoder-7B-Instruct")
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A Hugging Face folder that was checked and can be streamed."""

    family: str
    config: ModelConfig
    shards: Shards

    def units(self) -> Iterator[tuple[str, dict[str, LazyArray]]]:
        """Returns our parameters in the config's dtype, one unit at a time."""
        return stream(FAMILIES[self.family], self.config, self.shards)


def recognise(hf: dict[str, Any], folder: Path) -> str:
    """Returns the family that the `architectures` key of a config.json names."""
    names = hf.get("architectures")
    if not isinstance(names, list) or not names:
        names = ["(none)"]
    for family, entry in FAMILIES.items():
        if set(entry.architectures) & set(names):
            return family
    supported = ", ".join(f"{', '.join(e.architectures)} ({n})" for n, e in FAMILIES.items())
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
                f"config.json names the architecture {family.architectures[0]}, but its keys are "
                f"those of the family {own}, whose architecture is "
                f"{FAMILIES[own].architectures[0]}; is it mislabelled?"
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


def _read_facts(
    family: Family, hf: dict[str, Any], folder: Path, stops: Sequence[int]
) -> ModelConfig:
    """Returns the ModelConfig. Raises ConversionError for a missing key or an impossible value.

    Of `stops`, those that the family does not know stand before its own: the last one is what ends
    a turn.
    """
    path = folder / "config.json"
    for key in sorted(family.used & hf.keys()):
        if isinstance(hf[key], str):
            raise ConversionError(f"{path} gives {key}={hf[key]!r}, which must not be text")
    try:
        config = family.facts(hf, special_tokens(folder))
        extra = [i for i in dict.fromkeys(stops) if i not in config.stop_ids]
        config = dataclasses.replace(config, stop_ids=(*extra, *config.stop_ids))
    except KeyError as error:
        raise ConversionError(f"{path} lacks the key {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{path} describes no model of this family: {error}") from None
    for name in ("mask_id", "eos_id", "pad_id"):
        if (value := getattr(config, name)) >= config.vocab:
            raise ConversionError(
                f"{path} gives {name}={value}, which must lie below the vocabulary's {config.vocab}"
            )
    return config


def read_facts(
    folder: Path, family: str | None = None, allow_unknown: Sequence[str] = ()
) -> tuple[str, ModelConfig]:
    """Returns family and facts of a Hugging Face folder, which may hold only config.json.

    `family` insists on one; the dtype is what config.json names. Raises ConversionError, in one
    sentence, where it describes nothing that is supported.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ConversionError(f"{folder} has no config.json: it is not a Hugging Face model")
    hf = read_json(path)
    found = recognise(hf, folder)
    if family not in (None, found):
        raise ConversionError(f"{folder} holds a model of the family {found}, not {family}")
    entry = FAMILIES[found]
    allowed = allow_unknown.split() if isinstance(allow_unknown, str) else allow_unknown
    hf = flat_rope(hf, allowed)
    check_keys(entry, hf, allowed)
    full, stops = complete(hf, folder)
    config = _read_facts(entry, full, folder, stops)
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
    apart = kept(entry, config, shards)
    config = dataclasses.replace(config, dtype=shards.resolve_dtype(dtype, apart))
    if config.moe:
        routers = (shards.dtypes[name] for name in apart if name.endswith("gate.weight"))
        stored = next(routers, "float32")
        config = dataclasses.replace(
            config, moe=dataclasses.replace(config.moe, router_stored=stored)
        )
    return Source(found, config, shards)
