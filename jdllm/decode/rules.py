"""What the words of a DecodeConfig stand for: tables of rules, and the objects made of them.

A new rule is a class in its room and a row here; the settings, their choices and their help follow.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from jdllm import stop as stops
from jdllm import unmask
from jdllm.model.config import ModelConfig
from jdllm.unmask.indel import InDel
from jdllm.unmask.speculate import Speculate

if TYPE_CHECKING:  # config.py reads the names in the tables
    from jdllm.decode.config import DecodeConfig

SELECTIONS: dict[str, Callable[["DecodeConfig"], unmask.Selection]] = {
    "threshold": lambda c: unmask.Threshold(bar(c), c.edge or "at_least"),
    "factor": lambda c: unmask.Factor(c.factor),
    "quota": lambda c: unmask.Quota(),
    "hierarchy": lambda c: unmask.Hierarchy(bar(c), c.low_threshold),
    "entropy_bound": lambda c: unmask.EntropyBound(c.entropy_bound),
    "origin": lambda c: unmask.Share(),
    "allowance": lambda c: unmask.Allowance(bar(c)),
    "klass": lambda c: unmask.Threshold(bar(c), "above"),
}
"""decode.rule: which columns are filled in a step."""
WHOLE_RULES: dict[str, str] = {"verify": "a causal model decides how much of a draft is kept"}
"""decode.rule as well: those that are no selection but a rule of their own."""

CONFIDENCES: dict[str, Callable[["DecodeConfig", tuple[int, ...]], unmask.Confidence]] = {
    "low_confidence": lambda c, ends: unmask.Probability(ends if c.confidence_eos_eot_inf else ()),
    "random": lambda c, ends: unmask.Random(),
    "leftright": lambda c, ends: unmask.Leftmost(),
    "topk_margin": lambda c, ends: unmask.Margin(),
    "entropy": lambda c, ends: unmask.NegativeEntropy(),
}
"""decode.remasking: what columns are ranked by."""

STOPS: dict[str, Callable[["DecodeConfig", ModelConfig], stops.Stop]] = {
    "eos": lambda c, m: stops.EosStop(m.eos_id, m.stop_ids, after_block=c.edit.on),
    "eos_fill": lambda c, m: stops.EosFill(m.eos_id),
    "eos_block": lambda c, m: stops.EosBlock(m.eos_id, fill=c.stop_fill),
    "eos_return": lambda c, m: stops.EosReturn(m.eos_id),
    "eos_any": lambda c, m: stops.EosAnywhere(m.eos_id),
    "none": lambda c, m: stops.NoStop(),
}
"""decode.stop: when a row ends before its canvas is full."""

Finish = tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]]
EXITS: dict[str, tuple[Callable[["DecodeConfig"], stops.Signal], Finish]] = {
    "code": (lambda c: drift(c), ((0.05,), (6,), (2,))),
    "paper": (lambda c: drift(c), ((0.05,), (6,), (2,))),
    "step": (lambda c: stops.Steps(), ((), (1,), (0,))),
    "unchanged": (lambda c: stops.Unchanged(), ((0.0,), (3,), (0,))),
    "entropy": (lambda c: stops.Entropy(), ((0.1,), (1,), (0,))),
    "prophet": (lambda c: stops.Prophet(), ((1.0,), (1,), (0,))),
    "sched": (lambda c: stops.SchED(c.exit.curve), ((1.0,), (1,), (0,))),
}
"""decode.exit.mode: the signal, and its usual threshold, patience and polish."""


def drift(config: "DecodeConfig") -> stops.Drift:
    """EDIT's signal; whoever has the adapter fills in its modules."""
    width = max(config.block_lengths, default=config.block_length or 1)
    paper = config.exit.mode == "paper"
    return stops.Drift(width, paper, config.exit.temperature, bool(config.cfg_scale))


def bar(config: "DecodeConfig") -> float:
    """The threshold as confidences are compared with it: those of entropy are negative."""
    threshold = config.threshold or 0.0
    return -threshold if config.remasking == "entropy" else threshold


def make_rule(config: "DecodeConfig", model: ModelConfig) -> unmask.Rule:
    """The rule that a resolved `config` describes, for the special ids of `model`."""
    greedy, excluded = config.temperature == 0, (model.mask_id,)
    end_of_turn = tuple(i for i in model.stop_ids if i != model.eos_id)
    # The reference writes -inf into both tensors, which are one and the same at temperature 0.
    ends = (model.eos_id, *end_of_turn) if greedy else end_of_turn
    divides = config.sampling == "categorical"
    noise = 1.0 if divides and not greedy else config.temperature
    warp = None
    if config.top_p is not None or config.top_k is not None or (divides and not greedy):
        heat = config.temperature if divides else 0.0
        warp = unmask.Warp(heat, config.top_p, config.top_k, bool(config.top_k_first), excluded)
    if config.rule == "verify":
        return Speculate(excluded, config.verify.weight, noise, warp=warp)
    edit, asked = None, config.edit
    if asked.threshold is not None:
        edit = unmask.Edit(asked.threshold, asked.passes, asked.penalty)
    if asked.delete_id is not None and asked.split_id is not None and edit is not None:
        return InDel(bar(config), edit.threshold, edit.passes, model.mask_id,
                     asked.delete_id, asked.split_id)  # fmt: skip
    confidence = CONFIDENCES["random" if config.rule == "origin" else config.remasking](
        config, ends
    )
    return unmask.Unmasker(
        candidate=unmask.Argmax(excluded) if greedy else unmask.Gumbel(excluded, noise),
        confidence=unmask.Tempered(confidence, config.alg_temp) if config.alg_temp else confidence,
        selection=SELECTIONS[config.rule](config),
        forbidden=(model.eos_id,) if config.logits_eos_inf else (),
        credit=unmask.Credit(**vars(config.credit)) if config.credit.alpha else None,
        warp=warp,
        edit=edit,
        klass=unmask.Klass(config.klass.kl, config.klass.steps, model.vocab)
        if config.rule == "klass"
        else None,
    )


def make_schedule(config: "DecodeConfig", blocks: int) -> unmask.Schedule:
    """How many tokens a step of a block should reveal."""
    if config.tokens_per_step or not config.steps:
        return unmask.Each(config.tokens_per_step or 1)
    per_block = max(config.steps // blocks, 1)
    if config.rule == "allowance":
        return unmask.CarryOver(per_block)
    if config.schedule == "timesteps":
        return unmask.Timesteps(per_block, config.eps)
    if config.schedule == "gaussian":
        own = config.gaussian
        longest = max(config.block_lengths, default=config.block_length or 1)
        return unmask.Gaussian(steps_of_blocks(config), own.peak, own.width, longest)
    if config.schedule == "columns":  # LLaDA2 counts the steps of every block by itself
        return unmask.Columns(config.block_length or 1, config.steps)
    return unmask.Masks(per_block)


def steps_of_blocks(config: "DecodeConfig") -> tuple[int, ...]:
    """The steps of every block in proportion to its columns; one entry where all are equal."""
    gen, steps = config.gen_length or 1, config.steps or 1
    lengths = config.block_lengths or (config.block_length or 1,)
    return tuple(max(length * steps // gen, 1) for length in lengths)


def make_exit(config: "DecodeConfig") -> stops.Exit:
    """The rule that leaves blocks early, its numbers those of the mode where none are given."""
    asked = config.exit
    signal, (threshold, patience, polish) = EXITS[asked.mode]
    patience = asked.patience or patience
    return stops.Exit(
        signal=signal(config),
        thresholds=asked.threshold or threshold,
        patience=patience,
        required=asked.required or patience,
        polish=asked.polish or polish,
    )


def make_stop(config: "DecodeConfig", model: ModelConfig) -> stops.Stop:
    """The stop rules that `config` names, in order."""
    rules: list[stops.Stop] = []
    if config.exit.on:
        rules.append(make_exit(config))
    if config.stable_steps:
        rules.append(stops.Stable(config.stable_steps))
    if config.max_forwards:
        rules.append(stops.Budget(config.max_forwards))
    ending = STOPS[config.stop](config, model)
    return stops.Stops((*rules, ending)) if rules else ending
