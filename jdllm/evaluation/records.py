"""What lm-eval's requests became: completions, scores, and the groups that share a batch."""

import dataclasses

from jdllm.completion import Completion
from jdllm.decode import DecodeConfig
from jdllm.evaluation.speed import Cost
from jdllm.score.scoring import Likelihood


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished request to generate."""

    task: str | None
    doc_id: int | None
    sample: int
    """Its number among the repeats of the same request."""
    prompt: str
    completion: Completion
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Scored:
    """One finished request for a likelihood."""

    task: str | None
    doc_id: int | None
    text: str
    """What was scored: a continuation, or a whole text."""
    score: Likelihood


@dataclasses.dataclass(frozen=True)
class Group:
    """Requests that may share a batch: same stop strings, same lengths."""

    stop: tuple[str, ...]
    decode: DecodeConfig
