"""The plain twin of the decode loop in Python loops: one row at a time, float64 rules in numpy.

It shares only the config with the real loop: it has no batch, no padding and no jit, and a forward
pass, rules and stops of its own. It is slow and obvious, and defines what is right. It serves
greedy candidates and our own loop (parity=none), not random draws or a reference's loop.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping
from fractions import Fraction

import numpy as np

from jdllm.decode import DecodeConfig
from tests.support.plain_exit import PlainExit
from tests.support.plain_model import Keys, PlainModel, softmax


def candidates(logits: np.ndarray, config: DecodeConfig, mask_id: int) -> np.ndarray:
    """Returns the best token of every position, never [MASK]."""
    allowed = logits.copy()
    allowed[:, mask_id] = -np.inf
    return allowed.argmax(-1)


def confidences(
    logits: np.ndarray, ids: np.ndarray, config: DecodeConfig, stop_ids: tuple[int, ...]
) -> np.ndarray:
    """Returns what positions are ranked by, and thresholds are compared with."""
    p = softmax(logits)
    if config.remasking == "leftright":
        return -np.arange(len(ids), dtype=float)
    if config.remasking == "topk_margin":
        ordered = np.sort(p, axis=-1)
        return ordered[:, -1] - ordered[:, -2]
    if config.remasking == "entropy":
        return (p * np.log(p + 1e-10)).sum(-1)
    if config.confidence_eos_eot_inf:
        kept = logits.copy()
        kept[:, list(stop_ids)] = -np.inf
        p = softmax(kept)
    return p[np.arange(len(ids)), ids]


def runs(places: list[int]) -> list[list[int]]:
    """Returns runs of neighbouring places."""
    found: list[list[int]] = []
    for i in places:
        if found and found[-1][-1] == i - 1:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def select(
    c: np.ndarray,
    open_: list[int],
    config: DecodeConfig,
    quota: int,
    floor: float,
    still: Collection[int] | None = None,
):
    """Returns which of the open positions are filled; the lowest index wins ties.

    Above a threshold only those that stand `still` are, where that is said.
    """
    order = sorted(open_, key=lambda i: (-c[i], i))
    threshold = config.threshold or 0.0
    bar = max(-threshold if config.remasking == "entropy" else threshold, floor)
    if not order:
        return []
    if config.rule == "quota":
        return order[:quota]
    if config.rule == "allowance":
        return [i for r, i in enumerate(order[:quota]) if r == 0 or c[i] >= threshold]
    if config.rule in ("threshold", "klass"):
        if config.edge == "slack":
            bar = min(bar, c[order[0]] - 1e-5)
        above = config.edge == "above" or config.rule == "klass"
        calm = order if still is None else [i for i in order if i in still]
        sure = [i for i in calm if (c[i] > bar if above else c[i] >= bar)]
        return sure if len(sure) >= quota else order[:quota]
    if config.rule == "hierarchy":
        best = [min(run, key=lambda i: (-c[i], i)) for run in runs(open_)]
        tops = [i for i in best if c[i] > config.low_threshold]
        return sorted({order[0], *tops, *(i for i in open_ if c[i] > bar)})
    if config.rule == "entropy_bound":
        total = np.cumsum([-c[i] for i in order])
        return order[: max(int(np.searchsorted(total, config.entropy_bound, side="left")), 1)]
    assert config.rule == "factor"
    count = len(order) - 1
    for r, i in enumerate(order):
        if r and c[i] < 1 - config.factor / (r + 2):
            count = r
            break
    return order[: count + (count in (0, len(order) - 1))]


def times(steps: int, eps: float) -> np.ndarray:
    """Returns Dream's timesteps: torch.linspace counts from the nearer end and rounds once."""
    end = Fraction(float(np.float32(eps)))
    step = Fraction(float((np.float32(eps) - np.float32(1)) / np.float32(steps)))
    exact = [1 + i * step if 2 * i < steps else end - (steps - i) * step for i in range(steps + 1)]
    return np.array([np.float32(float(t)) for t in exact])


class Quotas:
    """How many tokens each step of a block should reveal."""

    def __init__(self, config: DecodeConfig, blocks: int, opened: int, number: int = 0):
        self.config, self.opened, self.left_over = config, opened, 0
        self.number = number
        self.steps = max((config.steps or 0) // blocks, 1)
        if config.schedule == "columns":
            self.steps = config.steps or 1
        if config.schedule == "gaussian":
            lengths = config.block_lengths or (config.block_length or 1,)
            own = lengths[min(number, len(lengths) - 1)]
            self.steps = max(own * (config.steps or 1) // (config.gen_length or 1), 1)

    def gaussian(self) -> list[int]:
        """Returns the tokens of every step: whole parts, then the largest fractions, in order."""
        peaks, widths = self.config.gaussian.peak, self.config.gaussian.width
        peak, width = (x[min(self.number, len(x) - 1)] for x in (peaks, widths))
        places = [(s / self.steps - peak) / width for s in range(self.steps)]
        weights = [math.exp(-x * x / 2) for x in places]
        shares = [round(w / sum(weights) * self.opened, 9) for w in weights]
        counts = [int(share) for share in shares]
        order = sorted(range(self.steps), key=lambda s: (-round(shares[s] - counts[s], 9), s))
        for s in order[: self.opened - sum(counts)]:
            counts[s] += 1
        return counts

    def split(self, total: int, step: int) -> int:
        if step >= self.steps:
            return 0
        return total // self.steps + (step < total % self.steps)

    def __call__(self, step: int, masks: int) -> int:
        config = self.config
        if config.tokens_per_step or not config.steps:
            return config.tokens_per_step or 1
        if config.rule == "allowance":  # what was due and is not revealed yet
            due = (step + 1) * (self.opened // self.steps)
            due = self.opened if step + 1 >= self.steps else due
            return max(due - (self.opened - masks), 1)
        if config.schedule == "columns":
            return self.split(config.block_length or 1, step)
        if config.schedule == "gaussian":
            return (self.gaussian() + [0] * (step + 1))[step]
        if config.schedule == "timesteps":
            t = times(self.steps, config.eps)
            if step >= self.steps - 1:
                return masks
            share = np.float32(1) - t[step + 1] / t[step]
            return int(np.float32(masks) * share)
        return self.split(self.opened, step)


@dataclasses.dataclass
class Block:
    """One block of a row, and what its rule remembers."""

    first: int
    last: int
    quotas: Quotas
    credit: np.ndarray
    calls: int = 0
    clean_calls: int = 0
    finished: bool = False
    exit: PlainExit | None = None
    chances: np.ndarray | None = None
    """Distributions of the call before, for KLASS."""
    calm: np.ndarray | None = None
    """For how many calls they have stood still."""

    def still(self, logits: np.ndarray, config: DecodeConfig) -> list[int]:
        """Returns the positions whose distribution has stood still for long enough."""
        p, before = softmax(logits), self.chances
        if before is None or self.calm is None:
            self.calm = np.zeros(len(p), int)
        else:
            kl = (p * np.log(np.maximum(p, 1e-300) / before)).sum(-1)
            self.calm = np.where(kl < config.klass.kl, self.calm + 1, 0)
        self.chances = p
        return np.flatnonzero(self.calm >= config.klass.steps).tolist()


class Row:
    """One canvas and the model calls made for it."""

    def __init__(
        self,
        model: PlainModel,
        config: DecodeConfig,
        prompt: list[int],
        verifier: PlainModel | None = None,
        maps: Mapping[str, np.ndarray] | None = None,
    ):
        facts, self.verifier, self.maps = model.facts, verifier, maps or {}
        assert config.gen_length and config.block_length
        self.length = config.block_length
        if facts.block_causal:
            facts = dataclasses.replace(facts, block_causal=self.length)
        self.model = PlainModel(facts, model.weights, model.factors)
        self.facts, self.config = facts, config
        end = len(prompt) + config.gen_length
        if facts.block_causal:
            end = -(-end // self.length) * self.length
        self.prompt, self.end = len(prompt), end
        self.tokens = np.array(prompt + [facts.mask_id] * (end - len(prompt)))
        self.start = self.prompt // self.length * self.length if config.align else self.prompt
        lengths = config.block_lengths or [self.length] * (end - self.start)
        self.edges = [self.start]
        """The first column of every block, and the column behind the last."""
        while self.edges[-1] < end:
            self.edges.append(min(self.edges[-1] + lengths[len(self.edges) - 1], end))
        self.blocks = len(config.block_lengths) or -(-config.gen_length // self.length)
        self.nfe = 0
        self.keys = [self.model.empty(end), self.model.empty(end)]  # with and without the prompt
        self.inputs = self.embedded(self.tokens)
        self.dirty = False
        self.now: dict[int, int] = {}
        """What each open column would take, by the last call."""
        self.before: dict[int, int] = {}
        self.streak = 0
        self.shake = lambda logits: logits
        self.decimals: int | None = None
        self.story: list[list[int]] = []
        """The canvas after every call that unmasks."""

    def embedded(self, tokens: np.ndarray) -> np.ndarray:
        return self.model.table_VD[tokens]

    def open(self, first: int, last: int) -> list[int]:
        """Returns the generated columns that are masked."""
        columns = range(max(first, self.prompt), last)
        return [i for i in columns if self.tokens[i] == self.facts.mask_id]

    def feed(self, columns: np.ndarray, visible_end: int, keys: Keys, guided: bool) -> np.ndarray:
        visible = np.arange(self.end) < visible_end
        inputs = self.inputs if self.config.smooth.weight else self.embedded(self.tokens)
        if not guided:
            hidden = np.where(np.arange(self.end) < self.prompt, self.facts.mask_id, self.tokens)
            inputs = self.embedded(hidden)
        return self.shake(self.model(inputs[columns], columns, visible, keys))

    def forward(self, first: int, last: int, visible_end: int) -> np.ndarray:
        """Returns logits per canvas column, unshifted, of one evaluation; NaN where not fed."""
        self.nfe += 1
        columns = np.arange(max(first, 0), last)
        logits = self.feed(columns, visible_end, self.keys[0], True)
        if self.config.cfg_scale:
            free = self.feed(columns, visible_end, self.keys[1], False)
            logits = free + (self.config.cfg_scale + 1) * (logits - free)
        by_column = np.full((self.end, logits.shape[1]), np.nan)
        by_column[columns] = logits
        return by_column

    def window(self, block: Block) -> tuple[int, int, int]:
        """Returns the first and last column to feed, and the end of what is visible."""
        config, everything = self.config, (0, self.end, self.end)
        if config.verify.lookahead:
            first_mask = self.open(block.first, block.last)[0]
            return 0, self.end, min(first_mask + config.verify.lookahead, self.end)
        if config.cache == "none" or self.full(block):
            return everything
        before = block.first - config.vicinity.before - self.facts.shift_logits
        if config.cache == "prefix":
            return before, self.end, self.end
        if config.cache == "dual":
            return before, min(block.last + config.vicinity.after, self.end), self.end
        return before, block.last, block.last

    def full(self, block: Block) -> bool:
        config = self.config
        if config.cache not in ("prefix", "dual"):
            return False
        renewed = config.refresh_every and block.calls % config.refresh_every == 0
        warm = block.first == self.start and block.calls < config.vicinity.warmup
        return block.calls == 0 or bool(renewed) or warm

    def call(self, block: Block) -> None:
        """Makes one model evaluation, and unmasks or edits by it."""
        config, mask_id = self.config, self.facts.mask_id
        n, (first, last, sight) = self.nfe, self.window(block)
        logits = self.forward(first, last, sight)
        own = logits[[max(i - self.facts.shift_logits, 0) for i in range(block.first, block.last)]]
        old = self.tokens[block.first : block.last].copy()
        open_ = [i - block.first for i in self.open(block.first, block.last)]
        if config.logits_eos_inf:
            own[:, self.facts.eos_id] = -np.inf
        if config.credit.alpha:
            own = self.credited(own, open_, block)
        for i in range(1, len(old)):
            own[i, old[i - 1]] -= config.edit.penalty
        ids = candidates(own, config, mask_id)
        c = confidences(own, ids, config, self.facts.stop_ids)
        if self.decimals is not None:
            c = np.round(c, self.decimals)
        if config.verify.lookahead:
            open_ = [i for i in open_ if i < open_[0] + config.verify.lookahead]
        floor = 1 - n * config.smooth.decay if config.smooth.weight else -np.inf
        quota = block.quotas(block.calls, len(open_))
        if block.exit and block.exit.due > 0:
            quota = math.ceil(len(open_) / block.exit.due)
        new = old.copy()
        if config.rule == "verify":
            chosen = self.agreed(own, ids, open_, block.first)
        else:
            still = block.still(own, config) if config.rule == "klass" else open_
            chosen = select(c, open_, config, quota, floor, still)
        for i in chosen:
            new[i] = ids[i]
        if config.edit.threshold is not None:
            for i in range(max(self.prompt - block.first, 0), len(old)):
                if old[i] != mask_id and c[i] > config.edit.threshold:
                    new[i] = ids[i]
            block.clean_calls += not open_
            block.finished = not open_ and bool((new == old).all())
        self.tokens[block.first : block.last] = new
        self.dirty = bool((new != old).any())
        self.now = {i + block.first: ids[i] for i in open_}
        block.calls += 1
        if block.exit:
            settled = [i for i in range(len(old)) if old[i] != mask_id]
            settled = [i for i in settled if i + block.first >= self.prompt]
            self.leave(block, own, open_, settled)
        if config.smooth.weight:
            self.smooth(logits, n)

    def leave(self, block: Block, own: np.ndarray, open_: list[int], settled: list[int]) -> None:
        """Leaves the block early, or gets it ready to be finished."""
        exit = block.exit
        assert exit is not None
        exit.due -= exit.due > 0
        if exit.fires(self, own, open_, settled, block.calls):
            exit.due = max(min(exit.polish(), exit.steps - block.calls), 0)
        if exit.due == 0:
            for i, token in self.now.items():
                if self.tokens[i] == self.facts.mask_id:
                    self.tokens[i] = token
                    self.inputs[i] = self.embedded(self.tokens[i])
                    self.dirty = True

    def agreed(self, own: np.ndarray, ids: np.ndarray, open_: list[int], first: int) -> list[int]:
        """Returns drafts up to the first that the mixture with the verifier would not have drawn.

        The verifier reads everything up to the drafts anew in every call.
        """
        assert self.verifier is not None
        drafted = self.tokens[: first + len(ids)].copy()
        for i in open_:
            drafted[first + i] = ids[i]
        columns, seen = np.arange(len(drafted)), np.ones(len(drafted), bool)
        inputs = self.verifier.table_VD[np.minimum(drafted, self.verifier.facts.vocab - 1)]
        theirs = self.verifier(inputs, columns, seen, self.verifier.empty(len(drafted)))
        kept = open_[:1]
        for i in open_[1:]:
            weight = self.config.verify.weight
            mixed = weight * own[i] + (1 - weight) * theirs[first + i - 1]
            mixed[self.facts.mask_id] = -np.inf
            if mixed.argmax() != ids[i]:
                break
            kept.append(i)
        return kept

    def credited(self, logits: np.ndarray, open_: list[int], block: Block) -> np.ndarray:
        """Returns logits with dInfer's credit, here a dense matrix as in the reference."""
        config = self.config
        block.credit *= config.credit.beta if block.calls else 1
        p = softmax(logits)
        for i in open_:
            block.credit[i, p[i].argmax()] += p[i].max() ** config.credit.gamma
        return logits + config.credit.alpha * np.log1p(block.credit)

    def smooth(self, logits: np.ndarray, n: int) -> None:
        """Returns what is fed next: masks that were in this call carry some of their prediction."""
        config = self.config
        weight = min(config.smooth.init + config.smooth.growth * n, config.smooth.weight)
        for i in np.flatnonzero(~np.isnan(logits[:, 0])):
            self.inputs[i] = self.embedded(self.tokens[i])
            if self.tokens[i] == self.facts.mask_id:
                self.inputs[i] += weight * softmax(logits[i]) @ self.model.table_VD

    def exit(self, block: Block, number: int, opened: int) -> PlainExit:
        """Returns the exit of a block, which knows how many steps its schedule has."""
        config, own = self.config, block.quotas
        scheduled = config.steps and not config.tokens_per_step and config.rule != "allowance"
        longest = max(config.block_lengths, default=self.length)
        steps = own.steps if scheduled else longest
        return PlainExit(config, number, steps, opened, block.first, block.last - block.first)

    def unfinished(self, block: Block) -> bool:
        """Returns whether a block needs another call."""
        if block.exit and block.exit.due == 0:
            return False
        if self.open(block.first, block.last):
            return True
        edits = self.config.edit.threshold is not None
        return edits and not block.finished and block.clean_calls < self.config.edit.passes

    def settled(self, block: Block) -> None:
        """Returns whether to fill the block: its predictions are stable, or the budget is spent."""
        config, open_ = self.config, self.open(block.first, block.last)
        same = all(self.now.get(i) == self.before.get(i) for i in open_)
        self.streak = self.streak + 1 if same else 0
        self.before = self.now
        stable = config.stable_steps and self.streak >= config.stable_steps
        if stable or (config.max_forwards and self.nfe >= config.max_forwards):
            for i in [i for i in open_ if i in self.now]:
                self.tokens[i] = self.now[i]
                self.inputs[i] = self.embedded(self.tokens[i])
                self.dirty = True

    def ended(self, last: int, closing: bool) -> bool:
        """Returns whether the row is finished, after a step or after a block that ends at `last`.

        A row whose budget is spent may have come to its end in the same step.
        """
        spent = bool(self.config.max_forwards and self.nfe >= self.config.max_forwards)
        return self.complete(last, closing) or spent

    def complete(self, last: int, closing: bool) -> bool:
        """Returns whether the text has ended, and what fills the columns behind it."""
        config, facts = self.config, self.facts
        if config.stop == "eos_block":
            found = closing and facts.eos_id in self.tokens[self.prompt : last]
            if found and config.stop_fill:
                self.tokens[last:] = facts.eos_id
            return found
        if config.stop == "none" or (config.edit.threshold is not None and not closing):
            return False
        assert config.stop == "eos"
        for i in range(self.prompt, self.end):
            if self.tokens[i] == facts.mask_id:
                return False
            if self.tokens[i] in facts.stop_ids:
                self.tokens[i + 1 :] = facts.eos_id
                return True
        return False

    def absorb(self, first: int, last: int) -> None:
        """Makes a call that only writes keys and values."""
        if last > first:
            self.forward(first, last, last)

    def run(self) -> "Row":
        cached = self.config.cache == "block"
        if cached:
            self.absorb(0, self.start)
        for number, (first, last) in enumerate(itertools.pairwise(self.edges)):
            opened = len(self.open(first, last))
            quotas = Quotas(self.config, self.blocks, opened, number)
            block = Block(first, last, quotas, np.zeros((last - first, self.facts.vocab)))
            if self.config.exit.mode != "off":
                block.exit = self.exit(block, number, opened)
            while self.unfinished(block):
                assert block.calls < 100, "the twin itself does not end"
                self.call(block)
                self.settled(block)
                self.story.append(self.tokens.tolist())
                if self.ended(last, closing=False):
                    return self
            if self.ended(last, closing=True):
                return self
            if cached and self.dirty and last < self.end:
                self.absorb(first, last)
                self.dirty = False
                if self.config.max_forwards and self.nfe >= self.config.max_forwards:
                    return self
        return self


def oracle(
    model: PlainModel,
    config: DecodeConfig,
    prompt: list[int],
    verifier: PlainModel | None = None,
    maps: Mapping[str, np.ndarray] | None = None,
) -> tuple[list[int], int]:
    """Returns canvas and NFE of one prompt, by a resolved config."""
    row = Row(model, config, prompt, verifier, maps).run()
    return row.tokens.tolist(), row.nfe


def is_close(
    model: PlainModel,
    config: DecodeConfig,
    prompt: list[int],
    verifier: PlainModel | None = None,
    maps: Mapping[str, np.ndarray] | None = None,
    runs: int = 32,
) -> bool:
    """Returns whether some decision changes when logits move by 1e-4, more than float32 is off.

    `runs` is how often they are moved: four missed ties that the search met.
    """
    row = Row(model, config, prompt, verifier, maps).run()
    for seed in range(runs):
        rng, shaken = np.random.default_rng(seed), Row(model, config, prompt, verifier, maps)
        shaken.shake = lambda logits, rng=rng: logits + rng.uniform(-1e-4, 1e-4, logits.shape)
        # Confidences that float32 rounds to 1 are ties and meet a floor of 1: no shaking shows it.
        shaken.decimals = 6 if seed % 2 else None
        if shaken.run().story != row.story:
            return True
    return False
