"""How a weight is made, an array whose axes have names, and how it meets an activation."""

import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jdllm.kernels.quantised import Quantised
from jdllm.model import lora, quantise
from jdllm.model.lora import Adapted


def initial(key: jax.Array, shape: Sequence[int], dtype: str, fan_in: int | None) -> jax.Array:
    """First values: truncated normal of variance 1/fan_in, ones for fan_in 0, zeros for None."""
    if not fan_in:
        return jnp.zeros(shape, dtype) if fan_in is None else jnp.ones(shape, dtype)
    normal = jax.random.truncated_normal(key, -3, 3, tuple(shape), jnp.float32)
    return (normal / math.sqrt(fan_in)).astype(dtype)


def weight(
    rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str], dtype: str, fan_in: int
) -> nnx.Param:
    """A weight with its logical axes, and with what `initial` makes of it."""
    value = initial(rngs.params(), shape, dtype, fan_in)
    return nnx.Param(value, axes=tuple(axes), fan_in=fan_in)


def bias(shape: Sequence[int], axes: Sequence[str], dtype: str) -> nnx.Param:
    """A bias with its logical axes; it starts at zero."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=tuple(axes), fan_in=None)


def held(weight: Any) -> Any:
    """What a parameter holds; anything else as it is."""
    return weight.get_value() if isinstance(weight, nnx.Variable) else weight


def dense(weight: Any, dtype: Any = jnp.float32) -> jax.Array:
    """A weight as an array, for what takes it apart itself; `dtype` is that of a quantised one."""
    value = held(weight)
    if isinstance(value, Adapted):
        return value.dense(dense(value.base, dtype))
    return value.dense(dtype) if isinstance(value, Quantised) else value


def whole(weight: Any, dtype: Any = jnp.float32) -> Any:
    """What a parameter holds, an adapted weight as an array and a quantised one as it is."""
    value = held(weight)
    return dense(value, dtype) if isinstance(value, Adapted) else value


def placed(value: Any, axes: Sequence[str | None]) -> tuple[tuple[str | None, ...], ...]:
    """The logical axes of each array in an array or a quantised weight with the axes `axes`."""
    return value.placed(axes) if isinstance(value, Quantised) else (tuple(axes),)


def plain(spec: str, x: jax.Array, weight: jax.Array, **options: Any) -> jax.Array:
    """The product with an array, which is cast to the dtype of `x`."""
    return jnp.einsum(spec, x, weight.astype(x.dtype), **options)


_asked: ContextVar[tuple[Sequence[str], dict[str, jax.Array]] | None] = ContextVar("asked")


def multiply(spec: str, x: jax.Array, weight: Any, **options: Any) -> jax.Array:
    """The product with what a parameter holds, by its row of PRODUCTS."""
    for kind, times in PRODUCTS.items():
        if isinstance(weight, kind):
            return times(spec, x, weight, **options)
    raise TypeError(f"{type(weight).__name__} is no weight; PRODUCTS lists those that are")


def note(name: str, found: jax.Array) -> None:
    """Keeps a product where its name is asked for (`probing`)."""
    asked = _asked.get(None)
    if asked and any(fnmatch.fnmatchcase(name, pattern) for pattern in asked[0]):
        asked[1][name] = found


PRODUCTS: dict[type, Callable[..., jax.Array]] = {
    jax.Array: plain,
    np.ndarray: plain,
    Quantised: quantise.product,
    Adapted: partial(lora.product, multiply, note),
}
"""By what a weight is: how it is multiplied."""


def product(
    spec: str,
    x: jax.Array,
    weight: Any,
    result: jnp.dtype | None = None,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """The einsum `spec` of an activation and a weight: the only place where these two meet.

    It is computed in the dtype of `x` and returned as `result` (default: the same). `weight` is a
    parameter, or what one holds. A parameter's products can be asked for by its name (`probing`).
    TypeError for a weight that is not in PRODUCTS.
    """
    value = held(weight)
    found = multiply(spec, x, value, preferred_element_type=result, precision=precision)
    if isinstance(weight, nnx.Variable):
        note(weight.get_metadata("name"), found)
    return found


def bare(weight: Any) -> jax.Array | Quantised | None:
    """The weight as a kernel takes it that makes more than the product; None where it cannot.

    It is an array or one in 8 bits, in one piece, and nobody asked for its product (`probing`).
    """
    value = held(weight)
    if not isinstance(value, jax.Array | Quantised) or _asked.get(None):
        return None
    numbers = value.values if isinstance(value, Quantised) else value
    mesh = jax.typeof(numbers).sharding.mesh
    return value if mesh.size <= 1 or mesh.manual_axes else None


def times(x_BTD: jax.Array, weight: jax.Array | Quantised) -> jax.Array:
    """The product [B, T, ...] with what `bare` returns [D, ...], in the dtype of `x_BTD`."""
    rest = "EFG"[: len(weight.shape) - 1]
    return multiply(f"BTD,D{rest}->BT{rest}", x_BTD, weight)


@contextlib.contextmanager
def probing(patterns: Sequence[str] | None) -> Iterator[dict[str, jax.Array]]:
    """The products made inside, by the dotted names of their weights that `patterns` match.

    They belong to the function that is being traced: it must return them.
    """
    found: dict[str, jax.Array] = {}
    token = _asked.set((patterns, found) if patterns else None)
    try:
        yield found
    finally:
        _asked.reset(token)
