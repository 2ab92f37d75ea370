"""The product that closes a branch, its sum with the residual stream, and the norm of that."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdllm.kernels.norm import reference

Sum = Callable[[jax.Array, jax.Array, jax.Array, float], tuple[jax.Array, jax.Array]]


def close(
    x_BTF: jax.Array,
    weight_FD: jax.Array,
    total_BTD: jax.Array,
    scale_D: jax.Array,
    eps: float,
    add_norm: Sum = reference.add_norm,
) -> tuple[jax.Array, jax.Array]:
    """The residual stream [B, T, D] with the product of `x_BTF` added, and its norm.

    `add_norm` does the sum and the norm where the product stands alone.
    """
    branch_BTD = jnp.einsum("BTF,FD->BTD", x_BTF, weight_FD.astype(x_BTF.dtype))
    return add_norm(total_BTD, branch_BTD, scale_D, eps)
