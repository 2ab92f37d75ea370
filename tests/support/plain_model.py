"""The transformer in numpy and float64, one row at a time, for the twin of the decode loop."""

import dataclasses

import numpy as np

from jdllm.model.config import ModelConfig

Keys = list[tuple[np.ndarray, np.ndarray]]
"""Keys and values [T, G, K] of every layer."""


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis; -inf gets 0."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class PlainModel:
    """A dense model with grouped queries, without biases; `facts` say the rest."""

    facts: ModelConfig
    weights: dict[str, np.ndarray]
    factors: dict[str, tuple[np.ndarray, np.ndarray, float]] = dataclasses.field(
        default_factory=dict
    )
    """LoRA by module: A [D, R], B [R, H, K] and the scale."""
    seen: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """What B gave in the last call [W, H K], by module."""

    @property
    def table_VD(self) -> np.ndarray:
        return self.weights["embedding"]

    def empty(self, length: int) -> Keys:
        shape = (length, self.facts.kv_heads, self.facts.head_dim)
        return [(np.zeros(shape), np.zeros(shape)) for _ in range(self.facts.layers)]

    def __call__(
        self, x_WD: np.ndarray, columns: np.ndarray, visible: np.ndarray, keys: Keys
    ) -> np.ndarray:
        """Returns logits [W, V] of inputs at `columns`, whose keys it writes before it attends."""
        facts, blocks = self.facts, np.arange(len(visible))
        seen = np.broadcast_to(visible, (len(columns), len(visible)))
        if length := 1 if facts.causal else facts.block_causal:
            blocks = blocks // length
            seen = seen & (blocks[None] <= blocks[columns][:, None])
        for i, (k, v) in enumerate(keys):
            layer = {
                name.removeprefix(f"layers.{i}."): array
                for name, array in self.weights.items()
                if name.startswith(f"layers.{i}.")
            }
            h = self.norm(x_WD, layer["attention_norm"])
            kv = np.einsum("td,dcgk->ctgk", h, layer["attention.kv"])
            own = {part: self.added(h, f"layers.{i}.attention.{part}") for part in "qkv"}
            k[columns], v[columns] = self.rotate(kv[0] + own["k"], columns), kv[1] + own["v"]
            q = np.einsum("td,dhk->thk", h, layer["attention.q"]) + own["q"]
            q = self.rotate(q, columns)
            group = facts.heads // facts.kv_heads
            scores = np.einsum("thk,shk->hts", q, k.repeat(group, 1)) / np.sqrt(facts.head_dim)
            mixed = softmax(np.where(seen, scores, -np.inf)) @ v.repeat(group, 1).swapaxes(0, 1)
            x_WD = x_WD + np.einsum("htk,hkd->td", mixed, layer["attention.out"])
            h = self.norm(x_WD, layer["mlp_norm"])
            gate, up = np.einsum("td,dcf->ctf", h, layer["mlp.gate_up"])
            x_WD = x_WD + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down"]
        return self.norm(x_WD, self.weights["norm"]) @ self.weights["head"]

    def added(self, h_WD: np.ndarray, name: str) -> np.ndarray | float:
        """What LoRA adds to a module, noted before its scale."""
        if name not in self.factors:
            return 0.0
        a, b, scale = self.factors[name]
        found = np.einsum("tr,rhk->thk", h_WD @ a, b)
        self.seen[name] = found.reshape(len(found), -1)
        return scale * found

    def norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.facts.norm_eps) * scale

    def rotate(self, x: np.ndarray, columns: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angles = columns[:, None, None] * self.facts.rope_theta ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        sin, cos = np.sin(angles), np.cos(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
