"""The product that closes a branch, its sum with the residual stream, and the norm of that."""

from collections.abc import Callable

import jax

from jdllm.kernels.norm import reference
from jdllm.kernels.product import reference as plain
from jdllm.kernels.product.reference import Times
from jdllm.kernels.quantised import Quantised

Sum = Callable[[jax.Array, jax.Array, jax.Array, float], tuple[jax.Array, jax.Array]]


def close(
    x_BTF: jax.Array,
    weight_FD: jax.Array | Quantised,
    total_BTD: jax.Array,
    scale_D: jax.Array,
    eps: float,
    add_norm: Sum = reference.add_norm,
    times: Times = plain.times,
) -> tuple[jax.Array, jax.Array]:
    """The residual stream [B, T, D] with the product of `x_BTF` added, and its norm.

    `times` makes the product, and `add_norm` the sum and the norm.
    """
    return add_norm(total_BTD, times(x_BTF, weight_FD), scale_D, eps)
