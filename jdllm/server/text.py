"""What of a canvas is text already: cut at ends and stop strings, a piece at a time."""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from jdllm.completion import Completion, complete, raw_text
from jdllm.engine import Outcome, Progress
from jdllm.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Piece:
    """What has become text since the last time."""

    text: str
    ids: list[int]
    chances: list[float]
    over: bool = False
    reason: Literal["stop", "length", "cancelled", "failed"] = "length"
    nfe: int = 0


class Text:
    """A completion on its way to a client, which gets what cannot change any more."""

    def __init__(self, facts: ModelConfig, tokenizer: Any, cap: int, stop: tuple[str, ...]):
        self.facts, self.tokenizer, self.cap, self.stop = facts, tokenizer, cap, stop
        self.whole = ""
        """The text so far, as sent."""
        self.ids: list[int] = []
        self.over = False

    def take(self, event: Progress) -> Piece:
        """What an event adds. The first one that ends the text is the last that counts."""
        end = isinstance(event, Outcome)
        settled = event.tokens[: event.settled][: self.cap]
        found = complete(settled, event.nfe, self.facts, self.tokenizer, self.stop)
        reason: Any = found.finish_reason
        if isinstance(event, Outcome) and event.reason != "done":
            reason = event.reason
        elif not end and self.ended_by_string(found):
            end, found = True, dataclasses.replace(found, nfe=self.cost(event, found))
        elif end and self.ended_by_string(found):
            found = dataclasses.replace(found, nfe=self.cost(event, found))
        text = found.text or ""
        if not end:
            text = text[: len(text) - self.unsure(text)]
        new_ids = found.ids[len(self.ids) :]
        chances = event.chance[len(self.ids) : len(found.ids)].tolist()
        piece = Piece(text[len(self.whole) :], new_ids, chances, end, reason, found.nfe)
        self.whole, self.ids, self.over = text, found.ids, end
        return piece

    def ended_by_string(self, found: Completion) -> bool:
        """Whether a stop string is what ends the text."""
        if not self.stop:
            return False
        raw = raw_text(self.tokenizer, found.ids)
        return any(stop in raw for stop in self.stop)

    def cost(self, event: Progress, found: Completion) -> int:
        """Model evaluations after which the text up to a stop string was there, however late one
        looks."""
        return int(np.max(event.filled_at[: len(found.ids)], initial=0))

    def unsure(self, text: str) -> int:
        """How many of the last characters may yet become others, or part of a stop string."""
        unsure = len(text) - len(text.rstrip("\ufffd"))
        for stop in self.stop:
            for length in range(1, min(len(stop), len(text) + 1)):
                if text.endswith(stop[:length]):
                    unsure = max(unsure, length)
        return unsure


def log(chance: float) -> float:
    """The logarithm of a probability, as OpenAI's clients bound it."""
    return max(math.log(chance), -9999.0) if chance > 0 else -9999.0
