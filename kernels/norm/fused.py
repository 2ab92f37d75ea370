"""Residual sum and norm in one Triton kernel: XLA makes two to three of them, and each costs its
start, which is most of what so few numbers take.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.norm import reference

WIDEST = 16384  # numbers of a row that one program holds
ROWS = 32  # up to which it is measured to pay (LLaDA2-mini)


def add_norm(
    x_BTD: jax.Array, branch_BTD: jax.Array, scale_D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The sum and its norm as the reference defines them, rounded at the same places.

    The gradient is the reference's.
    """
    triton.require()
    if x_BTD.dtype not in (jnp.bfloat16, jnp.float16) or branch_BTD.dtype != x_BTD.dtype:
        raise NotImplementedError(f"it serves 16-bit numbers, not {x_BTD.dtype}")
    if x_BTD.shape[-1] > WIDEST:
        raise NotImplementedError(f"{x_BTD.shape[-1]} numbers of a row are more than {WIDEST}")
    check()
    return _fused(x_BTD, branch_BTD, scale_D, eps)


def prefer(x_BTD: jax.Array, *_: object) -> None:
    """NotImplementedError where XLA's kernels, which it makes one with others, are as quick."""
    triton.require()
    if (rows := x_BTD.size // x_BTD.shape[-1]) > ROWS:
        raise NotImplementedError(f"{rows} rows are more than {ROWS}")


def check() -> None:
    """NotImplementedError, with the reason, where the kernel cannot run or computes wrongly."""
    triton.require()
    x, branch, scale = (triton.normal(i, (4, 384)[i // 2 :]) for i in range(3))

    def whole(run: triton.Run) -> triton.Run:
        return lambda *arrays: jnp.stack(run(*arrays, 1e-5))

    triton.canary("norm", whole(_fused), whole(reference.add_norm), x, branch, scale)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(
    x: jax.Array, branch: jax.Array, scale: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    from jdllm.kernels.norm import fused_triton as kernels

    D, out = x.shape[-1], jax.ShapeDtypeStruct(x.shape, x.dtype)
    block = triton.power_of_2(D)
    return triton.call(
        kernels.add_norm, x, branch, scale, out=(out, out),
        grid=(x.size // D,), warps=min(max(block // 512, 1), 16), stages=1,
        D=D, BLOCK=block, EPS=eps,
    )  # fmt: skip


def _forward(x: jax.Array, branch: jax.Array, scale: jax.Array, eps: float):
    return _fused(x, branch, scale, eps), (x, branch, scale)


def _backward(eps: float, arrays: tuple[jax.Array, ...], change: tuple[jax.Array, ...]):
    return jax.vjp(lambda *arrays: reference.add_norm(*arrays, eps=eps), *arrays)[1](change)


_fused.defvjp(_forward, _backward)
