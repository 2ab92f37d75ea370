"""Objectives as data, and the parts that they are composed of: pure functions of arrays.

An objective says how noisy a response becomes, how much each prediction counts, by what the sum
is divided, and what a column sees. The rows of OBJECTIVES are those of the families, whose sources
docs/objectives.md names. `corrupt` makes the batch that is fed, `losses` reads what comes back.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jdllm.model.config import ModelConfig
from jdllm.model.mask import Mask
from jdllm.model.model import Model
from jdllm.model.transformer import Remat
from jdllm.train.entropy import cross_entropy, from_teacher, over_frozen_head

T_MIN = 1e-3  # the smallest masking probability, so that 1/t stays finite
# What is drawn per document or block; columns draw by position.
LEVEL, DROPOUT, SIGHT, BLOCKS = 2**31 - 1, 2**31 - 2, 2**31 - 3, 2**31 - 4
HIDDEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Canvases: one example per row and maybe hidden columns at the end, or several examples."""

    tokens: jax.Array
    """int32 [..., B, T]."""
    learned: jax.Array
    """bool [..., B, T]: the columns that may be masked and carry loss; others are context."""
    example: jax.Array
    """int32 [..., B, T]: the number of the example that a column belongs to; HIDDEN of none."""
    visit: jax.Array
    """int32 [..., B]: how often these examples were seen before. Noise depends on both."""
    packed: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether a row may hold several examples, which do not see each other."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noisy:
    """A corrupted batch: what is fed, and how much each prediction counts."""

    tokens: jax.Array
    """int32 [B, T], masked columns as the mask id."""
    targets: jax.Array
    masked: jax.Array
    """bool [B, T]."""
    weights: jax.Array
    """float32 [B, T]: the factor of a column's loss, 0 where nothing is masked."""
    counts: jax.Array
    """float32 [B, T]: what a column adds to the divisor."""
    example: jax.Array
    dropout: jax.Array
    """A key per row [B]."""
    packed: bool = dataclasses.field(default=False, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a model learns to do; static under jit."""

    low: float = T_MIN
    high: float = 1.0
    """Every document draws its probability t of masking a column uniformly from [low, high)."""
    weight: Literal["inverse", "flat", "cart"] = "inverse"
    """The factor of a masked column's nll, by name in WEIGHTS."""
    divisor: Literal["response", "masked", "example"] = "response"
    """What the sum is divided by, by name in DIVISORS."""
    sees: Literal["own", "full", "two_stream"] = "own"
    """The model's own mask, everything, or its own blocks noisy and the earlier ones clean."""
    complementary: bool = False
    """Feed every row twice, the second time with the other response columns masked."""
    confidence: float = 0.0
    """LLaDA2.0's CAP: this times the entropy of masked columns whose best token is right."""
    cart: float = 0.1
    """The p of CART's geometric distribution."""
    cutoff: bool = False
    """Dream's: all responses of a batch end where that of one random row ends (data, not loss)."""
    levels: Literal["document", "block"] = "document"
    """What has a t of its own."""
    block: int = 1
    """Columns of a block, where they have levels of their own; `choose` sets the model's."""
    teacher: bool = False
    """The base model, which is shown the response but for its gaps (columns that are masks in the
    text), teaches the adapted one, which is shown nothing of it, what stands in the gaps."""
    anneal: int = 0
    """Updates in which a model that was causal comes to see later columns, more with each."""

    def __post_init__(self):
        if not 0 < self.low < self.high <= 1:
            raise ValueError(
                f"noise levels from {self.low} to {self.high} must rise within (0, 1]; "
                "set loss.low and loss.high"
            )
        if self.anneal < 0:
            raise ValueError(f"adapt.anneal={self.anneal} must be 0 (off) or a number of updates")
        if self.anneal and self.sees == "two_stream":
            raise ValueError(
                "adapt.anneal= is for adapt.sees=full: two streams have a mask of their own"
            )
        if self.teacher and (self.complementary or self.confidence or self.sees == "two_stream"):
            raise ValueError(
                "objective=distil masks all of a response: leave out loss.complementary and "
                "loss.confidence"
            )
        if not 0 < self.cart < 1:
            raise ValueError(f"loss.cart={self.cart} must be between 0 and 1")
        if not 0 <= self.confidence < float("inf"):
            raise ValueError(
                f"loss.confidence={self.confidence} must be 0 (off) or a number above it"
            )


OBJECTIVES: dict[str, Objective] = {
    # LLaDA's sum as d1, EDIT and NeMo divide it
    "llada": Objective(),
    # LLaDA's own guidelines: every example counts alike, however long its answer
    "llada-examples": Objective(divisor="example"),
    # Dream-Coder's trainer; the shift is a fact of the model
    "dream": Objective(weight="cart", divisor="masked", cutoff=True),
    # the makers' trainer of LLaDA2 (dFactory)
    "llada2": Objective(low=0.3, high=0.8, weight="flat", divisor="masked", sees="two_stream"),
    # NeMo's LLaDA2: plain masked diffusion, every column sees every other
    "llada2-plain": Objective(sees="full"),
    # block diffusion as BD3LM weights it
    "blocks": Objective(sees="two_stream"),
    # Fast-dLLM v2's: every block has its own level, every column is learned from once
    "fast-dllm-v2": Objective(
        weight="flat", divisor="masked", sees="two_stream", complementary=True, levels="block"
    ),
    # d1's self-distillation: reasoning that leads to an answer which only the teacher sees
    "distil": Objective(low=0.999, weight="flat", divisor="masked", teacher=True),
}


def choose(name: str, config: ModelConfig) -> Objective:
    """The objective of that name; auto is that of the model's kind. ValueError for a misfit."""
    if config.causal:
        raise ValueError(
            "a causal model has no mask to predict at: name a diffusion model, or make one of it "
            "with adapt.sees="
        )
    if name == "auto":
        name = "llada2" if config.block_causal else "dream" if config.shift_logits else "llada"
    found = OBJECTIVES[name]
    if found.sees == "two_stream" and config.block_causal is None:
        fitting = ", ".join(k for k, other in OBJECTIVES.items() if other.sees != "two_stream")
        raise ValueError(
            f"objective={name} needs a model that attends block by block; this one can have "
            f"{fitting}"
        )
    if found.levels == "block":
        found = dataclasses.replace(found, block=config.block_causal)
    return found


# Columns of documents


def starts(example_BT: jax.Array) -> jax.Array:
    """int32 [B, T]: the column where the document of a column begins."""
    columns = jnp.arange(example_BT.shape[1])
    first_BT = jnp.diff(example_BT, axis=1, prepend=HIDDEN - 1) != 0
    return jax.lax.cummax(jnp.where(first_BT, columns, 0), axis=1)


def document_sums(x_BT: jax.Array, start_BT: jax.Array) -> jax.Array:
    """The sum over a column's document, in every column [B, T]."""
    rows_B1 = jnp.arange(len(x_BT))[:, None]
    return jnp.zeros_like(x_BT).at[rows_B1, start_BT].add(x_BT)[rows_B1, start_BT]


def draws(
    key: jax.Array, batch: Batch, block: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Uniform numbers [B, T] of a column's document and of the column itself, and keys per row.

    With `block` the first are of a column's block in its document.

    They are functions of the key, the example's number, its visits and the position within it: of
    nothing that another accumulation, mesh, batch size or packing would change.
    """

    def of(visit: jax.Array, example: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, visit), example)

    column = jax.vmap(lambda key, number: jax.random.uniform(jax.random.fold_in(key, number)))
    key_BT = jax.vmap(jax.vmap(of, (None, 0)))(batch.visit, batch.example)
    position_BT = jnp.arange(batch.tokens.shape[1]) - starts(batch.example)
    number_BT = jnp.full_like(position_BT, LEVEL)
    number_BT = number_BT if block is None else BLOCKS - position_BT // block
    level_BT = jax.vmap(column)(key_BT, number_BT)
    dropout_B = jax.vmap(jax.random.fold_in, (0, None))(key_BT[:, 0], DROPOUT)
    return level_BT, jax.vmap(column)(key_BT, position_BT), dropout_B


# The factor of a masked column


def inverse(_: Objective, masked_BT: jax.Array, t_BT: jax.Array, start_BT: jax.Array) -> jax.Array:
    """1/t: the sum is then a bound on the likelihood."""
    return 1 / t_BT


def flat(_: Objective, masked_BT: jax.Array, t_BT: jax.Array, start_BT: jax.Array) -> jax.Array:
    """1, whatever the noise."""
    return jnp.ones_like(t_BT)


def cart(
    objective: Objective, masked_BT: jax.Array, t_BT: jax.Array, start_BT: jax.Array
) -> jax.Array:
    """CART: half the sum of p (1-p)^(distance-1) over the document's columns that are not masked.

    So a column counts by how much of its neighbourhood there is to see.
    """
    columns, last = jnp.arange(masked_BT.shape[1]), masked_BT.shape[1] - 1
    first_BT = columns == start_BT
    final_BT = jnp.roll(first_BT, -1, axis=1) | (columns == last)

    def decayed(seen_BT: jax.Array, edge_BT: jax.Array, reverse: bool) -> jax.Array:
        """What the columns before (after) add: S of the next is (1-p) S + p seen, 0 at an edge."""
        keep_BT = jnp.where(edge_BT, 0.0, 1 - objective.cart)
        gain_BT = jnp.roll(objective.cart * seen_BT, -1 if reverse else 1, axis=1)
        gain_BT = jnp.where(edge_BT, 0.0, gain_BT)

        def step(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]):
            return a[0] * b[0], a[1] * b[0] + b[1]

        return jax.lax.associative_scan(step, (keep_BT, gain_BT), reverse=reverse, axis=1)[1]

    seen_BT = (~masked_BT).astype(jnp.float32)
    return (decayed(seen_BT, first_BT, False) + decayed(seen_BT, final_BT, True)) / 2


WEIGHTS: dict[str, Callable[[Objective, jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "inverse": inverse,
    "flat": flat,
    "cart": cart,
}


# What a column adds to the divisor


def response(learned_BT: jax.Array, masked_BT: jax.Array, start_BT: jax.Array) -> jax.Array:
    """Every response column counts, masked or not, padding included."""
    return learned_BT.astype(jnp.float32)


def masked(learned_BT: jax.Array, masked_BT: jax.Array, start_BT: jax.Array) -> jax.Array:
    """Masked columns count."""
    return masked_BT.astype(jnp.float32)


def example(learned_BT: jax.Array, masked_BT: jax.Array, start_BT: jax.Array) -> jax.Array:
    """Examples count: a column is its share of its document's response."""
    learned_BT = learned_BT.astype(jnp.float32)
    return learned_BT / jnp.maximum(document_sums(learned_BT, start_BT), 1)


DIVISORS = {"response": response, "masked": masked, "example": example}


# Noise, prediction, loss


def corrupt(
    objective: Objective,
    key: jax.Array,
    batch: Batch,
    mask_id: int,
    level: jax.Array | float | None = None,
) -> Noisy:
    """Masks response columns, each with the probability t of its document or block.

    t = low + (high - low) u with u uniform, or `level` where the caller fixes it. With
    `complementary` rows become pairs of rows.
    """
    if objective.teacher:
        return all_masked(batch, draws(key, batch)[2], mask_id)
    block = objective.block if objective.levels == "block" else None
    u_BT, hit_BT, dropout_B = draws(key, batch, block)
    t_BT = objective.low + (objective.high - objective.low) * u_BT
    t_BT = t_BT if level is None else jnp.broadcast_to(jnp.float32(level), u_BT.shape)
    masked_BT = (hit_BT < t_BT) & batch.learned
    if not objective.complementary:
        return noisy(objective, batch, masked_BT, t_BT, dropout_B, mask_id)
    pairs = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), (batch, masked_BT, t_BT, dropout_B))
    batch, masked_BT, t_BT, dropout_B = pairs
    other_B1 = (jnp.arange(len(t_BT)) % 2 == 1)[:, None]
    masked_BT = jnp.where(other_B1, batch.learned & ~masked_BT, masked_BT)
    t_BT = jnp.where(other_B1, jnp.maximum(1 - t_BT, T_MIN), t_BT)
    return noisy(objective, batch, masked_BT, t_BT, dropout_B, mask_id)


def all_masked(batch: Batch, dropout_B: jax.Array, mask_id: int) -> Noisy:
    """The batch without its responses; what counts is their gaps."""
    gap_BT = batch.learned & (batch.tokens == mask_id)
    tokens_BT, ones_BT = jnp.where(batch.learned, mask_id, batch.tokens), gap_BT.astype(jnp.float32)
    return Noisy(
        tokens_BT, batch.tokens, gap_BT, ones_BT, ones_BT, batch.example, dropout_B, batch.packed
    )


def noisy(
    objective: Objective,
    batch: Batch,
    masked_BT: jax.Array,
    t_BT: jax.Array,
    dropout_B: jax.Array,
    mask_id: int,
) -> Noisy:
    """The batch with these columns masked, weighed as the objective says."""
    start_BT = starts(batch.example)
    weights_BT = WEIGHTS[objective.weight](objective, masked_BT, t_BT, start_BT)
    counts_BT = DIVISORS[objective.divisor](batch.learned, masked_BT, start_BT)
    if objective.divisor == "example":
        weights_BT *= counts_BT
    tokens_BT = jnp.where(masked_BT, mask_id, batch.tokens)
    return Noisy(
        tokens_BT, batch.tokens, masked_BT, jnp.where(masked_BT, weights_BT, 0.0), counts_BT,
        batch.example, dropout_B, batch.packed,
    )  # fmt: skip


def peeked(batch: Noisy, share: jax.Array) -> jax.Array:
    """bool [B, T, T]: which keys a column sees besides earlier ones, each with this probability."""
    T = batch.tokens.shape[1]

    def row(key: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, SIGHT), (T, T)) < share

    return jax.vmap(row)(batch.dropout)


def predict(
    objective: Objective,
    model: Model,
    batch: Noisy,
    remat: Remat = "none",
    step: jax.Array | None = None,
) -> jax.Array:
    """Hidden states [B, T, D] from which a column's own token is predicted.

    `step` is the number of updates done, where sight is annealed; without it all is seen.
    """
    T = batch.tokens.shape[1]
    positions_BT = jnp.arange(T) - starts(batch.example)
    tokens_BT, place_BT, example_BT = batch.tokens, positions_BT, batch.example
    visible = jnp.sum(example_BT != HIDDEN, axis=1)
    if objective.sees == "two_stream":
        tokens_BT = jnp.concatenate([tokens_BT, batch.targets], axis=1)
        place_BT, example_BT = (jnp.tile(x, 2) for x in (place_BT, example_BT))
        size = model.config.block_causal or 1
        mask = Mask(example_BT != HIDDEN, kind="two_stream", size=size)
    else:
        mask = Mask(visible) if objective.sees == "full" else Mask.of(model.config, visible)
    if objective.anneal and step is not None:
        also = peeked(batch, step / objective.anneal)
        mask = dataclasses.replace(mask, kind="causal", also=also)
    if batch.packed:
        mask = dataclasses.replace(mask, documents=example_BT)
    hidden_BTD = model(model.embed(tokens_BT), place_BT, mask, remat=remat).hidden[:, :T]
    if not model.config.shift_logits:
        return hidden_BTD
    before_BTD = jnp.concatenate([hidden_BTD[:, :1], hidden_BTD[:, :-1]], axis=1)
    return jnp.where((positions_BT > 0)[..., None], before_BTD, hidden_BTD)


def losses(
    objective: Objective,
    model: Model,
    batch: Noisy,
    remat: Remat = "none",
    step: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum over a micro-batch, not divided yet, and its plain sum of masked nll."""
    hidden_BTD = predict(objective, model, batch, remat, step)
    if objective.teacher:
        shown = dataclasses.replace(batch, tokens=batch.targets)
        teacher = dataclasses.replace(model, adapter=None)
        taught_BTD = predict(objective, teacher, shown, remat)
        return from_teacher(model, hidden_BTD, taught_BTD, batch.masked)
    if model.adapter is not None:
        return over_frozen_head(objective.confidence, model, hidden_BTD, batch)
    found_BT2 = cross_entropy(model, hidden_BTD, batch.targets, objective.confidence > 0)
    nll_BT, doubt_BT = found_BT2[..., 0], found_BT2[..., 1]
    plain = jnp.sum(jnp.where(batch.masked, nll_BT, 0.0))
    # Where nothing is masked, nll may be anything: it must not turn a product into nan.
    total = jnp.sum(jnp.where(batch.masked, nll_BT * batch.weights, 0.0))
    if objective.confidence:
        total += objective.confidence * jnp.sum(jnp.where(batch.masked, doubt_BT, 0.0))
    return total, plain
