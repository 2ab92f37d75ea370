"""The shapes that implementations are tested and measured with."""

from typing import NamedTuple


class Attention(NamedTuple):
    """B rows, T queries, S keys, H query heads, G key/value heads, K head dim."""

    rows: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int


# Small ones for tests: multi-head, grouped over more keys than queries, one key/value head.
ATTENTION = (
    Attention(1, 5, 5, 4, 4, 8),
    Attention(2, 3, 9, 4, 2, 16),
    Attention(2, 8, 8, 6, 1, 4),
)
# Those of published models, for GPUs: a block of one row and of several of LLaDA-8B over its keys,
# a whole canvas of Dream-7B, a block of several of its rows and of LLaDA2-mini's.
PUBLISHED_ATTENTION = (
    Attention(1, 32, 1024, 32, 32, 128),
    Attention(8, 32, 1024, 32, 32, 128),
    Attention(1, 1000, 1000, 28, 4, 128),
    Attention(8, 32, 1024, 28, 4, 128),
    Attention(8, 32, 4096, 16, 4, 128),
)
PUBLISHED_HEADS = {
    "llada-8b": (32, 32, 128),
    "llada2-mini": (16, 4, 128),
    "dream-7b": (28, 4, 128),
}
"""H, G and K of models whose blocks experiments/attention_tiles.py measures."""
PAGE = 32
"""Columns of a page of keys."""


class Experts(NamedTuple):
    """T tokens with P picks of E experts, each of D inputs and M inner numbers."""

    tokens: int
    picks: int
    experts: int
    embed: int
    expert_mlp: int


# LLaDA2-mini's, for a block of one row, of a few, and for a full pass; LLaDA-MoE's.
PUBLISHED_EXPERTS = (
    Experts(32, 8, 256, 2048, 512),
    Experts(128, 8, 256, 2048, 512),
    Experts(1024, 8, 256, 2048, 512),
    Experts(32, 8, 64, 2048, 1024),
)
PUBLISHED_LAYERS = {"llada2-mini": PUBLISHED_EXPERTS[0], "llada-moe": PUBLISHED_EXPERTS[3]}
"""Of models whose experts experiments/expert_tiles.py measures, by the number of tokens."""


class Block(NamedTuple):
    """What surrounds attention in a block of B rows of T tokens: D numbers of a token, F inner ones
    of its MLP, H query heads, G key/value heads, K head dim, V tokens of the vocabulary."""

    rows: int
    queries: int
    embed: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    head_norms: bool
    """Whether queries and keys are normed."""


# One row and several of LLaDA-8B, one of Dream-7B, one of LLaDA2-mini (its dense layer).
PUBLISHED_BLOCKS = (
    Block(1, 32, 4096, 12288, 32, 32, 128, 126464, False),
    Block(8, 32, 4096, 12288, 32, 32, 128, 126464, False),
    Block(1, 32, 3584, 18944, 28, 4, 128, 152064, False),
    Block(1, 32, 2048, 5120, 16, 4, 128, 157184, True),
)
