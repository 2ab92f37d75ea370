"""DecodeConfig: what a user may set about decoding."""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from jdllm.decode.checks import (
    BY_THRESHOLD,
    CONFLICTS,
    RANGES,
    READERS,
    RENAMED,
    Ranges,
    check_names,
    check_ranges,
    check_read,
    refuse_old_names,
)
from jdllm.decode.groups import (
    Credit,
    Dinfer,
    Edit,
    Exit,
    Gaussian,
    Klass,
    Smooth,
    Verify,
    Vicinity,
)
from jdllm.decode.presets import PRESETS, Settings, preset_settings
from jdllm.decode.rules import CONFIDENCES, SELECTIONS, STOPS, WHOLE_RULES
from jdllm.model.config import ModelConfig
from jdllm.runtime.fields import check_fields, flatten, leaves, replaced

if TYPE_CHECKING:
    type RuleName = str
    type ConfidenceName = str
    type StopName = str
else:  # the names in the tables, so that a new row is a new choice
    RuleName = Literal[*SELECTIONS, *WHOLE_RULES]
    ConfidenceName = Literal[*CONFIDENCES]
    StopName = Literal[*STOPS]
Parity = Literal[
    "none",
    "llada",
    "fast_dllm",
    "dinfer",
    "dream",
    "fast_dream",
    "llada2",
    "sglang",
    "apd",
    "edit",
]


@refuse_old_names
@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How to decode. The defaults are Fast-dLLM's: threshold 0.9 with the dual cache.

    For block-causal models (LLaDA2) they are threshold 0.95 with the exact block cache. Methods
    with several settings have a group of their own, off by default: `DecodeConfig(edit=Edit(0.9))`
    in Python, decode.edit.threshold=0.9 elsewhere.
    """

    presets: ClassVar[dict[str, Settings]] = PRESETS
    """What `preset=NAME` starts from on a command line, and `named` in Python."""
    renamed: ClassVar[dict[str, str]] = RENAMED
    """What settings of old are called now."""
    ranges: ClassVar[Ranges] = RANGES

    gen_length: int | None = None
    """Columns to generate (default: the model's own, else the task's, else 128)."""
    block_length: int | None = None
    """Columns of a block; 0 is one block over all (default: the model's own, else 32)."""
    block_lengths: tuple[int, ...] = ()
    """Blocks of unequal length, one after another, instead of `block_length`."""
    align: bool | None = None
    """Blocks are counted from column 0, so that the first holds the prompt's tail (default: where
    the model is block-causal)."""

    rule: RuleName = "threshold"
    """Which positions are unmasked in a step; docs/decoding.md tells each."""
    threshold: float | None = None
    """threshold, hierarchy, allowance, klass: confidence from which a token is taken."""
    edge: Literal["at_least", "above", "slack"] | None = None
    """threshold: >=, > or dInfer's >= min(best - 1e-5, threshold)."""
    low_threshold: float = 0.62
    """hierarchy: what the best of a run of masks must exceed."""
    factor: float = 1.0
    """factor: the r-th best needs probability 1 - factor/(r + 1)."""
    entropy_bound: float = 0.35
    """entropy_bound: nats that the tokens of a step may sum to."""
    verify: Verify = Verify()
    """verify: the mixture with the verifier, and apd's windows."""
    klass: Klass = Klass()
    """klass: how still a distribution must stand."""

    remasking: ConfidenceName = "low_confidence"
    """What ranks positions: their token's probability, chance, place, margin or entropy."""
    schedule: Literal["masks", "columns", "timesteps", "gaussian"] = "masks"
    """quota, origin: how `steps` spread over a block's masks, its columns, or Dream's times, or as
    EDIT has them, most of them early in a block."""
    gaussian: Gaussian = Gaussian()
    """schedule=gaussian: its peak and width."""
    steps: int | None = None
    """quota, origin, allowance, klass: steps in all, spread evenly over blocks (default: one token
    each). More than there are columns are made only where `parity` copies a reference that makes
    them. threshold: a floor on the tokens of a step (LLaDA2.0)."""
    tokens_per_step: int | None = None
    """quota: so many tokens in every step, instead of `steps`. threshold: at least so many
    (LLaDA2.1's num_to_transfer)."""
    minimal_topk: int = 1
    """LLaDA2.0: at most gen_length / minimal_topk steps."""
    eps: float = 1e-3
    """timesteps: the time of the last step."""

    temperature: float = 0.0
    """gumbel: scale of the noise on the logits. categorical: divides the logits. 0 is greedy."""
    sampling: Literal["gumbel", "categorical"] = "gumbel"
    """LLaDA's sampling, or Dream's and LLaDA2's."""
    top_p: float | None = None
    top_k: int | None = None
    top_k_first: bool | None = None
    """top_p is a share of what top_k left, as in LLaDA2 and BlockInfer; else top_p comes first, as
    in Dream (default: where the model is block-causal)."""
    alg_temp: float | None = None
    """Dream: temperature of the choice among positions."""
    cfg_scale: float = 0.0
    """Classifier-free guidance against the prompt masked out; 0 is off."""
    logits_eos_inf: bool = False
    """LLaDA: never predict eos."""
    confidence_eos_eot_inf: bool = False
    """LLaDA: take eos and end-of-turn last (at temperature > 0, as there, only end-of-turn)."""
    seed: int = 0

    credit: Credit = Credit()
    """dInfer: tokens that were on top before gain logits."""
    edit: Edit = Edit()
    """LLaDA2.1, SGLang: generated tokens of a block may be replaced."""
    smooth: Smooth = Smooth()
    """dInfer's IterSmooth: a mask's embedding carries some of its prediction."""

    cache: Literal["none", "prefix", "dual", "block"] | None = None
    """Which keys and values are reused; none is exact, for block-causal models block too."""
    refresh_every: int | None = None
    """prefix, dual: every so many passes of a block, one is full."""
    vicinity: Vicinity = Vicinity()
    """prefix, dual: columns near the block that are computed again with it."""
    share_prefix: bool = True
    """block, of block-causal models: what many prompts begin with, few-shot examples say, is
    computed once where that saves enough."""

    stop: StopName = "eos"
    """When a row ends before its canvas is full."""
    stop_fill: bool = False
    """eos_block: every later column becomes eos (dInfer's early_stop)."""
    stable_steps: int | None = None
    """A block is filled once its predictions stayed the same for so many steps."""
    exit: Exit = Exit()
    """EDIT and its rivals: a block is left early, by a signal."""
    max_forwards: int | None = None
    """A row ends after so many model evaluations."""

    parity: Parity = "none"
    """Copies the loop of one reference, its idle calls and couplings between rows included."""
    dinfer: Dinfer = Dinfer()
    """parity=dinfer: calls made without looking."""

    def __post_init__(self):
        check_fields(self)
        check_ranges(self)
        values, defaults = leaves(self), default_settings()
        for names, reads, where in READERS:
            if not reads(self):
                check_read(values, defaults, names, where)
        for wrong, sentence in CONFLICTS:
            if wrong(self):
                raise ValueError(sentence.format(c=self))

    @property
    def draws(self) -> bool:
        """Whether chance decides anything, so that repeats of a prompt differ."""
        by_lot = self.remasking == "random" or self.rule == "origin"
        return bool(self.temperature or self.alg_temp or by_lot)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Returns the config of settings by dotted names, as presets have them, or nested, as JSON.

        ValueError, with the new or the nearest name, for what is no setting.
        """
        flat = flatten(settings)
        check_names(flat, default_settings())
        return replaced(cls(), flat)

    @classmethod
    def named(cls, preset: str, **settings: Any) -> Self:
        """The preset of that name, with `settings` in place of its own.

        ValueError with the nearest names where there is none.
        """
        return cls.of(preset_settings(preset) | flatten(settings))

    def resolve(
        self,
        gen_length: int = 128,
        block_length: int = 32,
        model: ModelConfig | None = None,
    ) -> "DecodeConfig":
        """Fills in what was left open, by lengths given and `model`'s kind.

        ValueError where steps do not divide over the blocks, or the model does not fit the rule.
        """
        causal = model is not None and model.block_causal is not None
        if causal and self.block_lengths:
            raise ValueError(
                "a block-causal model has blocks of one length; leave out "
                f"block_lengths={self.block_lengths}"
            )
        gen = self.gen_length or sum(self.block_lengths) or gen_length
        block = min(block_length, gen) if self.block_length is None else self.block_length or gen
        ends = itertools.accumulate(self.block_lengths)
        unneeded = sum(end >= gen for end in ends) - 1
        lengths = self.block_lengths[: len(self.block_lengths) - max(unneeded, 0)]
        block = max(lengths, default=block)
        align = causal if self.align is None else self.align
        steps = self._steps(block, len(lengths) or -(-gen // block), gen)
        threshold = self.threshold
        if threshold is None and self.rule in BY_THRESHOLD:
            threshold = 0.95 if causal else 0.9
        edge = self.edge
        if edge is None and self.rule == "threshold":
            edge = "above" if causal else "at_least"
        top_k_first = self.top_k_first
        if top_k_first is None and self.top_p is not None and self.top_k is not None:
            top_k_first = causal
        cache = self.cache or ("block" if causal else "dual")
        if self.rule == "verify" or self.exit.aims or self.parity in ("llada", "dream", "edit"):
            cache = "none"
        return dataclasses.replace(
            self,
            gen_length=gen,
            block_length=block,
            block_lengths=lengths,
            align=align,
            steps=steps,
            threshold=threshold,
            edge=edge,
            top_k_first=top_k_first,
            cache=cache,
        )

    def _steps(self, block: int, blocks: int, gen: int) -> int | None:
        """The steps of `gen` columns in `blocks` of at most `block`, where a schedule spreads some.

        More steps than columns could only idle. They are made where a reference makes them.
        """
        steps = self.steps
        if self.rule in ("quota", "origin", "allowance", "klass") and not self.tokens_per_step:
            steps = steps or (gen if self.schedule == "columns" else blocks * block)
        if not steps:
            return None
        if self.schedule == "columns":  # those of each block; LLaDA2's limit is the whole canvas
            return max(min(steps, gen // self.minimal_topk), 1)
        if self.schedule == "gaussian":  # in proportion to the columns of each block
            return min(steps, gen)
        if steps % blocks:
            raise ValueError(
                f"steps={steps} must be a multiple of the {blocks} blocks of "
                f"gen_length={gen} and block_length={block}"
            )
        if self.parity == "none" or self.minimal_topk > 1:
            steps = blocks * min(steps // blocks, max(block // self.minimal_topk, 1))
        least = -(-block * blocks // steps)
        if self.rule == "threshold" and least > 1:
            warnings.warn(
                f"steps={steps} makes every step of rule=threshold take {least} tokens at least, "
                "however unsure; Fast-dLLM reads no steps where it has a threshold: leave steps "
                f"out, or set tokens_per_step={least} if that is meant",
                stacklevel=3,
            )
        return steps


@functools.cache
def default_settings() -> dict[str, Any]:
    """Returns every setting's default by its dotted name."""
    groups = {field.name: field.default for field in dataclasses.fields(DecodeConfig)}
    return flatten(groups)
