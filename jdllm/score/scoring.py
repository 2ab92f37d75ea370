"""Scores texts: pairs of ids become rows, rows become batches, and losses become means.

score([(prefix, target), ...], LikelihoodConfig(mc_num=128), model)
"""

import dataclasses
import math
import statistics
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jdllm.batches import bucket
from jdllm.model.config import NO_ID, ModelConfig
from jdllm.model.model import Model
from jdllm.runtime import sharding
from jdllm.score.likelihood import Canvas, LikelihoodConfig, draw, is_greedy, losses

Ids = Sequence[int]
CHAINS = ("chain", "chain_backward")


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """The score of one target."""

    value: float
    """Log-probability in nats: an estimate of a lower bound, or exact with a chain."""
    stderr: float | None
    """Its standard error over the random masks; 0 where it is exact, None after one sample.

    It comes from the spread of the rounds. With one round it comes from the spread of the samples,
    whose mask ratios are evenly spread: then it is an upper bound.
    """
    is_greedy: bool
    """Whether greedy decoding gives this target; False where that was not checked."""
    calls: int = 0
    """Model evaluations of one row each; those of the greedy check do not count."""
    seconds: float = dataclasses.field(default=0.0, compare=False)
    """Its rows' shares of the time of their batches, the first compilation included."""

    def __add__(self, other: "Likelihood") -> "Likelihood":
        """Returns the score of both texts, which were drawn independently."""
        known = self.stderr is not None and other.stderr is not None
        stderr = math.hypot(self.stderr or 0.0, other.stderr or 0.0) if known else None
        return Likelihood(
            self.value + other.value, stderr, self.is_greedy and other.is_greedy,
            self.calls + other.calls, self.seconds + other.seconds,
        )  # fmt: skip


def certainty(scores: Sequence[Likelihood]) -> dict[str, float | None]:
    """Returns the number of scores, their mean and largest standard error, and cost; or {}."""
    if not scores:
        return {}
    known = [score.stderr for score in scores if score.stderr is not None]
    mean = statistics.fmean(known) if known else None
    return {
        "n": len(scores),
        "stderr_mean": mean,
        "stderr_max": max(known, default=None),
        "calls": sum(score.calls for score in scores),
        "seconds": math.fsum(score.seconds for score in scores),
    }


@dataclasses.dataclass(frozen=True)
class Part:
    """One term of a pair's score: a canvas and which of its columns are scored."""

    tokens: list[int]
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch: one sample of a part."""

    pair: int
    part: int
    seed: int
    round: int
    sample: int


def resolve(config: LikelihoodConfig, model: ModelConfig) -> LikelihoodConfig:
    """Returns `config` with the estimator that the model's own evaluation uses.

    It is counts for models like LLaDA, bernoulli for models with shifted logits (Dream). A model
    that attends block by block is scored block by block, each after its unmasked past: that needs
    counts or chain, and region=target. Raises ValueError where the model has no estimator.
    """
    if model.causal or model.mask_id == NO_ID:
        raise ValueError("a causal model has no masks to score; its likelihood is a plain forward")
    if config.estimator == "auto":
        estimator = "bernoulli" if model.shift_logits else "counts"
        config = dataclasses.replace(config, estimator=estimator)
    whole = config.estimator in ("counts", "chain") and config.region == "target"
    if model.block_causal is not None and not (whole and not config.cfg_scale):
        raise ValueError(
            f"the model attends block by block (block_causal={model.block_causal}): score it with "
            "estimator=counts or chain, region=target and cfg_scale=0"
        )
    return config


def parts(prefix: Ids, target: Ids, config: LikelihoodConfig, model: ModelConfig) -> list[Part]:
    """Returns the canvases whose scores add up to the pair's.

    It is one canvas, but a block-causal model gets one per block that the target touches, cut
    after that block's part of it. As in Dream's harness, the bernoulli estimator, and a chain over
    shifted logits, score an eos after the target. A prefix that does not fit loses its left end.
    Raises ValueError where the target is empty or does not fit.
    """
    target = list(target)
    if not target:
        raise ValueError("an empty target has no likelihood: give at least one token")
    if config.estimator == "bernoulli" or model.shift_logits:
        target.append(model.eos_id)
    room = model.max_length - len(target)
    if room < 0:
        raise ValueError(
            f"a target of {len(target)} tokens exceeds the model's {model.max_length} columns"
        )
    prefix = list(prefix)[max(len(prefix) - room, 0) :]
    tokens, first, end = [*prefix, *target], len(prefix), len(prefix) + len(target)
    if config.region == "prefix":
        first, end = 0, first
    elif config.region == "union":
        first = 0
    if first == end:
        raise ValueError("region=prefix needs a prefix")
    block = model.block_causal
    if block is None:
        return [Part(tokens, first, end)]
    cuts = [first, *range((first // block + 1) * block, end, block), end]
    return [Part(tokens[:b], a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def samples(part: Part, config: LikelihoodConfig) -> list[tuple[int, int]]:
    """Returns the (round, sample) pairs of a part.

    A chain has one per token. A single masked token needs one, whose score is exact.
    """
    length = part.end - part.start
    if config.estimator in CHAINS:
        return [(0, i) for i in range(length)]
    if config.estimator == "counts" and length == 1:
        return [(0, 0)]
    return [divmod(i, config.strata) for i in range(config.mc_num)]


def seed_of(prefix: Ids, target: Ids) -> int:
    """Returns a seed from a pair's ids, so that its draws do not depend on other pairs."""
    return zlib.crc32(np.array([*prefix, -1, *target], np.int32).tobytes())


def combine(found: dict[tuple[int, int], float], config: LikelihoodConfig) -> tuple[float, float]:
    """Returns minus the mean loss of a part, and the variance of that mean (NaN: unknown).

    `found` holds the loss per round and sample.
    """
    values = list(found.values())
    if config.estimator in CHAINS:
        return -math.fsum(values), 0.0
    rounds: dict[int, list[float]] = defaultdict(list)
    for (number, _), loss in found.items():
        rounds[number].append(loss)
    means = [statistics.fmean(losses) for losses in rounds.values()]
    spread = means if len(means) > 1 else values
    variance = statistics.variance(spread) / len(spread) if len(spread) > 1 else math.nan
    return -statistics.fmean(values), variance


def score(
    pairs: Sequence[tuple[Ids, Ids]],
    config: LikelihoodConfig,
    model: Model,
    *,
    batch_size: int = 32,
    finished: Callable[[int, Likelihood], None] = lambda index, found: None,
) -> list[Likelihood]:
    """Returns log p(target | prefix) of every pair, in order.

    A pair's value does not depend on the other pairs. `finished` is called with each pair's index
    and score once it is complete. Raises ValueError where the model or a pair cannot be scored.
    """
    config = resolve(config, model.config)
    split = [parts(prefix, target, config, model.config) for prefix, target in pairs]
    rows = [
        Row(i, p, seed_of(*pairs[i]), number, sample)
        for i, pieces in enumerate(split)
        for p, part in enumerate(pieces)
        for number, sample in samples(part, config)
    ]
    calls = Counter(row.pair for row in rows)
    missing, spent = calls.copy(), dict.fromkeys(calls, 0.0)
    found: list[list[dict]] = [[{} for _ in pieces] for pieces in split]
    results: dict[int, Likelihood] = {}
    start = time.perf_counter()
    for chosen, values in _run(rows, split, config, model, batch_size):
        each = (time.perf_counter() - start) / len(chosen)
        for row, loss in zip(chosen, values, strict=True):
            found[row.pair][row.part][row.round, row.sample] = loss
            missing[row.pair] -= 1
            spent[row.pair] += each
            if missing[row.pair]:
                continue
            i = row.pair
            greedy = config.is_check_greedy and _greedy(*pairs[i], config, model)
            scored = _likelihood(found[i], split[i], config, greedy)
            results[i] = dataclasses.replace(scored, calls=calls[i], seconds=spent[i])
            finished(i, results[i])
        start = time.perf_counter()
    return [results[i] for i in range(len(pairs))]


def batch_count(
    pairs: Sequence[tuple[Ids, Ids]],
    config: LikelihoodConfig,
    model: ModelConfig,
    batch_size: int,
    replicas: int,
) -> int:
    """How many model calls `score` makes for pairs, those of the greedy check at most."""
    if not pairs:
        return 0
    config = resolve(config, model)
    rooms: Counter[tuple[int, int]] = Counter()
    for prefix, target in pairs:
        for part in parts(prefix, target, config, model):
            rooms[_room(part, model)] += len(samples(part, config))
    checked = sum(len(target) for _, target in pairs) if config.is_check_greedy else 0
    height = _height(batch_size, replicas)
    return sum(-(-rows // height) for rows in rooms.values()) + checked


def _height(batch_size: int, replicas: int) -> int:
    """Rows of a full batch, as many for each replica."""
    return max(batch_size // replicas, 1) * replicas


def _likelihood(
    found: list[dict], pieces: list[Part], config: LikelihoodConfig, greedy: bool
) -> Likelihood:
    """Returns the sum of a pair's parts; for region=union the mean over the canvas, as in Dream."""
    terms = [combine(losses, config) for losses in found]
    if config.estimator == "counts":  # one masked token has nothing random about it
        exact = [part.end - part.start == 1 for part in pieces]
        terms = [(v, 0.0 if one else var) for (v, var), one in zip(terms, exact, strict=True)]
    scale = 1 / len(pieces[0].tokens) if config.region == "union" else 1.0
    variance = math.fsum(variance for _, variance in terms)
    stderr = None if math.isnan(variance) else scale * math.sqrt(variance)
    return Likelihood(scale * math.fsum(value for value, _ in terms), stderr, greedy)


def _run(
    rows: list[Row],
    split: list[list[Part]],
    config: LikelihoodConfig,
    model: Model,
    batch_size: int,
) -> Iterator[tuple[list[Row], list[float]]]:
    """Yields rows and their losses, batch by batch; rows of equal padded sizes share a program."""
    rooms: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows:
        part = split[row.pair][row.part]
        rooms[_room(part, model.config)].append(row)
    replicas = model.mesh.shape["data"]
    height = _height(batch_size, replicas)
    base = jax.random.key(config.seed)
    for (room, width), members in sorted(rooms.items()):
        full = min(height, -(-len(members) // replicas) * replicas)  # one program per group
        for first in range(0, len(members), full):
            chosen = members[first : first + full]
            filled = [*chosen, *[chosen[-1]] * (full - len(chosen))]
            canvas = _canvas([split[r.pair][r.part] for r in filled], room, model)
            numbers = np.array([(r.seed, r.round, r.part, r.sample) for r in filled], np.uint32)
            keys = _fold(base, numbers[:, :3])
            sample_B = jax.device_put(numbers[:, 3].astype(np.int32), sharding.by_row(model.mesh))
            masks = draw(canvas, keys, sample_B, config)
            loss_B, _ = losses(model, canvas, masks, width, config.cfg_scale)
            yield chosen, np.asarray(loss_B, np.float64)[: len(chosen)].tolist()


def _room(part: Part, model: ModelConfig) -> tuple[int, int]:
    """Returns the canvas length and the width that a part's rows are padded to."""
    room = min(bucket(len(part.tokens)), model.max_length)
    return room, min(bucket(part.end - part.start), room)


@jax.jit
def _fold(base: jax.Array, numbers_B3: jax.Array) -> jax.Array:
    """Returns keys [B], each made of a base key and some numbers."""
    return jax.vmap(lambda n: jax.lax.fori_loop(
        0, n.shape[0], lambda i, key: jax.random.fold_in(key, n[i]), base
    ))(numbers_B3)  # fmt: skip


def _canvas(pieces: Sequence[Part], room: int, model: Model) -> Canvas:
    """Returns canvases of `room` columns, on the mesh."""
    tokens = np.full((len(pieces), room), model.config.pad_id, np.int32)
    for i, part in enumerate(pieces):
        tokens[i, : len(part.tokens)] = part.tokens
    facts = [[len(part.tokens), part.start, part.end] for part in pieces]
    columns = np.array(facts, np.int32).T
    return Canvas(*jax.device_put((tokens, *columns), sharding.by_row(model.mesh)))


def _greedy(prefix: Ids, target: Ids, config: LikelihoodConfig, model: Model) -> bool:
    """LLaDA's greedy check of a pair, on the model as it decodes: the target as one block."""
    plain = dataclasses.replace(config, estimator="counts", region="target")
    replicas = model.mesh.shape["data"]
    for part in parts(prefix, target, plain, model.config):
        canvas = _canvas([part] * replicas, _room(part, model.config)[0], model)
        width = _room(part, model.config)[1]
        right = is_greedy(model, canvas, width, config.cfg_scale)
        if not bool(right[0]):
            return False
    return True
