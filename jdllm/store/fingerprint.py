"""The fingerprint of a model: 32 characters from its facts and its weights, never from a path.

It is computed where the weights are, without moving them, and is the same on any mesh.
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

    Weights of another dtype are another model: they decode differently. So is one with an adapter.
    Two salted sums of 32 bits per weight make accidental collisions unlikely; they are no defence
    against an adversary.
    """
    told = dataclasses.asdict(model.config)
    if told["weights"] is None:  # a fact that older models do not have
        del told["weights"]
    facts = [json.dumps(told, sort_keys=True)]
    for name, leaf in sorted(named(model).items()):
        facts += [f"{name} {_told(array)}" for array in jax.tree.leaves(leaf)]
    for name, factors in sorted(model.adapter.factors.items() if model.adapter else ()):
        facts.append(f"{name} {factors.scale} {_told(factors.a)} {_told(factors.b)}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def _told(array: jax.Array) -> str:
    return f"{array.shape} {array.dtype} {jax.device_get(_sums(array)).tolist()}"


@jax.jit
def _sums(array: jax.Array) -> jax.Array:
    """Returns two sums modulo 2^32, uint32 [2], of hashes of every element's bits and place."""
    dtype = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, dtype).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        step = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place = place * jnp.uint32(size) + step
    return jnp.stack(
        [jnp.sum(_mix(bits ^ _mix(place ^ jnp.uint32(salt))), dtype=jnp.uint32) for salt in SALTS]
    )


def _mix(x: jax.Array) -> jax.Array:
    """Mixes 32-bit words: every input bit changes about half of the output bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
