"""Routing in two Triton kernels: the router's product in parts, and everything that follows.

XLA makes a product, three sorts and a dozen small kernels of it.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jdllm.kernels import triton_call as triton
from jdllm.kernels.routing import reference
from jdllm.kernels.routing.reference import Rule

ROWS, COLUMNS, INNER = 32, 32, 64  # of a tile of the product
PROGRAMS = 128  # at least so many, where the inner axis can be split for it: one per processor
BIASES = {"none": 0, "selection": 1, "score": 2}


def route(
    x_TD: jax.Array, router_DE: jax.Array, bias_E: jax.Array | None, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """Picks and factors as the reference defines them; the gradient is the reference's.

    Scores that differ by a rounding may change their places.
    """
    triton.require()
    triton.require_kinds(x_TD)
    D, E = router_DE.shape
    if D % INNER or E % COLUMNS:
        raise NotImplementedError(
            f"it serves widths in multiples of {INNER} and {COLUMNS} experts, not {D} and {E}"
        )
    for count in (E, rule.groups):
        if count != triton.power_of_2(count):
            raise NotImplementedError(f"it serves powers of 2 of experts and groups, not {count}")
    check()
    return _fused(x_TD, router_DE.astype(jnp.float32), bias_E, rule)


def check() -> None:
    """NotImplementedError, with the reason, where the kernels cannot run or compute wrongly."""
    triton.require()
    rule = Rule(3, "sigmoid", "selection", groups=8, top_groups=4, renormalise=True, scale=2.5)
    x, router = triton.normal(0, (24, 256)), triton.normal(1, (256, 64), 256**-0.5)
    bias = triton.normal(2, (64,))

    def placed(run: triton.Run) -> triton.Run:
        def whole(x: jax.Array, router: jax.Array, bias: jax.Array) -> jax.Array:
            wide = router.astype(jnp.float32), bias.astype(jnp.float32)
            picks, factors = run(x, *wide, rule)
            return jnp.einsum("TPE,TP->TE", jax.nn.one_hot(picks, 64), factors)

        return whole

    triton.canary("routing", placed(_fused), placed(reference.route), x, router, bias)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(
    x_TD: jax.Array, router_DE: jax.Array, bias_E: jax.Array | None, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    from jdllm.kernels.routing import fused_triton as kernels

    (T, D), E, P = x_TD.shape, router_DE.shape[1], rule.top_k
    tiles = -(-T // ROWS), E // COLUMNS
    count = triton.power_of_2(-(-PROGRAMS // (tiles[0] * tiles[1])))
    while D % (count * INNER):
        count //= 2
    parts = triton.call(
        kernels.product, x_TD, router_DE, out=jax.ShapeDtypeStruct((count, T, E), jnp.float32),
        grid=(*tiles, count), warps=4, stages=3,
        T=T, D=D, E=E, PART=D // count, BM=ROWS, BN=COLUMNS, BK=INNER,
    )  # fmt: skip
    bias = parts if bias_E is None else bias_E.astype(jnp.float32)  # what is not there is not read
    kinds = (jnp.int32, jnp.float32)
    return triton.call(
        kernels.pick, parts, bias, out=tuple(jax.ShapeDtypeStruct((T, P), kind) for kind in kinds),
        grid=(T,), warps=1, stages=1,
        T=T, E=E, PARTS=count, P=P, LANES=triton.power_of_2(P),
        GROUPS=rule.groups, KEPT=rule.top_groups, SIGMOID=int(rule.score == "sigmoid"),
        BIAS=0 if bias_E is None else BIASES[rule.expert_bias],
        EVEN=int(rule.renormalise and P > 1), SCALE=rule.scale,
    )  # fmt: skip


def _forward(*given):  # noqa: ANN002, ANN202
    return _fused(*given), given[:-1]


def _backward(
    rule: Rule,
    arrays: tuple[jax.Array, jax.Array, jax.Array | None],
    change: tuple[jax.Array, jax.Array],
):
    def factors(x: jax.Array, router: jax.Array, bias: jax.Array | None) -> jax.Array:
        return reference.route(x, router, bias, rule)[1]

    return jax.vjp(factors, *arrays)[1](change[1])


_fused.defvjp(_forward, _backward)
