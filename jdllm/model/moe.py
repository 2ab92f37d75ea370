"""Mixture of experts: which experts a token goes to, with what weights, and the layer of them.

Routing is in float32 whatever the model computes in, and follows MoEConfig alone. Letters besides
those of model.py: E experts, P picks of a token, M expert mlp, J experts of a group.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jdllm.kernels import choose
from jdllm.kernels.choose import experts
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


def router_logits(x_BTD: jax.Array, router_DE: jax.Array) -> jax.Array:
    """Float32 logits [..., E]: the input is upcast and the product not rounded below float32."""
    x, highest = x_BTD.astype(jnp.float32), jax.lax.Precision.HIGHEST
    return product("...D,DE->...E", x, router_DE, precision=highest)


def keep_best_groups(scores_BTE: jax.Array, moe: MoEConfig) -> jax.Array:
    """Scores with -inf outside the best groups; a group counts the sum of its two best scores."""
    grouped = scores_BTE.reshape(*scores_BTE.shape[:-1], moe.groups, -1)
    best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, kept = jax.lax.top_k(best.sum(-1), moe.top_groups)
    open_ = jax.nn.one_hot(kept, moe.groups, dtype=bool).any(-2)
    return jnp.where(open_[..., None], grouped, -jnp.inf).reshape(scores_BTE.shape)


@partial(jax.jit, static_argnames="moe", inline=True)  # traced once for all layers
def route(logits_BTE: jax.Array, bias_E: jax.Array | None, moe: MoEConfig) -> Routing:
    """Picks and weights for float32 logits [..., E].

    The bias is added after the score function. LLaDA2's only selects, and the weights are those
    scores without it; the one that LLaDA-MoE's code knows changes the weights, too.
    """
    if moe.score == "softmax":
        scores = jax.nn.softmax(logits_BTE, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits_BTE)
    ranked = scores if bias_E is None else scores + bias_E
    if moe.expert_bias == "score":
        scores = ranked
    if moe.groups > 1:
        ranked = keep_best_groups(ranked, moe)
    _, picks = jax.lax.top_k(ranked, moe.top_k)
    weights = jnp.take_along_axis(scores, picks, axis=-1)
    if moe.renormalise and moe.top_k > 1:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Routing(logits_BTE, picks, weights * moe.scale)


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
        return route(router_logits(x_BTD, dense(self.router)), bias_E, self.moe)

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
            _, picks, factors = route(router_logits(x_BTD, router_DE), bias_E, self.moe)
            own = picks - sharding.shard_index("experts") * gate_up.shape[0]
            P, (B, T, D) = self.moe.top_k, x_BTD.shape
            flat = x_BTD.reshape(-1, D), own.reshape(-1, P), factors.reshape(-1, P)
            mixed_BTD = experts(flat[0], gate_up, down, *flat[1:], kernel).reshape(B, T, D)
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
