"""DecodeConfig, what a user may set, and Setup, what it means for one model."""

import dataclasses
from typing import Literal, get_args, get_origin, get_type_hints

from jdllm import stop as stops
from jdllm import unmask
from jdllm.configs import ModelConfig, require_served


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How to decode. The defaults are Fast-dLLM's: threshold 0.9 with the dual cache."""

    gen_length: int | None = None
    """Columns to generate (default: the model's own, else the task's, else 128)."""
    block_length: int | None = None
    """Columns of a block; must divide gen_length (default: the model's own, else 32)."""
    rule: Literal["threshold", "factor", "quota"] = "threshold"
    """threshold and factor: as many tokens a step as are confident. quota: a fixed number."""
    threshold: float = 0.9
    """threshold: a token is taken once its probability is at least this (the best one always)."""
    factor: float = 1.0
    """factor: the r-th best needs probability 1 - factor/(r + 1)."""
    steps: int | None = None
    """quota: steps in all, spread evenly over blocks (default: one token a step)."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """What ranks positions: the probability of their token, or chance."""
    temperature: float = 0.0
    """Scale of the Gumbel noise on the logits; 0 takes the most likely token."""
    cfg_scale: float = 0.0
    """Classifier-free guidance against the prompt masked out; 0 is off."""
    cache: Literal["none", "prefix", "dual"] = "dual"
    """Which keys and values are reused within a block; none is exact."""
    stop: Literal["eos", "eos_fill", "none"] = "eos"
    """When a row ends before its canvas is full (eos_fill: dInfer's early_stop)."""
    logits_eos_inf: bool = False
    """LLaDA: never predict eos."""
    confidence_eos_eot_inf: bool = False
    """LLaDA: take eos and end-of-turn last (at temperature > 0, as there, only end-of-turn)."""
    seed: int = 0
    run_all_steps: bool = False
    """LLaDA's own loop: run every step of the quota, even when nothing is left to do."""
    check_late: bool = False
    """Fast-dLLM's own loop: one cached pass a block even if the full pass finished it."""
    earlier_masks: bool = False
    """LLaDA's own loop: masks left of the block, the prompt's included, compete too."""

    def __post_init__(self):
        for name, kind in get_type_hints(DecodeConfig).items():
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            if choices and getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)} must be {' or '.join(choices)}")
        checks = {
            "gen_length": (self.gen_length or 1) >= 1,
            "block_length": (self.block_length or 1) >= 1,
            "threshold": 0 <= self.threshold <= 1,
            "factor": self.factor >= 0,
            "temperature": self.temperature >= 0,
            "cfg_scale": self.cfg_scale >= 0,
        }
        if bad := [name for name, good in checks.items() if not good]:
            raise ValueError(
                f"{bad[0]}={getattr(self, bad[0])} is out of range (lengths from 1, threshold in "
                "[0, 1], the others from 0)"
            )
        if self.rule != "quota" and (self.steps is not None or self.run_all_steps):
            raise ValueError(f"steps and run_all_steps belong to rule=quota, not rule={self.rule}")
        if self.earlier_masks and self.cache != "none":
            raise ValueError(f"earlier_masks needs cache=none, not cache={self.cache}")

    def resolve(self, gen_length: int = 128, block_length: int = 32) -> "DecodeConfig":
        """Fills in lengths and steps that were left open; ValueError where they do not divide."""
        gen = self.gen_length or gen_length
        block = self.block_length or min(block_length, gen)
        steps = self.steps or gen
        if gen % block:
            raise ValueError(f"block_length={block} must divide gen_length={gen}")
        if steps % (gen // block):
            raise ValueError(
                f"steps={steps} must be a multiple of the {gen // block} blocks of "
                f"gen_length={gen} and block_length={block}"
            )
        steps = steps if self.rule == "quota" else None
        return dataclasses.replace(self, gen_length=gen, block_length=block, steps=steps)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A resolved DecodeConfig for one model: the rules as objects, static under jit."""

    unmasker: unmask.Unmasker
    stop: stops.Stop
    cache: str
    blocks: int
    block_length: int
    quota_steps: int | None
    """Steps of a block under a quota; None where confidence decides."""
    cfg_scale: float
    run_all_steps: bool
    check_late: bool
    earlier_masks: bool

    @property
    def step_limit(self) -> int:
        """A bound on the steps of a block for any weights: each unmasks at least one position."""
        return self.quota_steps or self.block_length + 1


def make_unmasker(config: DecodeConfig, model: ModelConfig) -> unmask.Unmasker:
    """The rule that `config` describes, for the special ids of `model`."""
    greedy = config.temperature == 0
    end_of_turn = tuple(i for i in model.stop_ids if i != model.eos_id)
    # The reference writes -inf into both tensors, which are one and the same at temperature 0.
    ends = (model.eos_id, *end_of_turn) if greedy else end_of_turn
    suppressed = ends if config.confidence_eos_eot_inf else ()
    selections = {
        "quota": unmask.Quota(),
        "threshold": unmask.Threshold(config.threshold),
        "factor": unmask.Factor(config.factor),
    }
    chance = config.remasking == "random"
    return unmask.Unmasker(
        candidate=unmask.Argmax(model.mask_id)
        if greedy
        else unmask.Gumbel(model.mask_id, config.temperature),
        confidence=unmask.Random() if chance else unmask.Probability(suppressed),
        selection=selections[config.rule],
        forbidden=(model.eos_id,) if config.logits_eos_inf else (),
    )


def make_setup(config: DecodeConfig, model: ModelConfig) -> Setup:
    """Static description of the loop for a resolved `config` and `model`.

    ValueError where the lengths are still open, or the loop cannot read the model's logits.
    """
    require_served(model)
    if config.gen_length is None or config.block_length is None:
        raise ValueError("lengths are still open: call DecodeConfig.resolve first")
    blocks = config.gen_length // config.block_length
    endings = {
        "none": stops.NoStop(),
        "eos": stops.EosStop(model.eos_id, model.stop_ids),
        "eos_fill": stops.EosFill(model.eos_id),
    }
    return Setup(
        unmasker=make_unmasker(config, model),
        stop=endings[config.stop],
        cache=config.cache,
        blocks=blocks,
        block_length=config.block_length,
        quota_steps=config.steps // blocks if config.steps else None,
        cfg_scale=config.cfg_scale,
        run_all_steps=config.run_all_steps,
        check_late=config.check_late,
        earlier_masks=config.earlier_masks,
    )
