"""Products with weights in 8 bits, and which parameters of a model are held so.

Only linear maps of the layers are quantised: neither embedding, head and norms nor the router.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jdllm.kernels import choose
from jdllm.kernels.quantised import Quantised, quantise
from jdllm.model.linear import Linear, linear_of

KEPT = ("router",)  # its choices are discrete: rounding would send tokens to other experts


def product(spec: str, x: jax.Array, weight: Quantised, **options: Any) -> jax.Array:
    """The product with a quantised weight, in the dtype of `x`.

    A backward pass keeps the values, neither `x` nor the weight in another dtype.
    """
    given = tuple((name, value) for name, value in options.items() if value is not None)
    return _product(spec, given, weight.inputs, x, weight.values, weight.scale)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    spec: str,
    options: tuple[Any, ...],
    inputs: tuple[int, ...],
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    before, kept, summed, out = _letters(spec, inputs)
    if before.endswith(summed) and not options and _on_one_device(values):
        rows = before.removesuffix(summed)
        sizes = (*x.shape[: len(rows)], *scale.shape)
        found = choose.product(
            x.reshape(-1, values[(0,) * len(kept)].size),
            values.reshape(scale.size, -1),
            scale.reshape(-1),
        )
        return jnp.einsum(f"{rows}{kept}->{out}", found.reshape(sizes))
    # Tied to x, so that no loop of XLA's widens all weights beforehand.
    x, values = jax.lax.optimization_barrier((x, values))
    found = jnp.einsum(
        f"{before},{kept}{summed}->{out}", x, values.astype(x.dtype), **dict(options)
    )
    return _scaled(found, scale, out, kept)


def _letters(spec: str, inputs: tuple[int, ...]) -> tuple[str, str, str, str]:
    """Letters of x, of the weight's outputs, of its inputs, and of what comes out."""
    operands, out = spec.split("->")
    before, letters = operands.split(",")
    summed = "".join(letters[axis] for axis in inputs)
    return before, "".join(x for x in letters if x not in summed), summed, out


def _on_one_device(array: jax.Array) -> bool:
    """Whether a kernel may be called: XLA would not split it over a mesh."""
    mesh = jax.typeof(array).sharding.mesh
    return mesh.size <= 1 or bool(mesh.manual_axes)


def _scaled(found: jax.Array, scale: jax.Array, out: str, kept: str) -> jax.Array:
    """`found` [out] times the scale of its output channels, in float32 and rounded once."""
    wide = jnp.einsum(f"{out},{kept}->{out}", found.astype(jnp.float32), scale)
    return wide.astype(found.dtype)


def _forward(
    spec: str,
    options: tuple[Any, ...],
    inputs: tuple[int, ...],
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, Any]:
    return _product(spec, options, inputs, x, values, scale), (values, scale)


def _backward(
    spec: str, options: tuple[Any, ...], inputs: tuple[int, ...], held: Any, change: jax.Array
) -> Any:
    (values, scale), (before, kept, summed, out) = held, _letters(spec, inputs)
    change = _scaled(change, scale, out, kept)
    change, values = jax.lax.optimization_barrier((change, values))
    precision = dict(options).get("precision")
    wide = values.astype(change.dtype)
    rule = f"{out},{kept}{summed}->{before}"
    return jnp.einsum(rule, change, wide, precision=precision), None, None


_product.defvjp(_forward, _backward)


def quantised_linear(parameter: str) -> Linear | None:
    """The row of LINEAR of a parameter that is held in 8 bits; None for one that never is."""
    linear = linear_of(parameter)
    return None if linear is None or linear.parts == KEPT else linear


def quantise_params(params: nnx.State, kind: str = "int8") -> nnx.State:
    """The parameters with their linear maps in 8 bits; the others stay, as do those that are."""

    def one(leaf: nnx.Variable) -> nnx.Variable:
        linear = quantised_linear(leaf.get_metadata("name"))
        if linear is None or isinstance(leaf.get_value(), Quantised):
            return leaf
        return leaf.replace(quantise(leaf.get_value(), linear.axes(linear.inputs), kind))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
