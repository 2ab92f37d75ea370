"""What a prompt became: generated ids cut at end ids and stop strings, and their text."""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np

from jdllm.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one prompt became."""

    text: str | None
    """Decoded ids, cut at the first stop string; None where the model has no tokenizer."""
    ids: list[int]
    """Generated ids up to, and without, the first id that ends a text, or up to a stop string."""
    nfe: int
    """Model evaluations made while this row was unfinished."""
    finish_reason: Literal["stop", "length"]
    """stop: an end id or a stop string came; length: the canvas was full first."""
    calls: list[int] = dataclasses.field(default_factory=list)
    """Model calls of each block that was decoded."""
    exits: list[int] = dataclasses.field(default_factory=list)
    """Numbers of the blocks that exit.* left early."""

    def noted(self, calls: np.ndarray, exits: np.ndarray) -> Self:
        """With what the loop noted of every block [blocks]."""
        own = {"calls": calls[calls > 0].tolist(), "exits": np.flatnonzero(exits).tolist()}
        return dataclasses.replace(self, **own)


def raw_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of ids, special tokens included: some stop strings are such."""
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def complete(
    ids: np.ndarray, nfe: int, config: ModelConfig, tokenizer: Any | None, stop: Sequence[str] = ()
) -> Completion:
    """Generated ids [gen_length] cut at the first end id, then at the first stop string."""
    # Under a budget of forwards blocks may have stayed masked: the text ends before them.
    ends = np.isin(ids, (*config.stop_ids, config.mask_id))
    length = int(ends.argmax()) if ends.any() else len(ids)
    kept = ids[:length].tolist()
    stopped = length < len(ids) and ids[length] != config.mask_id
    if tokenizer is None:
        return Completion(None, kept, nfe, "stop" if stopped else "length")
    stop = [s for s in stop if s]

    def holds(count: int) -> bool:
        text = raw_text(tokenizer, kept[:count])
        return any(s in text for s in stop)

    if stop and holds(length):
        stopped = True
        kept = kept[: bisect.bisect_left(range(length), True, key=holds)]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    cuts = [place for s in stop if (place := text.find(s)) >= 0]
    text = text[: min(cuts, default=len(text))]
    return Completion(text, kept, nfe, "stop" if stopped else "length")


@functools.lru_cache(maxsize=2)
def pieces(tokenizer: Any, vocab: int) -> list[str]:
    """Returns the text of every id below `vocab` that the tokenizer has."""
    ids = [[i] for i in range(min(vocab, len(tokenizer)))]
    return tokenizer.batch_decode(ids, skip_special_tokens=False)


def stop_sequences(
    tokenizer: Any | None, stop: Sequence[str], config: ModelConfig
) -> tuple[tuple[int, ...], ...]:
    """Sequences of ids whose text holds a stop string: single ids, and its own encoding.

    A string that comes about in another way, from the end of one token and the beginning of the
    next, is not among them; `complete` finds it in the text. None without a tokenizer.
    """
    stop = [s for s in stop if s]
    if not stop or tokenizer is None:
        return ()
    texts = pieces(tokenizer, config.vocab)
    holds = {i for i, piece in enumerate(texts) if any(s in piece for s in stop)}
    holds.discard(config.mask_id)
    spelt = [tokenizer.encode(s, add_special_tokens=False) for s in stop]
    proven = {
        tuple(ids)
        for s, ids in zip(stop, spelt, strict=True)
        if s in raw_text(tokenizer, ids) and not holds & set(ids)
    }
    return tuple(sorted({(i,) for i in holds} | proven))
