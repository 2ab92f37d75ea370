"""DecodeConfig: what a user may set about decoding."""

import dataclasses
import warnings
from typing import Any, ClassVar, Literal, Self

from jdllm.decode.checks import BY_THRESHOLD, CONFLICTS, RANGES, READERS
from jdllm.decode.presets import PRESETS, Settings, preset_settings
from jdllm.model.config import ModelConfig
from jdllm.runtime.fields import check_fields

Parity = Literal[
    "none", "llada", "fast_dllm", "dinfer", "dream", "fast_dream", "llada2", "sglang", "apd"
]


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How to decode. The defaults are Fast-dLLM's: threshold 0.9 with the dual cache.

    For block-causal models (LLaDA2) they are threshold 0.95 with the exact block cache.
    """

    presets: ClassVar[dict[str, Settings]] = PRESETS
    """What `preset=NAME` starts from on a command line, and `named` in Python."""

    gen_length: int | None = None
    """Columns to generate (default: the model's own, else the task's, else 128)."""
    block_length: int | None = None
    """Columns of a block; 0 is one block over all (default: the model's own, else 32)."""
    align: bool | None = None
    """Blocks are counted from column 0, so that the first holds the prompt's tail (default: where
    the model is block-causal)."""
    lookahead: int | None = None
    """Only so many columns from the first mask on are seen and filled (apd)."""

    rule: Literal[
        "threshold",
        "factor",
        "quota",
        "hierarchy",
        "entropy_bound",
        "origin",
        "allowance",
        "verify",
    ] = "threshold"
    """Which positions are unmasked in a step; docs/decoding.md tells each."""
    threshold: float | None = None
    """threshold, hierarchy, allowance: confidence from which a token is taken."""
    edge: Literal["at_least", "above", "slack"] | None = None
    """threshold: >=, > or dInfer's >= min(best - 1e-5, threshold)."""
    low_threshold: float = 0.62
    """hierarchy: what the best of a run of masks must exceed."""
    factor: float = 1.0
    """factor: the r-th best needs probability 1 - factor/(r + 1)."""
    entropy_bound: float = 0.35
    """entropy_bound: nats that the tokens of a step may sum to."""
    verify_weight: float = 0.5
    """verify: the diffusion model's part in the mixture with the verifier."""

    remasking: Literal["low_confidence", "random", "leftright", "topk_margin", "entropy"] = (
        "low_confidence"
    )
    """What ranks positions: their token's probability, chance, place, margin or entropy."""
    schedule: Literal["masks", "columns", "timesteps"] = "masks"
    """quota, origin: how `steps` spread over a block's masks, its columns, or Dream's times."""
    steps: int | None = None
    """quota, origin, allowance: steps in all, spread evenly over blocks (default: one token each).
    More than there are columns are made only where `parity` copies a reference that makes them.
    threshold: a floor on the tokens of a step (LLaDA2.0)."""
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

    credit: bool = False
    """dInfer: tokens that were on top before gain logits."""
    credit_alpha: float = 0.7
    credit_beta: float = 0.8
    credit_gamma: float = 0.2
    edit_threshold: float | None = None
    """LLaDA2.1: a token of the block is replaced by one of a probability above this."""
    edit_passes: int = 16
    """Passes over a block without masks, at most."""
    edit_penalty: float = 0.0
    """SGLang: taken off the logit of the left neighbour's token."""
    delete_id: int | None = None
    """SGLang's JointThresholdInDel: this token deletes its position."""
    split_id: int | None = None
    """SGLang's JointThresholdInDel: this token inserts a mask before its position."""
    cont_weight: float = 0.0
    """dInfer's IterSmooth: how much of its prediction a mask's embedding carries; 0 is off."""
    cont_init: float = 0.15
    cont_growth: float = 0.02
    threshold_decay: float = 0.02
    """IterSmooth: the threshold falls from 1 by this much per step."""

    cache: Literal["none", "prefix", "dual", "block"] | None = None
    """Which keys and values are reused; none is exact, for block-causal models block too."""
    refresh_every: int | None = None
    """prefix, dual: every so many passes of a block, one is full."""
    prefix_look: int = 0
    """prefix, dual: columns before the block that are computed again with it (vicinity)."""
    after_look: int = 0
    """dual: columns behind the block that are computed again with it (vicinity)."""
    warmup: int = 0
    """prefix, dual: so many passes of the first block are full."""
    kv_window: int | None = None
    """verify: columns before the first mask that are computed again; the rest is cached."""

    share_prefix: bool = True
    """block, of block-causal models: what many prompts begin with, few-shot examples say, is
    computed once where that saves enough."""

    stop: Literal["eos", "eos_fill", "eos_block", "eos_return", "eos_any", "none"] = "eos"
    """When a row ends before its canvas is full."""
    stop_fill: bool = False
    """eos_block: every later column becomes eos (dInfer's early_stop)."""
    stable_steps: int | None = None
    """A block is filled once its predictions stayed the same for so many steps."""
    max_forwards: int | None = None
    """A row ends after so many model evaluations."""

    parity: Parity = "none"
    """Copies the loop of one reference, its idle calls and couplings between rows included."""
    expected_tpf: int = 8
    """parity=dinfer: masks / this = calls made without looking."""
    maximum_unroll: int = 4
    """parity=dinfer: and at most so many."""

    def __post_init__(self):
        check_fields(self)
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value} is out of range: it must lie in [{low}, {high}]")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for names, reads, where in READERS:
            for name in names:
                value = getattr(self, name)
                if value != defaults[name] and not reads(self):
                    raise ValueError(
                        f"{name}={value} is read by {where} only; leave it out, or take back what "
                        f"a preset sets: {name}={defaults[name]}"
                    )
        for wrong, sentence in CONFLICTS:
            if wrong(self):
                raise ValueError(sentence.format(c=self))

    @property
    def draws(self) -> bool:
        """Whether chance decides anything, so that repeats of a prompt differ."""
        by_lot = self.remasking == "random" or self.rule == "origin"
        return bool(self.temperature or self.alg_temp or by_lot)

    @classmethod
    def named(cls, preset: str, **settings: Any) -> Self:
        """The preset of that name, with `settings` in place of its own.

        ValueError with the nearest names where there is none.
        """
        return cls(**(preset_settings(preset) | settings))

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
        gen = self.gen_length or gen_length
        block = min(block_length, gen) if self.block_length is None else self.block_length or gen
        align = causal if self.align is None else self.align
        steps, threshold = self._steps(gen, block), self.threshold
        if threshold is None and self.rule in BY_THRESHOLD:
            threshold = 0.95 if causal else 0.9
        edge = self.edge
        if edge is None and self.rule == "threshold":
            edge = "above" if causal else "at_least"
        top_k_first = self.top_k_first
        if top_k_first is None and self.top_p is not None and self.top_k is not None:
            top_k_first = causal
        cache = self.cache or ("block" if causal else "dual")
        if self.rule == "verify" or self.parity in ("llada", "dream"):
            cache = "none"
        return dataclasses.replace(
            self,
            gen_length=gen,
            block_length=block,
            align=align,
            steps=steps,
            threshold=threshold,
            edge=edge,
            top_k_first=top_k_first,
            cache=cache,
        )

    def _steps(self, gen: int, block: int) -> int | None:
        """The steps of `gen` columns in blocks of `block`, where a schedule spreads some.

        More steps than columns could only idle. They are made where a reference makes them.
        """
        steps, blocks = self.steps, -(-gen // block)
        if self.rule in ("quota", "origin", "allowance") and not self.tokens_per_step:
            steps = steps or (gen if self.schedule == "columns" else blocks * block)
        if not steps:
            return None
        if self.schedule == "columns":  # those of each block; LLaDA2's limit is the whole canvas
            return max(min(steps, gen // self.minimal_topk), 1)
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
