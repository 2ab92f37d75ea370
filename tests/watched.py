"""The plain twin of the decode loop, keeping the record of what every call saw and wrote."""

import numpy as np

from jdllm.configs import ModelConfig
from jdllm.decode import DecodeConfig
from jdllm.model import Transformer
from jdllm.trace import Record
from tests.oracle import Row, softmax


class WatchedRow(Row):
    """A row of the twin that writes down each call's view before it commits."""

    def __init__(
        self, model: Transformer, facts: ModelConfig, config: DecodeConfig, prompt: list[int]
    ):
        super().__init__(model, facts, config, prompt)
        self.views: list[tuple[np.ndarray, ...]] = []

    def commit(self, logits: np.ndarray, first: int, quota: int) -> None:
        logits = logits[: self.block_length]
        free = logits.copy()
        free[:, self.facts.mask_id] = -np.inf
        p, ids = softmax(logits), free.argmax(-1)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
        columns = first + np.arange(len(ids))
        self.views.append((self.tokens.copy(), columns, ids, p[np.arange(len(ids)), ids], entropy))
        super().commit(logits, first, quota)


def watched(
    model: Transformer, facts: ModelConfig, config: DecodeConfig, prompt: list[int]
) -> Record:
    """The record of one prompt, for a resolved `config` without random draws."""
    row = WatchedRow(model, facts, config, prompt)
    row.run()
    tokens, columns, ids, confidence, entropy = map(np.stack, zip(*row.views, strict=True))
    return Record(
        np.concatenate([tokens, row.tokens[None]]).astype(np.int32),
        columns.astype(np.int32),
        ids.astype(np.int32),
        confidence.astype(np.float32),
        entropy.astype(np.float32),
        len(prompt),
        facts.mask_id,
    )
