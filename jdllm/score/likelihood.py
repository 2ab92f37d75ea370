"""Log-likelihoods under masked diffusion: mask columns, score what was there, weight, average.

A row is one canvas with one set of masks. Its loss is one sample of a bound, or one term of an
exact chain. The caller knows which rows belong to one text, and takes their mean.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jdllm.model.columns import guide, in_chunks
from jdllm.model.mask import Mask
from jdllm.model.model import Model
from jdllm.runtime.fields import check_fields

CHUNK = 32  # columns whose logits are held at a time


@dataclasses.dataclass(frozen=True)
class LikelihoodConfig:
    """The settings of an estimate of log p(target | prefix)."""

    estimator: Literal["auto", "counts", "bernoulli", "chain", "chain_backward"] = "auto"
    """counts: LLaDA's, exact mask counts. bernoulli: Dream's. chain: exact, one row per token."""
    region: Literal["target", "prefix", "union"] = "target"
    """What is masked and scored (Dream's ftb, btf, union; the last is a mean over the columns)."""
    mc_num: int = 128
    """counts, bernoulli: samples per text, a multiple of `mc_batch`."""
    mc_batch: int = 32
    """Samples whose mask ratios are spread evenly from one random start."""
    cfg_scale: float = 0.0
    """Weight of classifier-free guidance, whose second half masks the given part; 0 means off."""
    is_check_greedy: bool = False
    """Decode the target one token at a time as well, to say whether it is the greedy one."""
    eps: float = 1e-3
    """bernoulli: the least mask ratio."""
    seed: int = 0

    def __post_init__(self):
        check_fields(self)
        if self.mc_num < 1 or self.mc_batch < 1 or self.cfg_scale < 0 or not 0 < self.eps < 1:
            raise ValueError("mc_num and mc_batch count from 1, cfg_scale from 0, eps is in (0, 1)")
        if self.mc_num % min(self.mc_batch, self.mc_num):
            raise ValueError(
                f"mc_num={self.mc_num} must be a multiple of mc_batch={self.mc_batch}, or less"
            )
        if self.estimator == "counts" and self.region == "union":
            raise ValueError("region=union belongs to estimator=bernoulli")

    @property
    def strata(self) -> int:
        """Returns the number of samples per round."""
        return min(self.mc_batch, self.mc_num)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Canvas:
    """Rows without masks: prefix, target, what follows it, padding."""

    tokens: jax.Array
    """int32 [B, T]."""
    length: jax.Array
    """int32 [B]: columns before the padding."""
    start: jax.Array
    """int32 [B]: the first column that may be masked and scored."""
    end: jax.Array
    """int32 [B]: the column after the last one that may."""

    def inside(self) -> jax.Array:
        """Returns the columns that may be masked, bool [B, T]."""
        columns_T = jnp.arange(self.tokens.shape[1])
        return (columns_T >= self.start[:, None]) & (columns_T < self.end[:, None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """The columns that each row hides, and the weight of its loss."""

    hidden: jax.Array
    """bool [B, T]: columns shown as masks."""
    scored: jax.Array
    """bool [B, T]: those of them that are scored."""
    ratio: jax.Array
    """float32 [B]: probability that a column is hidden; the loss is divided by it."""


def _uniform(keys_B: jax.Array, start_B: jax.Array, width: int) -> jax.Array:
    """Returns a draw per column [B, T], which depends only on its distance from `start`."""
    draws_BT = jax.vmap(lambda key: jax.random.uniform(key, (width,)))(keys_B)
    columns_BT = (jnp.arange(width) - start_B[:, None]) % width
    return jnp.take_along_axis(draws_BT, columns_BT, axis=1)


def spread(first_B: jax.Array, sample_B: jax.Array, strata: int, length_B: jax.Array) -> jax.Array:
    """Returns LLaDA's mask counts [B]: round(first + sample * length / strata), in 1..length.

    Larger counts wrap around. Halves round to even. Integers avoid rounding errors in products.
    """
    whole_B, rest_B = jnp.divmod(sample_B * length_B, strata)
    low_B = first_B + whole_B
    up_B = (2 * rest_B > strata) | ((2 * rest_B == strata) & (low_B % 2 == 1))
    return (low_B + up_B - 1) % length_B + 1


@partial(jax.jit, static_argnames=("config",))
def draw(
    canvas: Canvas, rounds_B: jax.Array, sample_B: jax.Array, config: LikelihoodConfig
) -> Masks:
    """Returns the masks of each row, for sample `sample_B` of the round with key `rounds_B`.

    counts (LLaDA's eval): every round draws a start in 1..length; sample j hides exactly as many
    columns as `spread` says, at random. bernoulli (Dream's): sample j hides each column with
    probability (1 - eps) t + eps, t = (u + j/strata) mod 1, but never the canvas's first or last
    column. chain: sample j hides column j and all after it (chain_backward: before it) and scores
    only column j.
    """
    B, T = canvas.tokens.shape
    inside_BT, length_B = canvas.inside(), canvas.end - canvas.start
    if config.estimator in ("chain", "chain_backward"):
        offset_BT = jnp.arange(T) - canvas.start[:, None]
        at_B1 = sample_B[:, None]
        later_BT = offset_BT >= at_B1 if config.estimator == "chain" else offset_BT <= at_B1
        return Masks(inside_BT & later_BT, inside_BT & (offset_BT == at_B1), jnp.ones(B))
    first_B = jax.vmap(jax.random.uniform)(rounds_B)
    keys_B = jax.vmap(lambda key, j: jax.random.fold_in(key, j + 1))(rounds_B, sample_B)
    chance_BT = _uniform(keys_B, canvas.start, T)
    if config.estimator == "counts":
        k_B = 1 + jnp.minimum((first_B * length_B).astype(jnp.int32), length_B - 1)
        count_B = spread(k_B, sample_B, config.strata, length_B)
        order_BT = jnp.argsort(jnp.where(inside_BT, chance_BT, 2.0), axis=1)
        rank_BT = jnp.argsort(order_BT, axis=1)
        hidden_BT = inside_BT & (rank_BT < count_B[:, None])
        ratio_B = count_B / length_B
    else:
        time_B = (first_B + sample_B / config.strata) % 1
        ratio_B = (1 - config.eps) * time_B + config.eps
        columns_T = jnp.arange(T)
        free_BT = (columns_T > 0) & (columns_T < canvas.length[:, None] - 1)
        hidden_BT = inside_BT & free_BT & (chance_BT < ratio_B[:, None])
    return Masks(hidden_BT, hidden_BT, ratio_B.astype(jnp.float32))


@partial(jax.jit, static_argnames=("width", "scale"))
def losses(
    model: Model,
    canvas: Canvas,
    masks: Masks,
    width: int,
    scale: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Loss of each row [B], and cross entropy by column from `start` on [B, width], 0 if unscored.

    The loss is the sum of the scored columns' cross entropy over the row's ratio, in float32.
    `width` covers the scored columns. With `scale` guidance is applied as in decoding, everything
    outside of start..end masked out in the unconditional half. Logits are shifted where the
    model's config says so: row t predicts column t + 1, and row 0 column 0 as well.
    """
    columns_BW = canvas.start[:, None] + jnp.arange(width)
    at_BW = jnp.minimum(columns_BW, canvas.tokens.shape[1] - 1)
    shown_BT = jnp.where(masks.hidden, model.config.mask_id, canvas.tokens)
    hidden = _hidden(model, canvas, shown_BT, at_BW, scale)
    wanted_BW = jnp.take_along_axis(canvas.tokens, at_BW, axis=1)

    def chunk(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BCRD, wanted_BC = part
        logits_BCV = _logits(model, hidden_BCRD, scale)
        chosen_BC = jnp.take_along_axis(logits_BCV, wanted_BC[..., None], axis=2)[..., 0]
        return jax.nn.logsumexp(logits_BCV, axis=2) - chosen_BC

    entropy_BW = in_chunks(chunk, (hidden, wanted_BW), min(CHUNK, width))
    scored_BW = jnp.take_along_axis(masks.scored, at_BW, axis=1) & (columns_BW == at_BW)
    entropy_BW = jnp.where(scored_BW, entropy_BW, 0.0)
    return jnp.sum(entropy_BW, axis=1) / masks.ratio, entropy_BW


@partial(jax.jit, static_argnames=("width", "scale"))
def is_greedy(model: Model, canvas: Canvas, width: int, scale: float = 0.0) -> jax.Array:
    """Returns whether the target is what the model decodes, most confident token first [B].

    LLaDA's check: everything from start to end is masked; then every call fills the position of
    highest probability (the leftmost of equals). A row fails at its first wrong token.
    """
    mask_id = model.config.mask_id
    columns_BW = canvas.start[:, None] + jnp.arange(width)
    at_BW = jnp.minimum(columns_BW, canvas.tokens.shape[1] - 1)
    wanted_BW = jnp.take_along_axis(canvas.tokens, at_BW, axis=1)

    def best(part: tuple[jax.Array]) -> jax.Array:
        logits_BCV = _logits(model, part[0], scale)
        top_BC = jnp.max(logits_BCV, axis=2)
        doubt_BC = jax.nn.logsumexp(logits_BCV, axis=2) - top_BC
        return jnp.stack([jnp.argmax(logits_BCV, axis=2).astype(jnp.float32), doubt_BC], axis=-1)

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        open_BW, right_B = state
        hidden_BT = jnp.zeros(canvas.tokens.shape, bool)
        hidden_BT = jax.vmap(lambda row, at, on: row.at[at].max(on))(hidden_BT, at_BW, open_BW)
        shown_BT = jnp.where(hidden_BT, mask_id, canvas.tokens)
        hidden = _hidden(model, canvas, shown_BT, at_BW, scale)
        found_BW2 = in_chunks(best, (hidden,), min(CHUNK, width))
        doubt_BW = jnp.where(open_BW, found_BW2[..., 1], jnp.inf)
        pick_BW = jnp.arange(width) == jnp.argmin(doubt_BW, axis=1)[:, None]
        good_B = jnp.any(pick_BW & (found_BW2[..., 0] == wanted_BW), axis=1)
        right_B &= good_B | ~jnp.any(open_BW, axis=1)
        return open_BW & ~pick_BW & right_B[:, None], right_B

    start = (columns_BW < canvas.end[:, None], jnp.ones(canvas.tokens.shape[0], bool))
    return jax.lax.while_loop(lambda state: jnp.any(state[0]), step, start)[1]


def _hidden(
    model: Model, canvas: Canvas, shown_BT: jax.Array, at_BW: jax.Array, scale: float
) -> jax.Array:
    """Hidden states [B, W, R, D] that predict columns `at_BW`; R is 2 under guidance, else 1."""
    B, T = shown_BT.shape
    columns_T = jnp.arange(T)
    variants = [shown_BT]
    if scale:
        variants.append(jnp.where(canvas.inside(), shown_BT, model.config.mask_id))
    R = len(variants)
    tokens = jnp.stack(variants, axis=1).reshape(B * R, T)
    mask = Mask.of(model.config, jnp.repeat(canvas.length, R, axis=0))
    columns = jnp.broadcast_to(columns_T, tokens.shape)
    states = model(model.embed(tokens), columns, mask).hidden
    from_BW = jnp.maximum(at_BW - 1, 0) if model.config.shift_logits else at_BW
    rows = jnp.take_along_axis(states, jnp.repeat(from_BW, R, axis=0)[..., None], axis=1)
    return rows.reshape(B, R, *rows.shape[1:]).swapaxes(1, 2)


def _logits(model: Model, hidden_BCRD: jax.Array, scale: float) -> jax.Array:
    """Returns logits [B, C, V], guided where there are two states per column."""
    B, C, R, D = hidden_BCRD.shape
    logits = model.logits(hidden_BCRD.reshape(B, C * R, D)).reshape(B, C, R, -1)
    if R == 1:
        return logits[:, :, 0]
    return guide(logits[:, :, 0], logits[:, :, 1], scale)
