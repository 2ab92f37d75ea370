"""Norm, rotary embedding and the cache's new columns in one Triton kernel, of all heads."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.rotary import reference
from jdllm.kernels.rotary.reference import Facts, Target

HEADS = 8  # of a program, at most


def turn(
    packed: tuple[jax.Array, ...],
    norms: tuple[jax.Array, ...],
    positions_BT: jax.Array,
    target: Target,
    facts: Facts,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and cache as the reference defines them; the cache is written where it lies."""
    triton.require()
    arrays = *packed, target.keys, target.values
    if wrong := [x.dtype for x in arrays if x.dtype not in (jnp.bfloat16, jnp.float16)]:
        raise NotImplementedError(f"it serves 16-bit numbers, not {wrong[0]}")
    if (K := packed[0].shape[-1]) != triton.power_of_2(K):
        raise NotImplementedError(f"it serves head dims that are powers of 2, not {K}")
    check()
    return _fused(packed, norms, positions_BT, target, facts)


def check() -> None:
    """NotImplementedError, with the reason, where the kernel cannot run or computes wrongly."""
    triton.require()
    q, kv = triton.normal(0, (2, 3, 4, 64)), triton.normal(1, (2, 3, 2, 2, 64))
    norms = triton.normal(2, (64,)), triton.normal(3, (64,))
    with jax.ensure_compile_time_eval():
        positions = jnp.array([[4, 5, 6], [0, 1, 2]], jnp.int32)
        places, empty = positions.at[0, 2].set(9), jnp.ones((2, 6, 2, 64), jnp.bfloat16)
    facts = Facts(1e4, 32, 1e-5)

    def flat(run: Callable[..., tuple[jax.Array, ...]]) -> triton.Run:
        def whole(packed: Any, norms: Any, positions: Any, places: Any, empty: Any) -> jax.Array:
            found = run(packed, norms, positions, Target(empty, empty, places), facts)
            return jnp.concatenate([x.ravel() for x in found])

        return whole

    arrays = (q, kv), norms, positions, places, empty
    triton.canary("rotary", flat(_fused), flat(reference.turn), *arrays)


@partial(jax.jit, static_argnums=(4,), inline=True)
def _fused(
    packed: tuple[jax.Array, ...],
    norms: tuple[jax.Array, ...],
    positions_BT: jax.Array,
    target: Target,
    facts: Facts,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from jdllm.kernels.rotary import fused_triton as kernels

    (B, T), (G, K), array = positions_BT.shape, target.keys.shape[2:], jax.ShapeDtypeStruct
    H, alone, keys = packed[0].shape[-2], len(packed) == 1, target.keys
    columns = keys.shape[1]
    heads, width = math.gcd(H, G, HEADS), facts.width or K
    # All layers have the same angles: XLA makes them once per call of the model.
    sin, cos = reference.angles(positions_BT, width // 2, facts.theta)
    scales = norms or (sin, sin)  # unread
    arrays = packed[0], packed[-1], sin, cos, *scales, target.places_BT, keys, target.values
    found = triton.call(
        kernels.turn, *arrays,
        out=(array((B, T, H, K), packed[0].dtype), *(array(keys.shape, keys.dtype),) * 2),
        aliases={7: 1, 8: 2},
        grid=(B * T, (H + 2 * G) // heads), warps=max(heads * K // 256, 1), stages=1,
        T=T, H=H, G=G, K=K, HALF=width // 2, HEADS=heads,
        ROW=columns if facts.by_row else 0, COLUMNS=columns * (1 if facts.by_row else len(keys)),
        FROM_Q=3 * H * K if alone else H * K, FROM_KV=3 * H * K if alone else 2 * G * K,
        SKIP=H * K if alone else 0, NORM=bool(norms), EPS=facts.eps or 0.0,
    )  # fmt: skip
    return found[0], found[1], found[2]
