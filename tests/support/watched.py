"""The plain twin of the decode loop, keeping the record of what every call saw and wrote."""

import numpy as np

from jdllm.decode import DecodeConfig
from jdllm.viz.trace import Record
from tests.support.oracle import Block, Row, candidates
from tests.support.plain_model import PlainModel, softmax


class WatchedRow(Row):
    """A row of the twin that writes down what each call saw."""

    def __init__(self, model: PlainModel, config: DecodeConfig, prompt: list[int]):
        super().__init__(model, config, prompt)
        self.views: list[tuple[np.ndarray, ...]] = []
        self.seen = np.zeros((0, 0))

    def forward(self, first: int, last: int, visible_end: int) -> np.ndarray:
        self.seen = super().forward(first, last, visible_end)
        return self.seen

    def call(self, block: Block) -> None:
        tokens, columns = self.tokens.copy(), np.arange(block.first, block.last)
        super().call(block)
        logits = self.seen[columns]
        p, ids = softmax(logits), candidates(logits, self.config, self.facts.mask_id)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
        self.views.append((tokens, columns, ids, p[np.arange(len(ids)), ids], entropy))


def watched(model: PlainModel, config: DecodeConfig, prompt: list[int]) -> Record:
    """Returns the record of one prompt, for a resolved `config` without random draws."""
    row = WatchedRow(model, config, prompt)
    row.run()
    tokens, columns, ids, confidence, entropy = map(np.stack, zip(*row.views, strict=True))
    return Record(
        np.concatenate([tokens, row.tokens[None]]).astype(np.int32),
        columns.astype(np.int32),
        ids.astype(np.int32),
        confidence.astype(np.float32),
        entropy.astype(np.float32),
        len(prompt),
        row.facts.mask_id,
    )
