"""Cross entropy of hidden states, without ever holding all logits.

Logits exist for a chunk of columns at a time. Where the head is trained, they are made once more in
the backward pass (`cross_entropy`). Where it is frozen, the gradient of the hidden states is made
beside the loss, and columns that carry no loss are left out (`over_frozen_head`).
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from jdllm.model.columns import in_chunks
from jdllm.model.model import Model

LOGIT_BYTES = 256 << 20  # no logits array grows beyond this


class Weighed(Protocol):
    """What a batch says of its columns, all [B, T]."""

    @property
    def targets(self) -> jax.Array:
        """int32: their tokens."""
        ...

    @property
    def masked(self) -> jax.Array:
        """bool: which carry loss."""
        ...

    @property
    def weights(self) -> jax.Array:
        """float32: how much their nll counts."""
        ...


def chunk_size(model: Model, rows: int, columns: int) -> int:
    """How many columns have logits at once, so that they need at most LOGIT_BYTES."""
    count = min(-(-rows * columns * model.config.vocab * 4 // LOGIT_BYTES), columns)
    return -(-columns // count)


@jax.custom_vjp
def nll_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log likelihood [...] of float32 logits [..., V].

    Its gradient is written out, so that it is one pass: chances, less 1 at the target.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def _forward(logits: jax.Array, targets: jax.Array):
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    found = total - jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return found[..., 0], (logits, targets, total)


def _backward(kept: tuple[jax.Array, jax.Array, jax.Array], change: jax.Array):
    logits, targets, total = kept
    own = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (jnp.exp(logits - total) - own) * change[..., None], None


nll_of.defvjp(_forward, _backward)


def nll_and_doubt(logits: jax.Array, targets: jax.Array, entropy: bool) -> jax.Array:
    """Negative log likelihood and doubt [..., 2] of float32 logits.

    Doubt is the entropy where the best token is the right one, else 0; and 0 unless `entropy`.
    """
    nll = nll_of(logits, targets)
    if not entropy:
        return jnp.stack([nll, jnp.zeros_like(nll)], axis=-1)
    logs = jax.nn.log_softmax(logits)
    doubt = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
    right = jnp.argmax(logits, axis=-1) == targets
    return jnp.stack([nll, jnp.where(right, doubt, 0.0)], axis=-1)


def cross_entropy(
    model: Model, hidden_BTD: jax.Array, tokens_BT: jax.Array, entropy: bool = False
) -> jax.Array:
    """Negative log likelihood and doubt [B, T, 2] in float32 of every column."""

    @jax.checkpoint
    def chunk(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        return nll_and_doubt(model.logits(pair[0]), pair[1], entropy)

    return in_chunks(chunk, (hidden_BTD, tokens_BT), chunk_size(model, *tokens_BT.shape))


def over_frozen_head(
    confidence: float, model: Model, hidden_BTD: jax.Array, batch: Weighed
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of masked columns, with a gradient for `hidden_BTD` alone, and of plain nll.

    Doubt counts `confidence` times.
    """

    def sums(logits: jax.Array, masked: jax.Array, targets: jax.Array, weights: jax.Array):
        nll, doubt = jnp.unstack(nll_and_doubt(logits, targets, confidence > 0), axis=-1)
        # Where nothing is masked, nll may be anything: it must not turn a product into nan.
        each = nll * weights + confidence * doubt if confidence else nll * weights
        return jnp.sum(jnp.where(masked, each, 0.0)), jnp.sum(jnp.where(masked, nll, 0.0))

    return summed(model, hidden_BTD, batch.masked, (batch.targets, batch.weights), sums)


def from_teacher(
    model: Model, hidden_BTD: jax.Array, taught_BTD: jax.Array, masked_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum over masked columns of KL(teacher || student), twice; the student has a gradient.

    Both are hidden states in front of one frozen head.
    """

    def sums(logits: jax.Array, masked: jax.Array, taught: jax.Array):
        given, found = jax.nn.log_softmax(model.logits(taught)), jax.nn.log_softmax(logits)
        apart = jnp.sum(jnp.exp(given) * (given - found), axis=-1)
        total = jnp.sum(jnp.where(masked, apart, 0.0))
        return total, total

    model = dataclasses.replace(model, adapter=None)
    return summed(model, hidden_BTD, masked_BT, (jax.lax.stop_gradient(taught_BTD),), sums)


type Sums = Callable[..., tuple[jax.Array, jax.Array]]
"""From logits, what is masked and facts of some columns to what counts and what is only told."""


def summed(
    model: Model, hidden_BTD: jax.Array, masked_BT: jax.Array, facts: tuple, sums: Sums
) -> tuple[jax.Array, jax.Array]:
    """Both `sums` over all columns; the first has a gradient, for `hidden_BTD` alone.

    The masked columns of every row are moved to its front: chunks behind the last of them are not
    computed. What goes back from the logits is rounded to the compute dtype, so that its product
    with the head is one of that dtype.
    """
    model = dataclasses.replace(model, adapter=None)  # factors have no part in the head

    @jax.custom_vjp
    def total_and_plain(hidden_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return swept(model, hidden_BTD, masked_BT, facts, sums, False)[0]

    def forward(hidden_BTD: jax.Array):
        return swept(model, hidden_BTD, masked_BT, facts, sums, True)

    def backward(slope_BTD: jax.Array, change: tuple[jax.Array, jax.Array]):
        return ((slope_BTD * change[0]).astype(slope_BTD.dtype),)

    total_and_plain.defvjp(forward, backward)
    total, plain = total_and_plain(hidden_BTD)
    return total, jax.lax.stop_gradient(plain)


def swept(
    model: Model, hidden_BTD: jax.Array, masked_BT: jax.Array, facts: tuple, sums: Sums, slope: bool
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Both sums of `summed`, and the slope of the first [B, T, D], a zero unless asked for."""
    (B, T), kind = masked_BT.shape, hidden_BTD.dtype
    size = chunk_size(model, B, T)
    order_BT = jnp.argsort(~masked_BT, axis=1, stable=True)

    def sorted_columns(x: jax.Array) -> jax.Array:
        places = order_BT.reshape(B, T, *[1] * (x.ndim - 2))
        padding = [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(jnp.take_along_axis(x, places, axis=1), padding)

    hidden, *rest = (sorted_columns(x) for x in (hidden_BTD, masked_BT, *facts))

    def chunk(number: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
        total, plain, slopes = carry
        own, *others = (
            jax.lax.dynamic_slice_in_dim(x, number * size, size, 1) for x in (hidden, *rest)
        )
        loss = jax.value_and_grad(sums, has_aux=True)
        (one, two), change = loss(model.logits(own), *others)
        if slope:
            _, pull = jax.vjp(lambda h: model.logits(h, None), own)
            (back,) = pull(change.astype(kind))
            slopes = jax.lax.dynamic_update_slice_in_dim(slopes, back, number * size, 1)
        return total + one, plain + two, slopes

    chunks = -(-jnp.max(jnp.sum(masked_BT, axis=1)) // size)
    zeros = (jnp.zeros(()), jnp.zeros(()), jnp.zeros_like(hidden) if slope else jnp.zeros(()))
    total, plain, slopes = jax.lax.fori_loop(0, chunks, chunk, zeros)
    if slope:
        places_BT1 = jnp.argsort(order_BT, axis=1)[..., None]
        slopes = jnp.take_along_axis(slopes, places_BT1, axis=1)
    return (total, plain), slopes
