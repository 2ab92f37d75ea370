"""Mixture of experts: which experts a token goes to, with what weights, and the layer of them.

Routing (kernels/routing) is in float32 whatever the model computes in, and follows MoEConfig alone.
Letters besides those of model.py: E experts, P picks of a token, M expert mlp.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdllm.kernels import choose
from jdllm.kernels.choose import experts
from jdllm.kernels.routing.reference import Rule, logits, pick
from jdllm.model.config import MoEConfig
from jdllm.model.weights import bare, bias, dense, placed, product, times, weight, whole
from jdllm.runtime import sharding


class Routing(NamedTuple):
    """Where the tokens of one layer go."""

    logits: jax.Array
    """float32 [..., E]."""
    picks: jax.Array
    """int32 [..., P], best selection score first, of equal ones the lower expert."""
    weights: jax.Array
    """float32 [..., P]: the factor of each picked expert."""


def rule(moe: MoEConfig) -> Rule:
    """What routing is told of a model."""
    return Rule(**{name: getattr(moe, name) for name in Rule._fields})


def gated(x_BTD: jax.Array, gate_up_DCF: Any, kernel: str = "auto") -> jax.Array:
    """silu(gate x) * up x, in the dtype of x; the weight is what `product` takes."""
    if (plain := bare(gate_up_DCF)) is not None:
        return choose.gated(x_BTD, plain, kernel, times)
    gate_up = product("BTD,DCF->BTCF", x_BTD, gate_up_DCF)
    return jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]


def swiglu(x_BTD: jax.Array, gate_up_DCF: Any, down_FD: Any, kernel: str = "auto") -> jax.Array:
    """down(silu(gate x) * up x), in the dtype of x; the weights are what `product` takes."""
    return product("BTF,FD->BTD", gated(x_BTD, gate_up_DCF, kernel), down_FD)


class Experts(nnx.Module):
    """A router and its experts, each a SwiGLU feed-forward; router and bias stay float32."""

    def __init__(self, embed: int, moe: MoEConfig, dtype: str, rngs: nnx.Rngs):
        D, E, M = embed, moe.experts, moe.expert_mlp
        self.router = weight(rngs, (D, E), ("embed", "router"), "float32", D)
        if moe.expert_bias != "none":
            self.bias = bias((E,), ("router",), "float32")
        self.gate_up = weight(
            rngs, (E, D, 2, M), ("experts", "embed", "stack", "expert_mlp"), dtype, D
        )
        self.down = weight(rngs, (E, M, D), ("experts", "expert_mlp", "embed"), dtype, M)
        self.moe = moe

    def route(self, x_BTD: jax.Array) -> Routing:
        """Logits, picks and weights of every token."""
        bias_E = None if self.moe.expert_bias == "none" else self.bias[...].astype(jnp.float32)
        logits_BTE = logits(x_BTD, dense(self.router))
        return Routing(logits_BTE, *pick(logits_BTE, bias_E, rule(self.moe)))

    def __call__(
        self, x_BTD: jax.Array, shared: Sequence[nnx.Param] = (), kernel: str = "auto"
    ) -> jax.Array:
        """The mixed outputs [B, T, D], plus the MLP of the two weights `shared`, where given.

        A device of a mesh routes its own rows, runs its own experts and its slice of `shared`; one
        sum over devices ends both.
        """
        biased = self.moe.expert_bias != "none"
        params = [self.router, self.gate_up, self.down, *shared, *([self.bias] if biased else [])]

        def run(x_BTD: jax.Array, *leaves: jax.Array) -> jax.Array:
            router_DE, gate_up, down, *more = jax.tree.unflatten(tree, leaves)
            bias_E = more[-1].astype(jnp.float32) if biased else None
            B, T, D = x_BTD.shape
            x = x_BTD.reshape(-1, D)
            picks, factors = choose.route(x, router_DE, bias_E, rule(self.moe), kernel)
            own = picks - sharding.shard_index("experts") * gate_up.shape[0]
            mixed_BTD = experts(x, gate_up, down, own, factors, kernel).reshape(B, T, D)
            if shared:
                mixed_BTD += swiglu(x_BTD, *more[:2], kernel=kernel)
            return sharding.sum_shards(mixed_BTD, "experts")

        rows = ("batch", None, "embed")
        weights = [whole(param, x_BTD.dtype) for param in params]
        leaves, tree = jax.tree.flatten(weights)
        axes = [
            a
            for w, p in zip(weights, params, strict=True)
            for a in placed(w, p.get_metadata("axes"))
        ]
        return sharding.per_shard(run, leaves[0], (rows, *axes), rows)(x_BTD, *leaves)
