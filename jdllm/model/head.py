"""What greedy rules read of logits [B, N, V], without making them: best token, its logit, the rest.

Best tokens of parts of the vocabulary combine into the best of all of it; so chunks and shards of
the vocabulary go one way, and only a few numbers per position ever leave a chunk or a device.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.model.weights import product
from jdllm.runtime import sharding

# Float32 logits of a device up to LOGIT_BYTES are made in one go: cutting the head up copies it.
# Larger ones are made for at most CHUNK tokens of the vocabulary at a time.
LOGIT_BYTES = 256 << 20
CHUNK = 8192
LANES = 128  # chunks are whole multiples


@dataclasses.dataclass(frozen=True)
class Special:
    """Ids that a rule treats apart; hashable, so that it can be static under jit."""

    excluded: tuple[int, ...] = ()
    """Never the best token, but part of the softmax ([MASK])."""
    suppressed: tuple[int, ...] = ()
    """No part of the softmax, but they may be the best token."""
    forbidden: tuple[int, ...] = ()
    """Neither."""


NOTHING = Special()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Best:
    """The best token of every position, among a chunk, a shard or the whole of the vocabulary."""

    ids: jax.Array
    """int32 [B, N]: the lowest of equally good ones."""
    score: jax.Array
    """float32 [B, N]: its logit."""
    own: jax.Array
    """float32 [B, N]: the same, or -inf where the token is no part of the softmax."""
    rest: jax.Array
    """float32 [B, N]: logsumexp of all other logits of the softmax."""
    second: jax.Array
    """float32 [B, N]: the logit of the second best token; -inf where there is none."""

    @property
    def odds(self) -> jax.Array:
        """float32 [B, N]: log-odds of the token's probability; -inf outside the softmax."""
        return jnp.where(self.own == -jnp.inf, -jnp.inf, self.own - self.rest)


def reference(logits_BNV: jax.Array, special: Special, columns_V: jax.Array | None = None) -> Best:
    """The best tokens of float32 logits [B, N, V], by definition.

    `columns_V` are the ids that the columns stand for (default: 0 to V - 1); -1 is none.
    """
    if columns_V is None:
        columns_V = jnp.arange(logits_BNV.shape[-1])
    usable_V = ~_among(columns_V, special.excluded + special.forbidden) & (columns_V >= 0)
    counted_V = ~_among(columns_V, special.suppressed + special.forbidden) & (columns_V >= 0)
    scores_BNV = jnp.where(usable_V, logits_BNV, -jnp.inf)
    place_BN = jnp.argmax(scores_BNV, axis=-1)
    score_BN = jnp.max(scores_BNV, axis=-1)
    # Where no token is usable, as in a chunk of [MASK] alone, none is chosen: all are others.
    chosen_BN = jnp.where(score_BN == -jnp.inf, -1, place_BN)
    left_BNV = jnp.arange(logits_BNV.shape[-1]) != chosen_BN[..., None]
    others_BNV = counted_V & left_BNV
    return Best(
        ids=columns_V[place_BN].astype(jnp.int32),
        score=score_BN,
        own=jnp.where(counted_V[place_BN], score_BN, -jnp.inf),
        rest=jax.nn.logsumexp(jnp.where(others_BNV, logits_BNV, -jnp.inf), axis=-1),
        second=jnp.max(jnp.where(left_BNV, scores_BNV, -jnp.inf), axis=-1),
    )


def combine(parts: Best) -> Best:
    """The best of all from those of parts [parts, B, N], whose ids ascend."""
    winner_BN = jnp.argmax(parts.score, axis=0)
    lost = jnp.arange(parts.score.shape[0])[:, None, None] != winner_BN
    rest = jnp.concatenate([parts.rest, jnp.where(lost, parts.own, -jnp.inf)])

    def won(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, winner_BN[None], axis=0)[0]

    rest_BN = jax.nn.logsumexp(rest, axis=0)
    losers = jnp.where(lost, parts.score, -jnp.inf)
    second_BN = jnp.maximum(won(parts.second), jnp.max(losers, axis=0))
    return Best(won(parts.ids), won(parts.score), won(parts.own), rest_BN, second_BN)


def best(
    hidden_BND: jax.Array,
    head: jax.Array,
    special: Special = NOTHING,
    tied: bool = False,
    chunk: int | None = None,
) -> Best:
    """The best token of every position, as `reference` finds it in the logits of `hidden_BND`.

    `head` is [D, V], or the embedding [V, D] where `tied`. The logits exist for `chunk` tokens of
    the vocabulary at a time (default: by LOGIT_BYTES and CHUNK). Where the vocabulary lies in
    slices on a mesh, every device searches its own, and one all-reduce of 20 bytes per position and
    slice settles it.
    """
    axes = ("vocab", None) if tied else (None, "vocab")

    def search(hidden_BND: jax.Array, head: jax.Array) -> jax.Array:
        first = sharding.shard_index("vocab") * head.shape[axes.index("vocab")]
        return _pack(_exchange(_search(hidden_BND, head, special, tied, chunk, first)))

    inputs = (("batch", None, None), axes)
    packed = sharding.per_shard(search, head, inputs, (None, "batch", None))(hidden_BND, head)
    return _unpack(packed)


def _search(
    hidden_BND: jax.Array,
    head: jax.Array,
    special: Special,
    tied: bool,
    chunk: int | None,
    first: jax.Array | int,
) -> Best:
    """Best of a head whose columns stand for the ids from `first` on."""
    axis, letters = (0, "VD") if tied else (1, "DV")
    V, rows = head.shape[axis], hidden_BND.shape[0] * hidden_BND.shape[1]
    if chunk is None:
        room = LOGIT_BYTES // (4 * rows)
        chunk = V if room >= V else max(min(room, CHUNK) // LANES, 1) * LANES
    chunk = min(chunk, V)

    def part(number: jax.Array | int) -> Best:
        # The last chunk begins early enough to be whole; what came before counts no more.
        start = jnp.minimum(number * chunk, V - chunk)
        piece = jax.lax.dynamic_slice_in_dim(head, start, chunk, axis) if chunk < V else head
        float32 = jnp.dtype("float32")
        logits_BNV = product(f"BND,{letters}->BNV", hidden_BND, piece, result=float32)
        columns_V = start + jnp.arange(chunk)
        fresh_V = columns_V >= number * chunk
        return reference(logits_BNV, special, jnp.where(fresh_V, first + columns_V, -1))

    if chunk == V:
        return part(0)
    return combine(jax.lax.map(part, jnp.arange(-(-V // chunk))))


def _exchange(own: Best) -> Best:
    """The best of all shards: each writes into its own slot of zeros, and the slots are summed."""
    count = sharding.shard_count("vocab")
    if count == 1:
        return own
    packed = _pack(own)
    slots = jnp.zeros((count, *packed.shape), packed.dtype)
    slots = slots.at[sharding.shard_index("vocab")].set(packed)
    slots = sharding.sum_shards(slots, "vocab")
    return combine(_unpack(jnp.moveaxis(slots, 1, 0)))


def _pack(best: Best) -> jax.Array:
    """The five fields as one int32 array [5, ...], bit for bit: sums with zeros change nothing."""
    floats = (best.score, best.own, best.rest, best.second)
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in floats]
    return jnp.stack([best.ids, *bits])


def _unpack(packed: jax.Array) -> Best:
    floats = [jax.lax.bitcast_convert_type(x, jnp.float32) for x in packed[1:]]
    return Best(packed[0], *floats)


def _among(columns_V: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    # Not isin: an array of no ids would be an unused input of the shards' program, over which the
    # partitioner of jax 0.11 stumbles.
    found_V = jnp.zeros(columns_V.shape, bool)
    for token in ids:
        found_V |= columns_V == token
    return found_V
