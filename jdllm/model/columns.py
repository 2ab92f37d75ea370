"""Columns of hidden states, a few at a time, and the guidance of their logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def in_chunks(
    function: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], size: int
) -> jax.Array:
    """Returns `function` of arrays [B, W, ...], computed for `size` columns W at a time.

    Logits are large: so those of one chunk exist at once. `function` takes a tuple of arrays
    [B, size, ...] and returns one such; the last chunk is padded with zeros, whose results are
    dropped. A chunk keeps all its rows, so that on a mesh every device works on its own.
    """
    width = arrays[0].shape[1]
    count = -(-width // size)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - width)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(function, tuple(split(x) for x in arrays)).swapaxes(0, 1)
    return parts.reshape(parts.shape[0], count * size, *parts.shape[3:])[:, :width]


def guide(given: jax.Array, free: jax.Array, scale: float) -> jax.Array:
    """Returns logits under classifier-free guidance: `free` is what no prompt was given for."""
    return free + (scale + 1) * (given - free)
