"""What a model is, in 32 letters: of its facts and the content of its weights, never of a path.

Computed where the weights are, without moving them; the same on any mesh.
"""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp

from jdllm.model.model import Model, named

SALTS = (0x2545F491, 0x9E3779B9)


def fingerprint(model: Model) -> str:
    """Hexadecimal digest of a model's facts and of every weight's bits and places.

    Weights of another dtype are another model: they decode differently. Two salted sums of 32 bits
    a weight, so accidents do not collide; it is no defence against an adversary.
    """
    facts = [json.dumps(dataclasses.asdict(model.config), sort_keys=True)]
    for name, leaf in sorted(named(model).items()):
        array = leaf[...]
        sums = jax.device_get(_sums(array))
        facts.append(f"{name} {array.shape} {array.dtype} {sums.tolist()}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


@jax.jit
def _sums(array: jax.Array) -> jax.Array:
    """Sums modulo 2^32, order-free, of mixed words: each of an element's bits and its place [2]."""
    kind = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        step = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place = place * jnp.uint32(size) + step
    return jnp.stack(
        [jnp.sum(_mix(bits ^ _mix(place ^ jnp.uint32(salt))), dtype=jnp.uint32) for salt in SALTS]
    )


def _mix(x: jax.Array) -> jax.Array:
    """A 32-bit finaliser: every input bit moves about half of the output bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
