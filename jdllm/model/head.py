"""What rules read of logits [B, N, V], without making them: best token, its logit, the rest.

Every device searches its own slice of the vocabulary (kernels/head); the best tokens of slices
combine into the best of all, and only a few numbers per position ever leave a device.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jdllm.kernels.choose import head as search
from jdllm.kernels.head.reference import Found, Noise, combine, of_logits
from jdllm.runtime import sharding


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


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Makes the best token a sample: noise is added to the logits that tokens are ranked by."""

    keys_B: jax.Array
    """A threefry key of every row: draws are those of jax.random.uniform(key, (N, V))."""
    scale: float | jax.Array
    """Of the noise: one for all rows, or one of each, [B] or [B, 1, 1]."""
    heat: float | jax.Array = 1.0
    """What logits are divided by before all else, likewise."""

    def noise(self, positions: int, vocab: int) -> Noise:
        """What the kernels take, for every position [B, N]."""
        data = jax.random.key_data(self.keys_B)
        shape = len(data), positions

        def spread(x: float | jax.Array) -> jax.Array:
            return jnp.broadcast_to(jnp.asarray(x, jnp.float32).reshape(-1, 1), shape)

        return Noise(
            keys=jnp.broadcast_to(data[:, None], (*shape, 2)),
            offset=jnp.broadcast_to(jnp.arange(positions, dtype=jnp.uint32) * vocab, shape),
            scale=spread(self.scale),
            heat=spread(self.heat),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Best:
    """The best token of every position, among a chunk, a shard or the whole of the vocabulary."""

    ids: jax.Array
    """int32 [B, N]: the lowest of equally good ones."""
    score: jax.Array
    """float32 [B, N]: its logit, with its noise where it is a sample."""
    own: jax.Array
    """float32 [B, N]: its logit alone, or -inf where the token is no part of the softmax."""
    rest: jax.Array
    """float32 [B, N]: logsumexp of all other logits of the softmax."""
    second: jax.Array
    """float32 [B, N]: the score of the second best token; -inf where there is none."""

    @property
    def odds(self) -> jax.Array:
        """float32 [B, N]: log-odds of the token's probability; -inf outside the softmax."""
        return jnp.where(self.own == -jnp.inf, -jnp.inf, self.own - self.rest)


def reference(logits_BNV: jax.Array, special: Special, sampling: Sampling | None = None) -> Best:
    """The best tokens of float32 logits [B, N, V], by definition."""
    columns_V = jnp.arange(logits_BNV.shape[-1])
    noise = sampling.noise(*logits_BNV.shape[1:]) if sampling else None
    return Best(*of_logits(logits_BNV, *_flags(columns_V, special), columns_V, noise))


def best(
    hidden_BND: jax.Array,
    head: jax.Array,
    special: Special = NOTHING,
    tied: bool = False,
    chunk: int | None = None,
    kernel: str = "auto",
    sampling: Sampling | None = None,
) -> Best:
    """The best token of every position, as `reference` finds it in the logits of `hidden_BND`.

    `head` is [D, V], or the embedding [V, D] where `tied`. Where logits exist at all, they do for
    `chunk` tokens of the vocabulary at a time (default: kernels/head/reference.py says). Where the
    vocabulary lies in slices on a mesh, every device searches its own, and one all-reduce of 20
    bytes per position and slice settles it. A sample's noise is a function of row, position and
    id, so neither chunks nor slices change it.
    """
    axes = ("vocab", None) if tied else (None, "vocab")
    vocab, noise = head.shape[axes.index("vocab")], ()
    if sampling is not None:
        noise = sampling.noise(hidden_BND.shape[1], vocab)

    def own(hidden_BND: jax.Array, head: jax.Array, *noise: jax.Array) -> jax.Array:
        V = head.shape[axes.index("vocab")]
        first = sharding.shard_index("vocab") * V
        flags = _flags(first + jnp.arange(V), special)
        drawn = Noise(*noise) if noise else None
        if drawn is not None:
            drawn = drawn._replace(offset=drawn.offset + jnp.asarray(first, jnp.uint32))
        found = search(hidden_BND, head, *flags, drawn, tied, chunk, kernel)
        return _pack(_exchange(found._replace(ids=first + found.ids)))

    inputs = (("batch", None, None), axes, *(("batch", None, None)[: x.ndim] for x in noise))
    packed = sharding.per_shard(own, head, inputs, (None, "batch", None))(hidden_BND, head, *noise)
    return Best(*_unpack(packed))


def _flags(ids_V: jax.Array, special: Special) -> tuple[jax.Array, jax.Array]:
    """Which ids may be chosen, and which are part of the softmax."""
    usable_V = ~_among(ids_V, special.excluded + special.forbidden)
    return usable_V, ~_among(ids_V, special.suppressed + special.forbidden)


def _exchange(own: Found) -> Found:
    """The best of all shards: each writes into its own slot of zeros, and the slots are summed."""
    count = sharding.shard_count("vocab")
    if count == 1:
        return own
    packed = _pack(own)
    slots = jnp.zeros((count, *packed.shape), packed.dtype)
    slots = slots.at[sharding.shard_index("vocab")].set(packed)
    slots = sharding.sum_shards(slots, "vocab")
    return combine(_unpack(jnp.moveaxis(slots, 1, 0)))


def _pack(found: Found) -> jax.Array:
    """The five fields as one int32 array [5, ...], bit for bit: sums with zeros change nothing."""
    bits = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in found[1:]]
    return jnp.stack([found.ids, *bits])


def _unpack(packed: jax.Array) -> Found:
    floats = [jax.lax.bitcast_convert_type(x, jnp.float32) for x in packed[1:]]
    return Found(packed[0], *floats)


def _among(columns_V: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    # Not isin: an array of no ids would be an unused input of the shards' program, over which the
    # partitioner of jax 0.11 stumbles.
    found_V = jnp.zeros(columns_V.shape, bool)
    for token in ids:
        found_V |= columns_V == token
    return found_V
