"""A published config.json in the one form that the tables read, whatever wrote it.

What it leaves to other files of its folder is filled in from them, and what transformers 5 nests is
laid flat.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jdllm.convert.table import ConversionError
from jdllm.tokenizer import added_tokens

ROPE = ("rope_parameters", "rope_scaling")  # transformers 5's place, and where 4 has what is more
ROTARY = ("rope_theta", "partial_rotary_factor")
PLAIN = {"rope_type": "default", "type": "default"}  # names of the rotary embedding without scaling


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises ConversionError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def optional(path: Path) -> dict[str, Any]:
    """Returns `read_json` of a file, and {} where there is no such file."""
    return read_json(path) if path.exists() else {}


def special_tokens(folder: Path) -> dict[str, int]:
    """Returns ids of the tokenizer's added tokens, by text; empty without a tokenizer."""
    try:
        return {token["content"]: token["id"] for token in added_tokens(folder)}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConversionError(f"the tokenizer in {folder} cannot be read: {error}") from None


def named_token(folder: Path, name: str) -> int | None:
    """Returns the id of the token that the tokenizer's settings call `name`, such as eos_token."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = optional(folder / file).get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            return special_tokens(folder).get(text)
    return None


def ends(value: Any, where: Path) -> list[int]:
    """Returns an `eos_token_id`, which may be one id, a list of them or null, as a list."""
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in found):
        raise ConversionError(
            f"{where} gives eos_token_id={value!r}, which must be a whole number of 0 or more, or "
            "a list of them"
        )
    return found


def flat_rope(hf: dict[str, Any], allowed: Collection[str] = ()) -> dict[str, Any]:
    """Returns `hf` with the keys of ROTARY that ROPE nests moved out, and without ROPE.

    ConversionError for another kind of rotary embedding than the plain one, unless its key is among
    `allowed`, and for a value that contradicts the one beside.
    """
    flat = {key: value for key, value in hf.items() if key not in ROPE}
    for key in ROPE:
        inner = hf.get(key)
        if inner is None:
            continue
        plain = isinstance(inner, dict) and all(
            name in ROTARY or PLAIN.get(name) == value for name, value in inner.items()
        )
        if not plain and key not in allowed:
            raise ConversionError(
                f"config.json has {key}={inner!r}; supported is rope_type 'default' alone, with "
                f"{' and '.join(ROTARY)}"
            )
        for name in ROTARY if isinstance(inner, dict) else ():
            value = inner.get(name)
            if flat.get(name) is not None and value not in (None, flat[name]):
                raise ConversionError(
                    f"config.json has {name}={flat[name]!r}, but {name}={value!r} in {key}; "
                    "remove the wrong one"
                )
            if value is not None and not (name == "partial_rotary_factor" and value == 1):
                flat[name] = value
        if key == ROPE[0] and flat.get("rope_theta") is None:
            raise ConversionError(
                f"config.json has {key}={inner!r} and names no rope_theta; add it there"
            )
    return flat


def complete(hf: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[int]]:
    """Returns `hf` with ids filled in, and every id that either config says may end a text.

    Eos is the first of config.json's, else the tokenizer's, else generation_config.json's, else the
    padding; the mask is config.json's, else the tokenizer's.
    """
    full = dict(hf)
    generation = folder / "generation_config.json"
    own = ends(hf.get("eos_token_id"), folder / "config.json")
    more = ends(optional(generation).get("eos_token_id"), generation)
    if (mask := named_token(folder, "mask_token")) is not None and hf.get("mask_token_id") is None:
        full["mask_token_id"] = mask
    fallback = [named_token(folder, "eos_token"), *more, hf.get("pad_token_id")]
    eos = next((i for i in (*own, *fallback) if i is not None), None)
    if eos is not None:
        full["eos_token_id"] = eos
    return full, [*own, *more]
