"""Rotary embedding of queries and keys, normed before where a model does so, in plain jnp."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.kernels.norm.reference import rms_norm


class Facts(NamedTuple):
    """What the two have in common; hashable."""

    theta: float
    width: int | None = None
    """Leading channels that turn; None is all."""
    eps: float | None = None
    """Of the norms of queries and keys; None where there are none."""
    by_row: bool = True
    """Whether the cache lies row by row, and not in pages."""


class Target(NamedTuple):
    """Where keys and values go."""

    keys: jax.Array
    """[P, N, G, K], or of a cache that lies row by row [B, S, G, K]."""
    values: jax.Array
    places_BT: jax.Array
    """int32: the columns in `keys`, all of the pages counted through, or those of the row where the
    cache lies row by row; one that is not there is nowhere."""


def angles(positions_BT: jax.Array, half: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Float32 sines and cosines [B, T, half] of the angles of each pair of channels."""
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    turned = positions_BT[:, :, None].astype(jnp.float32) * frequencies
    return jnp.sin(turned), jnp.cos(turned)


def rotate(
    x_BTHK: jax.Array, positions_BT: jax.Array, theta: float, width: int | None = None
) -> jax.Array:
    """Rotary embedding over the halves of the head dim, computed in float32.

    With `width` only that many leading channels turn; the others stay.
    """
    if width is not None and width < x_BTHK.shape[-1]:
        turned = rotate(x_BTHK[..., :width], positions_BT, theta)
        return jnp.concatenate([turned, x_BTHK[..., width:]], axis=-1)
    sin, cos = (x[:, :, None] for x in angles(positions_BT, x_BTHK.shape[-1] // 2, theta))
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


def split(packed: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of what the products give: see `turn`."""
    if len(packed) == 1:
        return packed[0][:, :, 0], packed[0][:, :, 1], packed[0][:, :, 2]
    return packed[0], packed[1][:, :, 0], packed[1][:, :, 1]


@partial(jax.jit, static_argnames="facts", inline=True)  # traced once for all layers
def turn(
    packed: tuple[jax.Array, ...],
    norms: tuple[jax.Array, ...],
    positions_BT: jax.Array,
    target: Target,
    facts: Facts,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, K], normed and turned, and the cache with keys and values in it.

    `packed` is [B, T, 3, H, K] alone, or queries [B, T, H, K] and [B, T, 2, G, K]; `norms` the two
    scales [K], or none.
    """
    q, k, v = split(packed)
    q, k = normed(q, k, norms, facts)
    q, k = (rotate(x, positions_BT, facts.theta, facts.width) for x in (q, k))
    write = write_rows if facts.by_row else write_pages
    keys, values = (
        write(*pair, target.places_BT) for pair in ((target.keys, k), (target.values, v))
    )
    return q, keys, values


def write_rows(old_BSGK: jax.Array, new_BTGK: jax.Array, columns_BT: jax.Array) -> jax.Array:
    """Writes T new columns of each row in place; columns at or beyond S are dropped.

    Written as a vmap, so that the batch stays a batch dimension of the scatter and shards.
    """

    def one(old_SGK: jax.Array, new_TGK: jax.Array, columns_T: jax.Array) -> jax.Array:
        return old_SGK.at[columns_T].set(
            new_TGK, mode="drop", unique_indices=True, indices_are_sorted=True
        )

    return jax.vmap(one)(old_BSGK, new_BTGK.astype(old_BSGK.dtype), columns_BT)


def write_pages(old_PNGK: jax.Array, new_BTGK: jax.Array, columns_BT: jax.Array) -> jax.Array:
    """Writes new columns, which count through all pages, in place; those beyond are dropped."""
    N = old_PNGK.shape[1]
    at = old_PNGK.at[columns_BT // N, columns_BT % N]
    return at.set(new_BTGK.astype(old_PNGK.dtype), mode="drop")


def normed(
    q: jax.Array, k: jax.Array, norms: tuple[jax.Array, ...], facts: Facts
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys after their norms, where there are any."""
    if facts.eps is None:
        return q, k
    return rms_norm(q, norms[0], facts.eps), rms_norm(k, norms[1], facts.eps)
