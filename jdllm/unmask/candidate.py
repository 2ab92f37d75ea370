"""Candidates choose the token that a position would take; a Warp changes the logits before."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from jdllm.unmask.view import LOWEST, Draw, gumbel, without


class Candidate(Protocol):
    """Chooses a token for every position: logits [B, N, V] -> int32 ids [B, N]."""

    def __call__(self, logits_BNV: jax.Array, draw: Draw) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Argmax:
    """Chooses the most likely token that is not in `excluded`.

    The references do not exclude [MASK]: they leave a position that predicts it masked, and their
    while-loops never end.
    """

    excluded: tuple[int, ...]

    def __call__(self, logits_BNV: jax.Array, draw: Draw) -> jax.Array:
        return jnp.argmax(without(logits_BNV, self.excluded), axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Gumbel:
    """Samples as LLaDA does: argmax of logits - T log(-log u), [MASK] excluded.

    The references compute exp(logits) / (-log u)^T in float64. Its logarithm is the same rule and
    cannot overflow, so float32 suffices. T scales the noise, not the logits. With T = 1 on logits
    that a Warp has divided, this draws from their softmax (Dream, LLaDA2). T may be [B, 1, 1].
    """

    excluded: tuple[int, ...]
    temperature: float | jax.Array

    def __call__(self, logits_BNV: jax.Array, draw: Draw) -> jax.Array:
        noisy = logits_BNV + self.temperature * gumbel(draw(logits_BNV.shape[1:]))
        return jnp.argmax(without(noisy, self.excluded), axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Warp:
    """Divides logits by the temperature, then filters by top_p and then by top_k, as Dream does.

    `top_k_first` is the order of LLaDA2 and BlockInfer: top_p then counts within what top_k kept,
    so fewer tokens stay. Both filters also apply at temperature 0, where they change confidences.
    A dropped token gets the lowest finite logit. The likeliest token that is not in `excluded`
    always stays, so that there is one to choose. Temperature and top_p may be arrays [B, 1, 1].
    """

    temperature: float | jax.Array = 0.0
    top_p: float | jax.Array | None = None
    top_k: int | None = None
    top_k_first: bool = False
    excluded: tuple[int, ...] = ()

    @property
    def heat(self) -> float | jax.Array:
        """What logits are divided by; 1 where the temperature is 0."""
        off = isinstance(self.temperature, float | int) and not self.temperature
        return 1.0 if off else self.temperature

    @property
    def filters(self) -> bool:
        """Whether it may drop tokens."""
        return self.top_k is not None or (self.top_p is not None and not _is_all(self.top_p))

    def __call__(self, logits_BNV: jax.Array) -> jax.Array:
        logits_BNV = logits_BNV / self.heat
        if self.top_k_first:
            kept = _keep_mass(_keep_best(logits_BNV, self.top_k), self.top_p)
        else:
            kept = _keep_best(_keep_mass(logits_BNV, self.top_p), self.top_k)
        allowed = without(logits_BNV, self.excluded)
        return jnp.where(logits_BNV < jnp.max(allowed, axis=-1, keepdims=True), kept, logits_BNV)


def _is_all(top_p: float | jax.Array) -> bool:
    return isinstance(top_p, float | int) and top_p >= 1


def _keep_mass(logits_BNV: jax.Array, top_p: float | jax.Array | None) -> jax.Array:
    """Returns the logits with all but the top_p mass dropped.

    The token that crosses the limit stays, and so do tokens tied with it.
    """
    if top_p is None or _is_all(top_p):
        return logits_BNV
    ordered = jnp.sort(logits_BNV, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    last_BN1 = jnp.sum(mass[..., :-1] <= top_p, axis=-1, keepdims=True)
    bar = jnp.take_along_axis(ordered, last_BN1, axis=-1)
    return jnp.where(logits_BNV < bar, LOWEST, logits_BNV)


def _keep_best(logits_BNV: jax.Array, top_k: int | None) -> jax.Array:
    """Returns the logits with all but the `top_k` largest dropped; ties with the last one stay."""
    if top_k is None or top_k >= logits_BNV.shape[-1]:
        return logits_BNV
    bar = jax.lax.top_k(logits_BNV, top_k)[0][..., -1:]
    return jnp.where(logits_BNV < bar, LOWEST, logits_BNV)
