"""Sizes of an engine."""

import dataclasses

from jdllm.engine.pages import affordable
from jdllm.model.model import Model

FEW = 16  # slots below which a step of a large model takes less than 10 ms


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How many requests run at once, and what they may take."""

    slots: int = 32
    """Requests that run at the same time, per set of decoding settings."""
    columns: int = 0
    """The longest canvas (default: the model's own length)."""
    page: int = 0
    """Columns of a page of the cache, whole blocks (default: the least from 32 on)."""
    pages: int = 0
    """Pages of the cache (default: as many as all slots with the longest canvas would take, or as
    memory has room for)."""
    rounds: int = 0
    """Steps of every row in a dispatch (default: 1, or 2 where slots are few and a step is short).
    The host is heard between two dispatches; the last step must outlast the handing over of the
    next ones, some milliseconds."""
    chunk: int = 256
    """Columns of a prompt that are read at once."""
    lanes: int = 4
    """Chunks, and full passes, that are made in one call."""
    groups: int = 8
    """Sets of decoding settings whose rows are kept in memory."""

    def __post_init__(self):
        for name in ("slots", "chunk", "lanes", "groups"):
            if (number := getattr(self, name)) < 1:
                raise ValueError(f"{name}={number} of an engine must be 1 or more")
        for name in ("columns", "page", "pages", "rounds"):
            if (number := getattr(self, name)) < 0:
                raise ValueError(f"{name}={number} of an engine must be 0 (chosen for you) or more")

    def filled(self, model: Model, block: int) -> "EngineConfig":
        """With what was left open, for blocks of `block` columns. ValueError where pages or chunks
        would cut a block."""
        page = self.page or -(-32 // block) * block
        columns = -(-(self.columns or model.config.max_length) // page) * page
        if model.config.block_causal and (page % block or self.chunk % block):
            raise ValueError(
                f"page={page} and chunk={self.chunk} of an engine must be multiples of the "
                f"model's blocks of {block} columns"
            )
        pages = self.pages or min(self.slots * columns // page, affordable(model, page))
        rounds = self.rounds or (2 if self.slots < FEW else 1)
        return dataclasses.replace(self, page=page, columns=columns, pages=pages, rounds=rounds)
