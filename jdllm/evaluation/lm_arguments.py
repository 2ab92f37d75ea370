"""What lm-eval hands over, read into settings: model_args, gen_kwargs of requests, batch sizes.

A request's gen_kwargs are those of its task with the user's --gen_kwargs on top, which is lm-eval's
doing. Decode settings that were given to the model win over both, field by field.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from jdllm.decode import DecodeConfig
from jdllm.decode.checks import RENAMED
from jdllm.decode.presets import preset_settings
from jdllm.evaluation.settings import changed
from jdllm.runtime.fields import leaves, replaced
from jdllm.runtime.hints import asked, nearest

LM_EVAL_DEVICE = "cuda:0"  # of lm-eval's own command line
ROWS = 32  # of a batch, where lm-eval says auto
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
ALIASES = {"cfg": "cfg_scale", "diffusion_steps": "steps"}
FIELDS = set(leaves(DecodeConfig()))
# Values that say "off" elsewhere -> ours is to leave the setting open.
OFF: dict[str, tuple[Any, ...]] = {"top_p": (1,), "top_k": (0, -1), "alg_temp": (0,)}
# Options of autoregressive decoding, with the values at which they ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_return_sequences": (1,), "n": (1,), "best_of": (1,), "min_p": (0,),
    "repetition_penalty": (1,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "length_penalty": (1,), "no_repeat_ngram_size": (0,), "typical_p": (1,),
    "use_cache": (True, False), "early_stopping": (True, False), "logprobs": (False,),
}  # fmt: skip


def read_settings[T](words: dict[str, Any], bases: dict[str, T]) -> dict[str, T]:
    """`bases` changed by words such as decode.threshold, which is how model_args set decoding.

    ValueError, with the new or the nearest names, for a word that is not a setting, or no preset's
    name.
    """
    words = dict(words)
    preset = words.pop("decode.preset", None)
    known = {
        f"{name}.{field}": (name, field) for name, base in bases.items() for field in leaves(base)
    }
    for word in words:
        if (old := word.removeprefix("decode.")) in RENAMED:
            raise ValueError(f"{word} is decode.{RENAMED[old]} now")
        if word not in known:
            near = nearest(word, known) or list(known)
            raise ValueError(f"{word} is not a setting of this model; try {', '.join(near)}")
    changes: dict[str, dict[str, Any]] = {name: {} for name in bases}
    if preset:
        changes["decode"] |= preset_settings(preset)
    for word, value in words.items():
        name, field = known[word]
        changes[name][field] = value
    return {name: replaced(base, changes[name]) for name, base in bases.items()}


def model_name(model: Any, pretrained: str | None) -> Any:
    """What of lm-eval's two words names the model, by default bundled; ValueError for both."""
    if model and pretrained:
        raise ValueError(f"model={model} and pretrained={pretrained} are one thing; keep one")
    return model or pretrained or "bundled"


def check_device(device: str | None) -> None:
    """ValueError for a device other than the one that lm-eval passes where the user names none."""
    if device not in (None, LM_EVAL_DEVICE):
        raise ValueError(f"device={device} is for PyTorch models; place this one with mesh=")


def batch_rows(batch_size: int | str, most: int | None = None) -> int:
    """Rows of a batch: a number, or ROWS for auto and auto:N, but at most `most`.

    ValueError for anything else.
    """
    first, _, again = str(batch_size).partition(":")
    if first == "auto" and (not again or again.isdecimal()):
        return min(ROWS, most or ROWS)
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(f"batch_size={batch_size} must be auto or a number of rows, 1 or more")
    return int(batch_size)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request's gen_kwargs ask for."""

    stop: tuple[str, ...]
    length: int | None
    """Columns, where nothing else says how many."""
    decode: dict[str, Any]
    """Decode settings by name."""
    draws: bool = False
    """Whether it asks for chance (do_sample)."""
    remarks: tuple[str, ...] = ()
    """Sentences on what contradicts itself."""


def read_gen_kwargs(given: dict[str, Any]) -> Asked:
    """Translates gen_kwargs into stop strings, a length and decode settings.

    As in lm-eval, do_sample=false means temperature 0, whatever temperature is. ValueError, with
    its name, for what has no meaning here.
    """
    left = {ALIASES.get(name, name): value for name, value in given.items()}
    until = left.pop("until", None) or ()
    stop = (until,) if isinstance(until, str) else until
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
        raise ValueError(f"gen_kwargs: until={until!r} must be a text or a list of texts")
    lengths = [(name, left.pop(name)) for name in LENGTHS if name in left]
    lengths = [(name, value) for name, value in lengths if value is not None]
    for name, value in lengths:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"gen_kwargs: {name}={value!r} must be a whole number above 0")
    sample, remarks = left.pop("do_sample", None), ()
    if sample not in (None, True, False):
        raise ValueError(f"gen_kwargs: do_sample={sample!r} must be true or false")
    if sample is False:
        if left.get("temperature"):
            remarks = (
                f"gen_kwargs: do_sample=false makes temperature={left['temperature']} greedy, as "
                "everywhere in lm-eval; add do_sample=true",
            )
        left = {name: v for name, v in left.items() if name not in ("top_p", "top_k")}
        left["temperature"] = 0.0
    for name, value in left.items():
        _check(name, value)
    decode = {
        name: None if value in OFF.get(name, ()) else value
        for name, value in left.items()
        if name in FIELDS
    }
    length = lengths[0][1] if lengths else None
    return Asked(tuple(stop), length, decode, bool(sample), remarks)


def _check(name: str, value: Any) -> None:
    """ValueError where a name is no decode setting, unless its value asks for nothing."""
    if name in FIELDS or (name in NOTHING and value in (None, *NOTHING[name])):
        return
    if name in NOTHING:
        raise ValueError(f"gen_kwargs: {name}={value} has no meaning here; leave it out")
    if name in RENAMED:
        raise ValueError(f"gen_kwargs: {name}={value} is {RENAMED[name]} now")
    near = nearest(name, [*FIELDS, *LENGTHS, *ALIASES, "until", "do_sample"])
    hint = asked(near) or "leave it out"
    raise ValueError(f"gen_kwargs: {name}={value} has no meaning here; {hint}")


def given_names(base: DecodeConfig, words: dict[str, Any]) -> set[str]:
    """The decode fields that were given: by words of model_args, or other than the default."""
    named = {word.removeprefix("decode.") for word in words if word.startswith("decode.")}
    preset = preset_settings(words["decode.preset"]) if "preset" in named else {}
    return (named - {"preset"}) | set(preset) | set(changed(base))


def overlay(
    config: DecodeConfig, given: Collection[str], asked: Asked
) -> tuple[DecodeConfig, dict[str, Any], list[str]]:
    """`config` with what a request asks for, but for the fields in `given`, which stay.

    With it what it changed, and sentences on what gives way. ValueError where that makes no sense.
    """
    mine = {name: leaves(config)[name] for name in asked.decode}
    different = {name: value for name, value in asked.decode.items() if value != mine[name]}
    used = {name: value for name, value in different.items() if name not in given}
    remarks = [
        f"decode.{name}={mine[name]} wins over gen_kwargs: {name}={value}"
        for name, value in different.items()
        if name in given
    ]
    try:
        config = replaced(config, used)
    except ValueError as error:
        words = ", ".join(f"{name}={value}" for name, value in used.items())
        raise ValueError(f"gen_kwargs: {words}: {error}") from None
    if asked.draws and not config.draws:
        remarks.append("gen_kwargs: do_sample=true draws nothing without a temperature; set one")
    return config, used, [*asked.remarks, *remarks]
