"""Slots: a few masked columns between tokens that are given, filled without a cache.

A diffusion model sees what stands behind a slot as well as what stands before it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jdllm.batches import bucket
from jdllm.decode.layout import take_rows
from jdllm.model.mask import Mask
from jdllm.model.model import Model

SURE = 0.9
"""Columns of a slot whose token is more probable than this are filled together."""


def log_chances(
    model: Model, tokens_BT: jax.Array, ends_B: jax.Array, columns_BN: jax.Array
) -> jax.Array:
    """Log-probabilities [B, N, V] of the tokens at some columns; [MASK] has none."""
    at_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden = model(model.embed(tokens_BT), at_BT, Mask.of(model.config, ends_B)).hidden
    source_BN = jnp.maximum(columns_BN - model.config.shift_logits, 0)
    logits = model.logits(take_rows(hidden, source_BN))
    return jax.nn.log_softmax(logits.at[..., model.config.mask_id].set(-jnp.inf), axis=-1)


@jax.jit
def score(
    model: Model, tokens_BT: jax.Array, ends_B: jax.Array, columns_BN: jax.Array, ids_BN: jax.Array
) -> jax.Array:
    """Log-probabilities [B, N] of given tokens at masked columns, each as if it were alone."""
    found = log_chances(model, tokens_BT, ends_B, columns_BN)
    return jnp.take_along_axis(found, ids_BN[..., None], axis=-1)[..., 0]


@jax.jit
def fill(
    model: Model, tokens_T: jax.Array, end: jax.Array, columns_N: jax.Array, allowed_NV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The canvas with its slot filled by allowed tokens, the surest first, and the model calls."""

    def open_N(tokens_T: jax.Array) -> jax.Array:
        return tokens_T[columns_N] == model.config.mask_id

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens_T, calls = carry
        found = log_chances(model, tokens_T[None], end[None], columns_N[None])[0]
        found = jax.nn.log_softmax(jnp.where(allowed_NV, found, -jnp.inf), axis=-1)
        ids_N, chance_N = jnp.argmax(found, axis=-1), jnp.exp(jnp.max(found, axis=-1))
        ranked_N = jnp.where(open_N(tokens_T), chance_N, -1.0)
        taken_N = (ranked_N >= SURE) | (jnp.arange(len(ids_N)) == jnp.argmax(ranked_N))
        new_N = jnp.where(taken_N & open_N(tokens_T), ids_N, tokens_T[columns_N])
        return tokens_T.at[columns_N].set(new_N.astype(tokens_T.dtype)), calls + 1

    return jax.lax.while_loop(
        lambda carry: jnp.any(open_N(carry[0])), step, (tokens_T, jnp.zeros((), jnp.int32))
    )


@dataclasses.dataclass(frozen=True)
class Around:
    """What stands before and behind a slot."""

    before: Sequence[int]
    behind: Sequence[int]


def choose(model: Model, around: Around, choices: Sequence[Sequence[int]]) -> np.ndarray:
    """The probability of each choice in a slot of its own length, all of them together 1.

    One model call; the tokens of a choice count as if each were alone.
    """
    facts, longest = model.config, max(map(len, choices))
    rows, wide = power(len(choices)), power(longest)
    T = bucket(len(around.before) + longest + len(around.behind) + wide)
    tokens = np.full((rows, T), facts.pad_id, np.int32)
    ends, ids = np.ones(rows, np.int32), np.zeros((rows, wide), np.int32)
    for i, choice in enumerate(choices):
        row = [*around.before, *[facts.mask_id] * len(choice), *around.behind]
        tokens[i, : len(row)], ends[i], ids[i, : len(choice)] = row, len(row), choice
    columns = np.broadcast_to(len(around.before) + np.arange(wide), ids.shape)
    logs = np.asarray(score(model, tokens, ends, columns, ids), np.float64)
    sums = np.array([logs[i, : len(choice)].sum() for i, choice in enumerate(choices)])
    chances = np.exp(sums - sums.max())
    return chances / chances.sum()


def complete(model: Model, around: Around, allowed_NV: np.ndarray) -> tuple[list[int], int]:
    """Tokens for a slot of N columns, each among those allowed there, and the model calls."""
    facts, N = model.config, len(allowed_NV)
    row = [*around.before, *[facts.mask_id] * N, *around.behind]
    tokens = np.full(bucket(len(row)), facts.pad_id, np.int32)
    tokens[: len(row)] = row
    columns = len(around.before) + np.arange(N)
    found, calls = fill(model, tokens, np.int32(len(row)), columns, allowed_NV)
    return np.asarray(found)[columns].tolist(), int(calls)


def power(number: int) -> int:
    """The next power of two: few shapes, few programs."""
    return 1 << (number - 1).bit_length()
