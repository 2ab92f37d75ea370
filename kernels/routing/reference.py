"""Which experts tokens go to, and by what factors, in plain jnp; always in float32."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class Rule(NamedTuple):
    """How scores become picks and factors: fields of MoEConfig, which says what they mean."""

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    expert_bias: Literal["none", "selection", "score"] = "none"
    groups: int = 1
    top_groups: int = 1
    renormalise: bool = False
    scale: float = 1.0


def route(
    x_TD: jax.Array, router_DE: jax.Array, bias_E: jax.Array | None, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """Picks int32 [T, P], best first, and their float32 factors [T, P]."""
    return pick(logits(x_TD, router_DE), bias_E, rule)


def logits(x_TD: jax.Array, router_DE: jax.Array) -> jax.Array:
    """Float32 logits [..., E]: the input is upcast and the product not rounded below float32."""
    highest, router = jax.lax.Precision.HIGHEST, router_DE.astype(jnp.float32)
    return jnp.einsum("...D,DE->...E", x_TD.astype(jnp.float32), router, precision=highest)


@partial(jax.jit, static_argnames="rule", inline=True)  # traced once for all layers
def pick(logits_TE: jax.Array, bias_E: jax.Array | None, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Picks and factors for float32 logits [..., E]; of equal scores the lower expert comes first.

    The bias is added after the score function. LLaDA2's only selects, and the factors are those
    scores without it; the one that LLaDA-MoE's code knows changes the factors, too.
    """
    if rule.score == "softmax":
        scores = jax.nn.softmax(logits_TE, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits_TE)
    ranked = scores if bias_E is None else scores + bias_E
    if rule.expert_bias == "score":
        scores = ranked
    if rule.groups > 1:
        ranked = keep_best_groups(ranked, rule)
    _, picks = jax.lax.top_k(ranked, rule.top_k)
    factors = jnp.take_along_axis(scores, picks, axis=-1)
    if rule.renormalise and rule.top_k > 1:
        factors = factors / (factors.sum(-1, keepdims=True) + 1e-20)
    return picks, factors * rule.scale


def keep_best_groups(scores_TE: jax.Array, rule: Rule) -> jax.Array:
    """Scores with -inf outside the best groups; a group counts the sum of its two best scores."""
    grouped = scores_TE.reshape(*scores_TE.shape[:-1], rule.groups, -1)
    best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, kept = jax.lax.top_k(best.sum(-1), rule.top_groups)
    open_ = jax.nn.one_hot(kept, rule.groups, dtype=bool).any(-2)
    return jnp.where(open_[..., None], grouped, -jnp.inf).reshape(scores_TE.shape)
