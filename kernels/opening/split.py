"""The opening products in one Triton kernel, whose parts are summed where heads are turned.

XLA makes one or two products, the sums of their parts, and the sums with biases.
"""

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.opening import reference
from jdllm.kernels.opening.reference import Projection
from jdllm.kernels.product.reference import Times
from jdllm.kernels.quantised import Quantised, cast, matrix
from jdllm.kernels.rotary import fused
from jdllm.kernels.rotary.reference import Facts, Target
from jdllm.kernels.split_product import check_narrow, parts

WIDTH = 128  # what the inner width must be a multiple of
COLUMNS = 64  # of a tile: the columns of each projection are a multiple of them
ROWS = 128  # up to which it is measured to pay


def project(
    x_BTD: jax.Array,
    projections: tuple[Projection, ...],
    norms: tuple[jax.Array, ...],
    positions_BT: jax.Array,
    target: Target,
    facts: Facts,
    turn: reference.Turn | None = None,
    times: Times | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and cache as the reference defines them; the cache is written where it lies."""
    del turn, times
    triton.require()
    weights = [one.weight for one in projections]
    narrow = [one for one in weights if isinstance(one, Quantised)]
    fused.require((x_BTD, target.keys, target.values), target.keys.shape[-1])
    triton.require_kinds(*weights)
    if 0 < len(narrow) < len(weights):
        raise NotImplementedError("it serves weights of one kind")
    if (D := x_BTD.shape[2]) % WIDTH:
        raise NotImplementedError(f"it serves widths in multiples of {WIDTH}, not {D}")
    if odd := [n for one in projections if (n := one.weight.size // D) % COLUMNS]:
        raise NotImplementedError(f"it serves outputs in multiples of {COLUMNS}, not {odd[0]}")
    check()
    if narrow:
        check_narrow()
    return _split(x_BTD, projections, norms, positions_BT, target, facts)


def prefer(x_BTD: jax.Array, projections: tuple[Projection, ...], *_: object) -> None:
    """NotImplementedError, with the reason, where XLA's products are as quick."""
    triton.require()
    if any(isinstance(one.weight, Quantised) for one in projections):
        raise NotImplementedError("with weights in 8 bits it is not measured")
    if (rows := x_BTD.shape[0] * x_BTD.shape[1]) > ROWS:
        raise NotImplementedError(f"{rows} rows are more than {ROWS}")


def check() -> None:
    """NotImplementedError, with the reason, where the kernels cannot run or compute wrongly."""
    triton.require()
    x, scale = triton.normal(0, (2, 12, 512)), 512**-0.5
    q, kv = triton.normal(1, (512, 4, 64), scale), triton.normal(2, (512, 2, 2, 64), scale)
    biases = triton.normal(3, (4, 64)), triton.normal(4, (2, 2, 64))
    with jax.ensure_compile_time_eval():
        places = jnp.stack([jnp.arange(12), jnp.arange(6, 18)]).astype(jnp.int32)
        empty = jnp.ones((2, 16, 2, 64), jnp.bfloat16)  # the last two columns are nowhere
    facts = Facts(1e4, None, None)

    def flat(run: triton.Run) -> triton.Run:
        def whole(x, q, kv, one, two, places, empty):  # noqa: ANN001, ANN202
            both, target = (Projection(q, one), Projection(kv, two)), Target(empty, empty, places)
            found = run(x, both, (), places, target, facts)
            return jnp.concatenate([a.ravel() for a in found])

        return whole

    arrays = x, q, kv, *biases, places, empty
    triton.canary("opening", flat(_split), flat(reference.project), *arrays)


def _split(
    x_BTD: jax.Array,
    projections: tuple[Projection, ...],
    norms: tuple[jax.Array, ...],
    positions_BT: jax.Array,
    target: Target,
    facts: Facts,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    (B, T, D), K, kind = x_BTD.shape, target.keys.shape[-1], x_BTD.dtype
    found = parts(x_BTD, *(matrix(cast(one.weight, kind), D) for one in projections))
    biases = tuple(one.bias.astype(kind) for one in projections if one.bias is not None)
    side = found.reshape(len(found), B, T, -1, K)
    return fused.of_parts(side, biases, norms, positions_BT, target, facts, kind)
