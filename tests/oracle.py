"""The plain twin of the decode loop: Python loops, one row at a time, float64 rules in numpy.

It shares the forward pass with the real loop and nothing else: no batch, no padding, no jit, its
own rules and its own stops. Slow and obvious; what it says is right.
"""

import numpy as np
from jax import numpy as jnp

from jdllm.cache import Cache
from jdllm.configs import ModelConfig
from jdllm.decode import DecodeConfig
from jdllm.model import Transformer


def softmax(logits_NV: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits_NV - logits_NV.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def pick(p_N: np.ndarray, masked_N: np.ndarray, config: DecodeConfig, quota: int) -> list[int]:
    """Positions to unmask, best first; the lowest index wins ties."""
    order = sorted(np.flatnonzero(masked_N).tolist(), key=lambda i: (-p_N[i], i))
    if config.rule == "quota":
        return order[:quota]
    if config.rule == "threshold":
        return [i for rank, i in enumerate(order) if rank == 0 or p_N[i] >= config.threshold]
    count = len(order) - 1
    for rank, i in enumerate(order):
        if rank and p_N[i] < 1 - config.factor / (rank + 2):
            count = rank
            break
    return order[: count + (count in (0, len(order) - 1))]


def quotas(masks: int, steps: int) -> list[int]:
    return [masks // steps + (i < masks % steps) for i in range(steps)]


class Row:
    """One canvas and the model calls made for it."""

    def __init__(
        self, model: Transformer, facts: ModelConfig, config: DecodeConfig, prompt: list[int]
    ):
        self.model, self.facts, self.config = model, facts, config
        assert config.gen_length and config.block_length
        self.start, self.block_length = len(prompt), config.block_length
        self.tokens = np.array(prompt + [facts.mask_id] * config.gen_length)
        self.nfe = 0
        self.cache = None

    def forward(self, tokens: np.ndarray, first: int, cache: Cache | None):
        """Logits [N, V] of `tokens`, which stand at columns `first` on."""
        columns = jnp.arange(first, first + len(tokens))[None]
        visible = jnp.ones((1, len(self.tokens)), bool)
        x = self.model.embed(jnp.array(tokens)[None], jnp.dtype(jnp.float32))
        hidden, cache = self.model(x, columns, visible, cache)
        return np.asarray(self.model.logits(hidden)[0], np.float64), cache

    def call(self, window: tuple[int, int], cached: bool) -> np.ndarray:
        """Logits of the canvas columns in `window`; a full pass refreshes the cache."""
        self.nfe += 1
        first, last = window
        if not cached:
            empty = Cache.zeros(self.facts, 1, len(self.tokens), jnp.dtype(jnp.float32))
            logits, self.cache = self.forward(self.tokens, 0, empty)
            return logits[first:last]
        logits, self.cache = self.forward(self.tokens[first:last], first, self.cache)
        return logits

    def commit(self, logits: np.ndarray, first: int, quota: int) -> None:
        """Unmasks columns of the block that starts at `first`; `logits` begin there too."""
        block = self.tokens[first : first + self.block_length]
        logits = logits[: len(block)].copy()
        free = logits.copy()
        free[:, self.facts.mask_id] = -np.inf
        ids = free.argmax(-1)
        p = softmax(logits)[np.arange(len(block)), ids]
        for i in pick(p, block == self.facts.mask_id, self.config, quota):
            block[i] = ids[i]

    def finished(self) -> bool:
        """With stop=eos: does the first end id have no mask before it? Then eos fills the rest."""
        if self.config.stop == "none":
            return False
        for i in range(self.start, len(self.tokens)):
            if self.tokens[i] == self.facts.mask_id:
                return False
            if self.tokens[i] in self.facts.stop_ids:
                self.tokens[i + 1 :] = self.facts.eos_id
                return True
        return False

    def run(self) -> "Row":
        length, end = self.block_length, len(self.tokens)
        for first in range(self.start, end, length):
            steps = (self.config.steps or 0) * length // (end - self.start)
            plan = quotas(length, steps) if steps else []
            for step in range(10 * length):
                last = first + length if self.config.cache == "dual" else end
                opening = self.config.cache == "none" or step == 0
                logits = self.call((first, end if opening else last), cached=not opening)
                self.commit(logits, first, plan[step] if step < len(plan) else 0)
                if self.finished():
                    return self
                if self.facts.mask_id not in self.tokens[first : first + length]:
                    break
        return self


def oracle(
    model: Transformer, facts: ModelConfig, config: DecodeConfig, prompt: list[int]
) -> tuple[list[int], int]:
    """Canvas and NFE of one prompt, for rules without random draws."""
    row = Row(model, facts, config, prompt).run()
    return row.tokens.tolist(), row.nfe
