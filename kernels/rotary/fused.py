"""Norm, rotary embedding and the cache's new columns in one Triton kernel, of all heads."""

import math
from collections.abc import Callable, Sequence
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
    require((*packed, target.keys, target.values), packed[0].shape[-1])
    check()
    return _fused(packed, norms, positions_BT, target, facts)


def require(arrays: Sequence[jax.Array], K: int) -> None:
    """NotImplementedError, with the reason, for arrays or a head dim that are not served."""
    if wrong := [x.dtype for x in arrays if x.dtype not in (jnp.bfloat16, jnp.float16)]:
        raise NotImplementedError(f"it serves 16-bit numbers, not {wrong[0]}")
    if triton.power_of_2(K) != K:
        raise NotImplementedError(f"it serves head dims that are powers of 2, not {K}")


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
    H, kind = packed[0].shape[-2], packed[0].dtype
    return _launched(packed, H, (), norms, positions_BT, target, facts, kind)


@partial(jax.jit, static_argnums=(5, 6), inline=True)
def of_parts(
    side_SBTJK: jax.Array,
    biases: tuple[jax.Array, ...],
    norms: tuple[jax.Array, ...],
    positions_BT: jax.Array,
    target: Target,
    facts: Facts,
    kind: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same of the S parts of a product: all heads side by side, J = H + 2 G of them.

    The sum of the parts is rounded to `kind`, and so is its sum with the biases, if there are any:
    one of all heads, or that of queries and that of keys and values.
    """
    H = side_SBTJK.shape[3] - 2 * target.keys.shape[2]
    return _launched((side_SBTJK,), H, biases, norms, positions_BT, target, facts, kind)


def _launched(
    packed: tuple[jax.Array, ...],
    H: int,
    biases: tuple[jax.Array, ...],
    norms: tuple[jax.Array, ...],
    positions_BT: jax.Array,
    target: Target,
    facts: Facts,
    kind: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from jdllm.kernels.rotary import fused_triton as kernels

    (B, T), (G, K), array = positions_BT.shape, target.keys.shape[2:], jax.ShapeDtypeStruct
    alone, keys = len(packed) == 1, target.keys
    columns, every = keys.shape[1], (H + 2 * G) * K
    heads, width = math.gcd(H, G, HEADS), facts.width or K
    # All layers have the same angles: XLA makes them once per call of the model.
    sin, cos = reference.angles(positions_BT, width // 2, facts.theta)
    scales, added = norms or (sin, sin), biases or (sin,)  # what is not there is not read
    arrays = packed[0], packed[-1], added[0], added[-1], sin, cos, *scales, target.places_BT
    found = triton.call(
        kernels.turn, *arrays, keys, target.values,
        out=(array((B, T, H, K), kind), *(array(keys.shape, keys.dtype),) * 2),
        aliases={9: 1, 10: 2},
        grid=(B * T, (H + 2 * G) // heads), warps=max(heads * K // 256, 1), stages=1,
        T=T, H=H, G=G, K=K, HALF=width // 2, HEADS=heads,
        ROW=columns if facts.by_row else 0, COLUMNS=columns * (1 if facts.by_row else len(keys)),
        FROM_Q=every if alone else H * K, FROM_KV=every if alone else 2 * G * K,
        SKIP=H * K if alone else 0, NORM=bool(norms), EPS=facts.eps or 0.0,
        PARTS=packed[0].size // (B * T * every) if alone else 1, STRIDE=B * T * every,
        BIASED=bool(biases), PAST=H * K if len(biases) == 1 else 0,
    )  # fmt: skip
    return found[0], found[1], found[2]
