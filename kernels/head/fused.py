"""The best tokens of rows in one Triton pass over the head: no logit ever leaves a processor."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.head import reference
from jdllm.kernels.head.reference import Found, Noise


class Tiles(NamedTuple):
    """Sizes of a kernel's work: rows, tokens, inner numbers at a time; warps, loads in flight."""

    rows: int
    tokens: int
    inner: int
    warps: int
    stages: int


# Up to so many rows.
TILES: tuple[tuple[float, Tiles], ...] = (
    (16, Tiles(16, 128, 64, 4, 4)),
    (32, Tiles(32, 128, 64, 8, 4)),
    (64, Tiles(64, 128, 64, 4, 4)),
    (float("inf"), Tiles(128, 128, 64, 8, 3)),
)
WIDTH = 64  # what the width of the model must be a multiple of


def search(
    hidden_BND: jax.Array,
    head: jax.Array,
    usable_V: jax.Array,
    counted_V: jax.Array,
    noise: Noise | None = None,
    tied: bool = False,
    chunk: int | None = None,
) -> Found:
    """The best tokens as the reference defines them."""
    triton.require()
    if chunk is not None:
        raise NotImplementedError("it cuts the vocabulary up by itself")
    for array in (hidden_BND, head):
        if array.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(f"it serves 16-bit numbers, not {array.dtype}")
    if (D := hidden_BND.shape[-1]) % WIDTH:
        raise NotImplementedError(f"it serves widths in multiples of {WIDTH}, not {D}")
    check()
    (B, N, _), head = hidden_BND.shape, head.astype(hidden_BND.dtype)
    if noise is not None:
        noise = Noise(noise.keys.reshape(B * N, 2), *(x.reshape(B * N) for x in noise[1:]))
    found = _fused(hidden_BND.reshape(B * N, D), head, usable_V, counted_V, noise, tied)
    return Found(*(x.reshape(B, N) for x in found))


def check() -> None:
    """NotImplementedError, with the reason, where the kernels cannot run or compute wrongly."""
    triton.require()
    D, V = 256, 1000
    hidden, head = triton.normal(0, (1, 40, D)), triton.normal(1, (D, V), D**-0.5)
    with jax.ensure_compile_time_eval():
        usable, counted = jnp.arange(V) != 7, jnp.arange(V) != 9

    def packed(run: triton.Run) -> triton.Run:
        def whole(hidden, head, usable, counted):  # noqa: ANN001, ANN202
            found = run(hidden, head, usable, counted)
            return jnp.stack([x.reshape(40).astype(jnp.float32) for x in found[1:]])

        return whole

    def ours(hidden: jax.Array, head: jax.Array, usable: jax.Array, counted: jax.Array) -> Found:
        return _fused(hidden[0], head, usable, counted, None, False)

    arrays = hidden, head, usable, counted
    triton.canary("head", packed(ours), packed(reference.search), *arrays)


def _fused(
    hidden_RD: jax.Array,
    head: jax.Array,
    usable_V: jax.Array,
    counted_V: jax.Array,
    noise: Noise | None,
    tied: bool,
) -> Found:
    from jdllm.kernels.head import fused_triton as kernels

    (R, D), array = hidden_RD.shape, jax.ShapeDtypeStruct
    V = head.shape[0 if tied else 1]
    tiles = next(tiles for most, tiles in TILES if most >= R)
    parts, blocks = -(-V // tiles.tokens), -(-R // tiles.rows)
    flags_V = usable_V.astype(jnp.int8) + 2 * counted_V.astype(jnp.int8)
    numbers = array((R, parts), jnp.float32)
    found = triton.call(
        kernels.search, hidden_RD, head, flags_V, *(noise or (flags_V,) * 4),
        out=(array((R, parts), jnp.int32), *(numbers,) * 4),
        grid=(blocks, parts), warps=tiles.warps, stages=tiles.stages,
        R=R, V=V, D=D, PARTS=parts, BY_D=1 if tied else V, BY_V=D if tied else 1,
        NOISE=noise is not None, BM=tiles.rows, BN=tiles.tokens, BK=tiles.inner,
    )  # fmt: skip
    one = array((R,), jnp.float32)
    return Found(*triton.call(
        kernels.combine, *found, out=(array((R,), jnp.int32), *(one,) * 4),
        grid=(R,), warps=4, stages=1, PARTS=parts, BLOCK=triton.power_of_2(parts),
    ))  # fmt: skip
