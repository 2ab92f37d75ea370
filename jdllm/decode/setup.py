"""Setup: what a DecodeConfig means for one model, as objects that are static under jit."""

import dataclasses
from typing import Any

from jdllm import unmask
from jdllm.decode.config import DecodeConfig
from jdllm.model.cache import Plan
from jdllm.model.config import ModelConfig
from jdllm.stop import rule as stops
from jdllm.unmask.indel import InDel
from jdllm.unmask.speculate import Speculate


@dataclasses.dataclass(frozen=True)
class Quirks:
    """Habits of one reference's loop that cost calls or couple rows; off by default."""

    all_steps: bool = False
    """Every step of the schedule is made, even when nothing is left to do."""
    earlier_masks: bool = False
    """Masks left of the block, the prompt's included, compete too."""
    late_check: bool = False
    """A cached pass follows the full pass that opens a block even if that finished it."""
    coupled: bool = False
    """Rows wait for each other, and several calls are made without looking (dInfer)."""
    narrow: bool = False
    """A shifted window ends one column before the block's end (dInfer)."""
    first_column: bool = False
    """The full pass that opens a block takes its first column only, and a window of a shifted
    model begins at the block (Fast-dLLM's Dream)."""
    average: bool = False
    """Every row's quota comes from the batch's average number of masks (Dream)."""
    predicts_mask: bool = False
    """A predicted [MASK] counts as a token (LLaDA2)."""
    late_finish: bool = False
    """One more call sees the final tokens (SGLang)."""
    greedy_target: bool = False
    """The verifier's side forgets temperature and filters (apd)."""
    heats_twice: bool = False
    """A temperature that divides the logits scales the noise on them as well (apd)."""


QUIRKS: dict[str, Quirks] = {
    "none": Quirks(),
    "llada": Quirks(all_steps=True, earlier_masks=True),
    "fast_dllm": Quirks(late_check=True),
    "dinfer": Quirks(coupled=True, narrow=True),
    "dream": Quirks(all_steps=True, average=True),
    "fast_dream": Quirks(first_column=True, average=True),
    "llada2": Quirks(predicts_mask=True),
    "sglang": Quirks(late_finish=True),
    "apd": Quirks(greedy_target=True, heats_twice=True),
}


@dataclasses.dataclass(frozen=True)
class Smooth:
    """IterSmooth: a mask's embedding carries some of its prediction; the threshold sinks from 1."""

    weight: float
    init: float
    growth: float
    decay: float


@dataclasses.dataclass(frozen=True)
class Setup:
    """A resolved DecodeConfig for one model: the rules as objects, static under jit."""

    rule: unmask.Rule
    schedule: unmask.Schedule
    stop: stops.Stop
    plan: Plan
    quirks: Quirks
    gen_length: int
    block_length: int
    align: bool
    whole_blocks: bool
    """The canvas is rounded up to whole blocks (block-causal models)."""
    smooth: Smooth | None
    cfg_scale: float
    lookahead: int | None
    kv_window: int | None
    expected_tpf: int
    maximum_unroll: int
    extra_steps: int
    """Steps a block may need beyond one for each column."""

    @property
    def blocks(self) -> int:
        """Blocks of a row, at most."""
        return -(-self.gen_length // self.block_length) + self.align

    @property
    def step_limit(self) -> int:
        """A bound on the steps of a block for any weights: each unmasks at least one position."""
        return self.schedule.steps or self.block_length + 1 + self.extra_steps

    @property
    def least_steps(self) -> int:
        """Steps that a reference makes in every block."""
        if isinstance(self.schedule, unmask.CarryOver):
            return self.schedule.per_block
        return self.schedule.steps or 0

    @property
    def block_calls(self) -> int:
        """A bound on the model calls of a block."""
        return 2 * self.step_limit + self.maximum_unroll * 2 + 3

    @property
    def call_limit(self) -> int:
        """A bound on the model calls of a request."""
        return self.blocks * self.block_calls + 1

    @property
    def fixed_past(self) -> bool:
        """Whether the keys of a finished block depend on nothing but the tokens up to its end.

        With guidance a second row of masks has keys of its own; then they are not shared.
        """
        return self.plan.kind == "block" and self.whole_blocks and not self.cfg_scale

    def first_block(self, prompt_length: Any) -> Any:
        """The column where the first block begins; an int or an array."""
        L = self.block_length
        return prompt_length // L * L if self.align else prompt_length

    def canvas_length(self, prompt_length: Any) -> Any:
        """Columns of a prompt and what is decoded for it; an int or an array."""
        end, L = prompt_length + self.gen_length, self.block_length
        return -(-end // L) * L if self.whole_blocks else end


def make_rule(config: DecodeConfig, model: ModelConfig) -> unmask.Rule:
    """The rule that a resolved `config` describes, for the special ids of `model`."""
    greedy, quirks = config.temperature == 0, QUIRKS[config.parity]
    excluded = () if quirks.predicts_mask else (model.mask_id,)
    end_of_turn = tuple(i for i in model.stop_ids if i != model.eos_id)
    # The reference writes -inf into both tensors, which are one and the same at temperature 0.
    ends = (model.eos_id, *end_of_turn) if greedy else end_of_turn
    threshold = config.threshold or 0.0
    if config.remasking == "entropy":
        threshold = -threshold  # confidence is negative entropy
    selections = {
        "quota": unmask.Quota(),
        "threshold": unmask.Threshold(threshold, config.edge or "at_least"),
        "factor": unmask.Factor(config.factor),
        "hierarchy": unmask.Hierarchy(threshold, config.low_threshold),
        "entropy_bound": unmask.EntropyBound(config.entropy_bound),
        "origin": unmask.Share(),
        "allowance": unmask.Allowance(threshold),
    }
    confidences = {
        "low_confidence": unmask.Probability(ends if config.confidence_eos_eot_inf else ()),
        "random": unmask.Random(),
        "leftright": unmask.Leftmost(),
        "topk_margin": unmask.Margin(),
        "entropy": unmask.NegativeEntropy(),
    }
    divides = config.sampling == "categorical"
    noise = 1.0 if divides and not greedy and not quirks.heats_twice else config.temperature
    warp = None
    if config.top_p is not None or config.top_k is not None or (divides and not greedy):
        heat = config.temperature if divides else 0.0
        warp = unmask.Warp(heat, config.top_p, config.top_k, bool(config.top_k_first), excluded)
    if config.rule == "verify":
        return Speculate(excluded, config.verify_weight, noise, quirks.greedy_target, warp)
    edit = None
    if config.edit_threshold is not None or quirks.late_finish:
        edit = unmask.Edit(
            # SGLang's LowConfidence edits nothing, but also ends a block with a clean pass
            1.0 if config.edit_threshold is None else config.edit_threshold,
            config.edit_passes,
            config.edit_penalty,
            quirks.late_finish,
        )
    if config.delete_id is not None and config.split_id is not None and edit is not None:
        return InDel(threshold, edit.threshold, edit.passes, model.mask_id,
                     config.delete_id, config.split_id)  # fmt: skip
    confidence = confidences["random" if config.rule == "origin" else config.remasking]
    return unmask.Unmasker(
        candidate=unmask.Argmax(excluded) if greedy else unmask.Gumbel(excluded, noise),
        confidence=unmask.Tempered(confidence, config.alg_temp) if config.alg_temp else confidence,
        selection=selections[config.rule],
        forbidden=(model.eos_id,) if config.logits_eos_inf else (),
        credit=unmask.Credit(config.credit_alpha, config.credit_beta, config.credit_gamma)
        if config.credit
        else None,
        warp=warp,
        edit=edit,
    )


def make_schedule(config: DecodeConfig, blocks: int) -> unmask.Schedule:
    """How many tokens a step of a block should reveal."""
    if config.tokens_per_step or not config.steps:
        return unmask.Each(config.tokens_per_step or 1)
    per_block = max(config.steps // blocks, 1)
    if config.rule == "allowance":
        return unmask.CarryOver(per_block)
    if config.schedule == "timesteps":
        return unmask.Timesteps(per_block, config.eps, QUIRKS[config.parity].average)
    if config.schedule == "columns":  # LLaDA2 counts the steps of every block by itself
        return unmask.Columns(config.block_length or 1, config.steps)
    return unmask.Masks(per_block)


def make_stop(config: DecodeConfig, model: ModelConfig) -> stops.Stop:
    """The stop rules that `config` names, in order."""
    edits = config.edit_threshold is not None
    endings = {
        "none": stops.NoStop(),
        "eos": stops.EosStop(model.eos_id, model.stop_ids, after_block=edits),
        "eos_fill": stops.EosFill(model.eos_id),
        "eos_block": stops.EosBlock(model.eos_id, config.parity == "dinfer", config.stop_fill),
        "eos_return": stops.EosReturn(model.eos_id),
        "eos_any": stops.EosAnywhere(model.eos_id),
    }
    rules: list[stops.Stop] = []
    if config.stable_steps:
        rules.append(stops.Stable(config.stable_steps))
    if config.max_forwards:
        rules.append(stops.Budget(config.max_forwards))
    return stops.Stops((*rules, endings[config.stop])) if rules else endings[config.stop]


def make_setup(config: DecodeConfig, model: ModelConfig) -> Setup:
    """Static description of the loop for a resolved `config` and `model`.

    ValueError where the config is still open, or does not fit the model.
    """
    if model.causal:
        raise ValueError(
            "the model is causal (an autoregressive one); it can judge drafts as a verifier, but a "
            "diffusion model must make them"
        )
    if config.gen_length is None or config.block_length is None or config.cache is None:
        raise ValueError("the config is still open: call DecodeConfig.resolve first")
    if model.block_causal and config.cache in ("prefix", "dual"):
        raise ValueError(
            f"cache={config.cache} reads keys of later blocks, which a block-causal model never "
            "sees; use cache=block, which is exact"
        )
    if model.block_causal and not config.align:
        raise ValueError(
            "a block-causal model counts its blocks from column 0; align=false would straddle "
            "them, leave it out"
        )
    if model.shift_logits and config.cont_weight:
        raise ValueError(
            f"cont_weight={config.cont_weight} feeds a mask what stands in its own row of the "
            "logits, which in this model predicts the next token; set cont_weight=0"
        )
    quirks = QUIRKS[config.parity]
    edits = config.edit_threshold is not None or quirks.late_finish
    smooth = None
    if config.cont_weight:
        smooth = Smooth(
            config.cont_weight, config.cont_init, config.cont_growth, config.threshold_decay
        )
    return Setup(
        rule=make_rule(config, model),
        schedule=make_schedule(config, -(-config.gen_length // config.block_length)),
        stop=make_stop(config, model),
        plan=Plan(
            config.cache,
            config.refresh_every,
            config.warmup,
            config.prefix_look,
            config.after_look,
        ),
        quirks=quirks,
        gen_length=config.gen_length,
        block_length=config.block_length,
        align=bool(config.align),
        whole_blocks=model.block_causal is not None,
        smooth=smooth,
        cfg_scale=config.cfg_scale,
        lookahead=config.lookahead,
        kv_window=config.kv_window,
        expected_tpf=config.expected_tpf,
        maximum_unroll=config.maximum_unroll if quirks.coupled else 0,
        extra_steps=config.edit_passes + 2 if edits else 0,
    )
