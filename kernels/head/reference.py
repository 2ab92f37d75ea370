"""The best tokens of rows among the tokens of a head, in plain jnp: the definition, and by parts.

Best tokens of parts of the vocabulary combine into the best of all of it, so that the logits of all
of it are never in memory at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p

# Float32 logits of a device up to LOGIT_BYTES are made in one go: cutting the head up copies it.
# Larger ones are made for at most CHUNK tokens of the vocabulary at a time.
LOGIT_BYTES = 256 << 20
CHUNK = 8192
LANES = 128  # chunks are whole multiples


class Noise(NamedTuple):
    """Gumbel noise that tokens are ranked with, by which one is sampled; by row."""

    keys: jax.Array
    """uint32 [..., 2]: a key of threefry. The draws are those of jax.random.uniform with it."""
    offset: jax.Array
    """uint32 [...]: the number among the key's draws of that for the head's first token."""
    scale: jax.Array
    """float32 [...]: of the noise."""
    heat: jax.Array
    """float32 [...]: what logits are divided by before all else."""


class Found(NamedTuple):
    """The best token of every row, among a part or the whole of the vocabulary."""

    ids: jax.Array
    """int32 [...]: the lowest of equally good ones."""
    score: jax.Array
    """float32 [...]: its logit, with its noise."""
    own: jax.Array
    """float32 [...]: its logit alone, or -inf where the token is no part of the softmax."""
    rest: jax.Array
    """float32 [...]: logsumexp of all other logits of the softmax."""
    second: jax.Array
    """float32 [...]: the score of the second best token; -inf where there is none."""


def uniform(noise: Noise, columns_V: jax.Array) -> jax.Array:
    """The draws [..., V] in [0, 1) of some columns of a head, bit for bit jax.random.uniform's."""
    number = noise.offset[..., None] + columns_V.astype(jnp.uint32)
    keys = (jnp.broadcast_to(noise.keys[..., i, None], number.shape) for i in (0, 1))
    one, two = threefry2x32_p.bind(*keys, jnp.zeros_like(number), number)
    ones = jnp.uint32(0x3F800000)  # the bits of 1.0: with a random fraction they are in [1, 2)
    return jax.lax.bitcast_convert_type((one ^ two) >> 9 | ones, jnp.float32) - 1


def of_logits(
    logits: jax.Array,
    usable_V: jax.Array,
    counted_V: jax.Array,
    columns_V: jax.Array,
    noise: Noise | None = None,
) -> Found:
    """The best tokens of float32 logits [..., V] by definition, whose ids are `columns_V`.

    A token is chosen where it is usable, and part of the softmax where it is counted.
    """
    ranked = logits
    if noise is not None:
        logits = logits / noise.heat[..., None]
        drawn = -jnp.log(-jnp.log(uniform(noise, columns_V)))
        ranked = logits + noise.scale[..., None] * drawn
    scores = jnp.where(usable_V, ranked, -jnp.inf)
    place, score = jnp.argmax(scores, axis=-1), jnp.max(scores, axis=-1)
    # Where no token is usable, as in a chunk of [MASK] alone, none is chosen: all are others.
    chosen = jnp.where(score == -jnp.inf, -1, place)
    left = jnp.arange(logits.shape[-1]) != chosen[..., None]
    own = score if noise is None else jnp.take_along_axis(logits, place[..., None], -1)[..., 0]
    return Found(
        ids=columns_V[place].astype(jnp.int32),
        score=score,
        own=jnp.where(counted_V[place], own, -jnp.inf),
        rest=jax.nn.logsumexp(jnp.where(counted_V & left, logits, -jnp.inf), axis=-1),
        second=jnp.max(jnp.where(left, scores, -jnp.inf), axis=-1),
    )


def combine(parts: Found) -> Found:
    """The best of all from those of parts [parts, ...], whose ids ascend."""
    winner = jnp.argmax(parts.score, axis=0)
    numbers = jnp.arange(parts.score.shape[0]).reshape(-1, *[1] * winner.ndim)
    lost = numbers != winner

    def won(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, winner[None], axis=0)[0]

    rest = jnp.concatenate([parts.rest, jnp.where(lost, parts.own, -jnp.inf)])
    losers = jnp.where(lost, parts.score, -jnp.inf)
    return Found(
        ids=won(parts.ids),
        score=won(parts.score),
        own=won(parts.own),
        rest=jax.nn.logsumexp(rest, axis=0),
        second=jnp.maximum(won(parts.second), jnp.max(losers, axis=0)),
    )


def search(
    hidden_BND: jax.Array,
    head: jax.Array,
    usable_V: jax.Array,
    counted_V: jax.Array,
    noise: Noise | None = None,
    tied: bool = False,
    chunk: int | None = None,
) -> Found:
    """The best tokens [B, N] of a head [D, V], or of an embedding [V, D] where `tied`.

    The logits exist for `chunk` tokens at a time (default: by LOGIT_BYTES and CHUNK).
    """
    axis, letters = (0, "VD") if tied else (1, "DV")
    V, rows = head.shape[axis], hidden_BND.shape[0] * hidden_BND.shape[1]
    if chunk is None:
        room = LOGIT_BYTES // (4 * rows)
        chunk = V if room >= V else max(min(room, CHUNK) // LANES, 1) * LANES
    chunk = min(chunk, V)

    def part(number: jax.Array | int) -> Found:
        # The last chunk begins early enough to be whole; what came before counts no more.
        start = jnp.minimum(number * chunk, V - chunk)
        cut = jax.lax.dynamic_slice_in_dim
        piece = cut(head, start, chunk, axis) if chunk < V else head
        logits_BNV = jnp.einsum(
            f"BND,{letters}->BNV",
            hidden_BND,
            piece.astype(hidden_BND.dtype),
            preferred_element_type=jnp.float32,
        )
        columns_V = start + jnp.arange(chunk)
        fresh_V = columns_V >= number * chunk
        usable, counted = (cut(x, start, chunk) & fresh_V for x in (usable_V, counted_V))
        return of_logits(logits_BNV, usable, counted, columns_V, noise)

    if chunk == V:
        return part(0)
    return combine(jax.lax.map(part, jnp.arange(-(-V // chunk))))
