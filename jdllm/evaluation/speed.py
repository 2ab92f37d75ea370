"""What a run cost, in the words of the docs: completion tokens, NFE, forwards, seconds, latency."""

import dataclasses
import uuid
from collections.abc import Iterable
from typing import Any

import numpy as np

from jdllm.llm import Batch, Completion


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the batch of a completion cost as a whole."""

    id: str
    forwards: int
    seconds: float
    """On the device and back, without compilation."""
    compile_seconds: float
    shared_tokens: int = 0
    """Prompt tokens that were not computed with the batch, but once for many."""

    @classmethod
    def of(cls, batch: Batch) -> "Cost":
        """The cost of a batch under an id of its own."""
        facts = {field.name: getattr(batch, field.name) for field in dataclasses.fields(cls)[1:]}
        return cls(uuid.uuid4().hex[:12], **facts)


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a run cost; every rate is 0 before anything ran."""

    completion_tokens: int = 0
    """Tokens up to the end id or stop string, prompts never counted."""
    nfe: int = 0
    """Sum of the samples' NFE: forwards, each of one row."""
    calls: int = 0
    """Model calls of the batches, each for all its rows at once."""
    seconds: float = 0.0
    """On the device and back, without compilation."""
    compile_seconds: float = 0.0
    latencies: tuple[float, ...] = ()
    """Seconds of each completion: those of its batch, which hands over all its rows at once."""
    shared_tokens: int = 0
    """Prompt tokens that were not computed with their batch, but once for many."""

    @classmethod
    def of(cls, finished: Iterable[tuple[Completion, Cost]]) -> "Speed":
        """The cost of completions, each batch counted once, whichever run it was of."""
        pairs = list(finished)
        costs = {cost.id: cost for _, cost in pairs}.values()
        return cls(
            completion_tokens=sum(len(done.ids) for done, _ in pairs),
            nfe=sum(done.nfe for done, _ in pairs),
            calls=sum(cost.forwards for cost in costs),
            seconds=sum(cost.seconds for cost in costs),
            compile_seconds=sum(cost.compile_seconds for cost in costs),
            latencies=tuple(cost.seconds for _, cost in pairs),
            shared_tokens=sum(cost.shared_tokens for cost in costs),
        )

    def __add__(self, other: "Speed") -> "Speed":
        mine, theirs = (tuple(vars(speed).values()) for speed in (self, other))
        return Speed(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens per second."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Completion tokens for each model evaluation of a row."""
        return self.completion_tokens / self.nfe if self.nfe else 0.0

    @property
    def calls_per_second(self) -> float:
        """Model calls of the batches per second."""
        return self.calls / self.seconds if self.seconds else 0.0

    def latency(self, percent: float) -> float:
        """The latency, in seconds, that `percent` of the completions do not exceed."""
        return float(np.percentile(self.latencies, percent)) if self.latencies else 0.0

    def facts(self) -> dict[str, Any]:
        """What results.json holds."""
        rates = ("tokens_per_second", "tokens_per_forward", "calls_per_second")
        totals = (
            "completion_tokens",
            "nfe",
            "calls",
            "seconds",
            "compile_seconds",
            "shared_tokens",
        )
        facts = {name: getattr(self, name) for name in totals + rates}
        return facts | {"latency_p50": self.latency(50), "latency_p95": self.latency(95)}
