"""A closing product split over its inner numbers, whose parts are summed where the sum is normed.

Two Triton kernels, for the block step of one row: XLA makes a product, the sum of its parts, the
residual sum and the norm of it.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.closing import reference
from jdllm.kernels.norm.fused import WIDEST
from jdllm.kernels.product.reference import Times
from jdllm.kernels.quantised import Quantised, cast
from jdllm.kernels.split_product import check_narrow, parts

WIDTH = 256  # what the inner width must be a multiple of
ROWS = 64  # up to which it is measured to pay
# Columns at which it is measured to pay. Narrower layers need more parts to keep all processors
# busy, which are written and read again.
FEWEST = 3584


def close(
    x_BTF: jax.Array,
    weight_FD: jax.Array | Quantised,
    total_BTD: jax.Array,
    scale_D: jax.Array,
    eps: float,
    add_norm: reference.Sum | None = None,
    times: Times | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sum and its norm as the reference defines them; the gradient is the reference's."""
    del add_norm, times
    triton.require()
    triton.require_kinds(x_BTF, weight_FD, total_BTD)
    F, D = weight_FD.shape
    if F % WIDTH or D % 128 or D > WIDEST:
        raise NotImplementedError(f"it serves widths in multiples of {WIDTH}, not {F} and {D}")
    check()
    if isinstance(weight_FD, Quantised):
        check_narrow()
    return _split(x_BTF, cast(weight_FD, x_BTF.dtype), total_BTD, scale_D, eps)


def prefer(x_BTF: jax.Array, weight_FD: jax.Array | Quantised, *_: object) -> None:
    """NotImplementedError, with the reason, where XLA's product is as quick."""
    triton.require()
    if isinstance(weight_FD, Quantised):
        raise NotImplementedError("with weights in 8 bits it is not measured")
    (B, T), D = x_BTF.shape[:2], weight_FD.shape[1]
    if ROWS < B * T:
        raise NotImplementedError(f"{B * T} rows are more than {ROWS}")
    if D < FEWEST:
        raise NotImplementedError(f"{D} columns are fewer than {FEWEST}")


def check() -> None:
    """NotImplementedError, with the reason, where the kernels cannot run or compute wrongly."""
    triton.require()
    x, weight = triton.normal(0, (1, 24, 2048)), triton.normal(1, (2048, 128), 2048**-0.5)
    total, scale = triton.normal(2, (1, 24, 128)), triton.normal(3, (128,))

    def whole(run: triton.Run) -> triton.Run:
        return lambda *arrays: jnp.stack(run(*arrays, 1e-5))

    triton.canary("closing", whole(_split), whole(reference.close), x, weight, total, scale)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _split(
    x: jax.Array, weight: jax.Array | Quantised, total: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    from jdllm.kernels.closing import split_triton as kernels

    (B, T, _), D, R = x.shape, weight.shape[1], x.shape[0] * x.shape[1]
    found = parts(x, weight)
    out, block = jax.ShapeDtypeStruct((B, T, D), x.dtype), triton.power_of_2(D)
    return triton.call(
        kernels.sum_norm, found, total, scale, out=(out, out),
        grid=(R,), warps=min(max(block // 512, 1), 16), stages=1,
        R=R, D=D, BLOCK=block, PARTS=len(found), EPS=eps,
    )  # fmt: skip


def _forward(*given):  # noqa: ANN002, ANN202
    return _split(*given), given[:-1]


def _backward(eps: float, arrays: tuple[jax.Array, ...], change: tuple[jax.Array, ...]):
    return jax.vjp(lambda *arrays: reference.close(*arrays, eps=eps), *arrays)[1](change)


_split.defvjp(_forward, _backward)
