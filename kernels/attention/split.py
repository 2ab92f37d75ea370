"""Attention of a block's queries over a long cache, by Triton kernels that split the keys.

The query heads that share a key head are one tile, so that its keys are read once; parts of the
keys are worked on side by side and combined. How keys are split depends on their number alone.
"""

import functools

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.attention import reference

ROWS, KEYS = 64, 64  # of a tile
LARGEST = 256  # query rows per key head: beyond, products bind and not memory
PART = 512  # keys that one program goes through
TILES = 64  # with fewer of them XLA's own attention is as quick (measured on an H100)


def attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """Attention as the reference defines it, of the first `lengths_B` keys of each row.

    A row that sees no key gets zeros. The gradient is the reference's.
    """
    (B, T, H, K), G = q_BTHK.shape, k_BSGK.shape[2]
    rows = T * H // G
    triton.require()
    if {q_BTHK.dtype, k_BSGK.dtype, v_BSGK.dtype} not in ({jnp.bfloat16}, {jnp.float16}):
        raise NotImplementedError(f"it serves 16-bit numbers, not {q_BTHK.dtype}")
    if lengths_B.ndim != 1:
        raise NotImplementedError("it serves rows that see their first keys, not other masks")
    if K not in (64, 128):
        raise NotImplementedError(f"it serves head dims of 64 and 128, not {K}")
    if H == G:
        raise NotImplementedError("where no heads share keys, others are as quick")
    if rows > LARGEST:
        raise NotImplementedError(f"{rows} queries per key head are more than {LARGEST}")
    if B * G * -(-rows // ROWS) < TILES:
        raise NotImplementedError("too little work to go round")
    check()
    return _split(q_BTHK, k_BSGK, v_BSGK, lengths_B)


def check() -> None:
    """NotImplementedError, with the reason, where the kernels cannot run or compute wrongly."""
    triton.require()
    triton.canary("attention", _split, reference.attention, *_small())


@jax.custom_vjp
def _split(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    from jdllm.kernels.attention import split_triton as kernels

    (B, T, H, K), (S, G), array = q.shape, k.shape[1:3], jax.ShapeDtypeStruct
    splits = triton.power_of_2(-(-S // PART))
    part = -(-S // (splits * KEYS)) * KEYS
    outputs = array((splits, *q.shape), jnp.float32), array((splits, B, T, H), jnp.float32)
    parts, sums = triton.call(
        kernels.attend, q, k, v, lengths, out=outputs,
        grid=(B * G, splits, -(-T * (H // G) // ROWS)), warps=4, stages=3,
        T=T, S=S, H=H, G=G, K=K, PART=part, BM=ROWS, BN=KEYS,
    )  # fmt: skip
    return triton.call(
        kernels.combine, parts, sums, out=array(q.shape, q.dtype),
        grid=(B * T * H,), warps=2, stages=1, N=B * T * H, K=K, SPLITS=splits,
    )  # fmt: skip


def _forward(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _split(*arrays), arrays


def _backward(arrays: tuple[jax.Array, ...], change: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, lengths = arrays
    _, pull = jax.vjp(lambda q, k, v: reference.attention(q, k, v, lengths), q, k, v)
    return *pull(change), None


_split.defvjp(_forward, _backward)


@functools.cache
def _small() -> tuple[jax.Array, ...]:
    """Inputs of the canary: parts of the keys that a row sees whole, in part and not at all."""
    shapes = (3, 32, 4, 128), (3, 1100, 2, 128), (3, 1100, 2, 128)
    with jax.ensure_compile_time_eval():
        lengths = jnp.array([1100, 777, 40], jnp.int32)
    q, k, v = (triton.normal(i, shape) for i, shape in enumerate(shapes))
    return q, k, v, lengths
