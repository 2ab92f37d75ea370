"""Confidences rate how sure the model is of each candidate: a score to rank by, and a plain value.

The probability is ranked by its log-odds, log(p / (1 - p)), in float32: they rank like p but do
not saturate where float32 p rounds to 1, so float64 is not needed.
"""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from jdllm.model.head import Best
from jdllm.unmask.view import Draw, View, gumbel, without


class Confidence(Protocol):
    """Rates the chosen tokens: logits [B, N, V], ids [B, N] -> score [B, N], higher is surer."""

    reads_logits: ClassVar[bool]
    """Whether it needs all logits, not only each position's best token."""

    def of_best(self, best: Best, draw: Draw) -> jax.Array:
        """Returns the score [B, N] from best tokens alone, where these suffice."""
        ...

    def __call__(self, logits_BNV: jax.Array, ids_BN: jax.Array, draw: Draw) -> jax.Array: ...

    def value(self, score_BN: jax.Array) -> jax.Array:
        """Returns the values [B, N] that thresholds are compared with."""
        ...


@dataclasses.dataclass(frozen=True)
class Probability:
    """Rates by the chosen token's probability under the softmax of the logits without noise.

    Ids in `suppressed` leave the softmax; a position that chose one of them gets the lowest
    confidence but stays a candidate (LLaDA's confidence_eos_eot_inf).
    """

    suppressed: tuple[int, ...] = ()
    reads_logits: ClassVar[bool] = False

    def of_best(self, best: Best, draw: Draw) -> jax.Array:
        return best.odds

    def __call__(self, logits_BNV: jax.Array, ids_BN: jax.Array, draw: Draw) -> jax.Array:
        logits = without(logits_BNV, self.suppressed)
        chosen = ids_BN[..., None] == jnp.arange(logits.shape[-1])
        own = jnp.max(jnp.where(chosen, logits, -jnp.inf), axis=-1)
        rest = jax.nn.logsumexp(jnp.where(chosen, -jnp.inf, logits), axis=-1)
        return jnp.where(own == -jnp.inf, -jnp.inf, own - rest)

    def value(self, score_BN: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(score_BN)


@dataclasses.dataclass(frozen=True)
class Plain:
    """The part that confidences share whose score is also their value."""

    reads_logits: ClassVar[bool] = True

    def of_best(self, best: Best, draw: Draw) -> jax.Array:
        raise NotImplementedError("it reads logits")

    def value(self, score_BN: jax.Array) -> jax.Array:
        return score_BN


@dataclasses.dataclass(frozen=True)
class Random(Plain):
    """Rates at random, uniformly in [0, 1) (LLaDA's remasking='random', Dream's origin)."""

    reads_logits: ClassVar[bool] = False

    def of_best(self, best: Best, draw: Draw) -> jax.Array:
        return draw(best.ids.shape[1:])

    def __call__(self, logits_BNV: jax.Array, ids_BN: jax.Array, draw: Draw) -> jax.Array:
        return draw(ids_BN.shape[1:])


@dataclasses.dataclass(frozen=True)
class Leftmost(Plain):
    """Ranks from left to right, without the logits (apd's leftright, BlockInfer's sequential)."""

    reads_logits: ClassVar[bool] = False

    def of_best(self, best: Best, draw: Draw) -> jax.Array:
        return _leftmost(best.ids)

    def __call__(self, logits_BNV: jax.Array, ids_BN: jax.Array, draw: Draw) -> jax.Array:
        return _leftmost(ids_BN)


@dataclasses.dataclass(frozen=True)
class Margin(Plain):
    """Rates by the difference of the two largest probabilities (Dream's topk_margin)."""

    def __call__(self, logits_BNV: jax.Array, ids_BN: jax.Array, draw: Draw) -> jax.Array:
        top_BN2 = jax.lax.top_k(jax.nn.softmax(logits_BNV, axis=-1), 2)[0]
        return top_BN2[..., 0] - top_BN2[..., 1]


@dataclasses.dataclass(frozen=True)
class NegativeEntropy(Plain):
    """Rates by minus the entropy in nats, sum p log(p + 1e-10) (Dream, d3LLM, BlockInfer)."""

    def __call__(self, logits_BNV: jax.Array, ids_BN: jax.Array, draw: Draw) -> jax.Array:
        return -entropy(logits_BNV)


@dataclasses.dataclass(frozen=True)
class Tempered(Plain):
    """Draws positions without replacement from softmax(confidence / T): Dream's alg_temp.

    Adding Gumbel noise to confidence / T and taking the best k is the same draw.
    """

    confidence: Confidence
    temperature: float

    def __call__(self, logits_BNV: jax.Array, ids_BN: jax.Array, draw: Draw) -> jax.Array:
        score_BN = self.confidence(logits_BNV, ids_BN, draw)
        return self.confidence.value(score_BN) / self.temperature + gumbel(draw(ids_BN.shape[1:]))


def _leftmost(ids_BN: jax.Array) -> jax.Array:
    return jnp.broadcast_to(-jnp.arange(ids_BN.shape[1], dtype=jnp.float32), ids_BN.shape)


def entropy(logits_BNV: jax.Array) -> jax.Array:
    """Returns the entropy [B, N] in nats, minus sum p log(p + 1e-10)."""
    p_BNV = jax.nn.softmax(logits_BNV.astype(jnp.float32), axis=-1)
    return -jnp.sum(p_BNV * jnp.log(p_BNV + 1e-10), axis=-1)


def margin(view: View, excluded: tuple[int, ...]) -> jax.Array:
    """Returns how far the best token's logit exceeds the second best [B, N], but for `excluded`."""
    if view.best is not None:
        return view.best.score - view.best.second
    top_BN2 = jax.lax.top_k(without(view.logits_BNV.astype(jnp.float32), excluded), 2)[0]
    return top_BN2[..., 0] - top_BN2[..., 1]
