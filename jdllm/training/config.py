"""What a fine-tuning run is asked for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from jdllm.arguments import ModelArgs
from jdllm.load import compute_dtype
from jdllm.model.config import ModelConfig
from jdllm.model.lora import LoraConfig
from jdllm.model.transformer import Remat
from jdllm.runtime.fields import Presets
from jdllm.runtime.hints import asked, nearest
from jdllm.train.objective import OBJECTIVES, Objective, choose
from jdllm.train.optimiser import Recipe
from jdllm.training.adapt import AdaptArgs
from jdllm.training.data import Source, parse_data, parse_gap, parse_tasks
from jdllm.training.dynamics import DynamicsConfig
from jdllm.training.presets import PRESETS, REFUSED
from jdllm.training.rows import parse_padding

SAVE_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LossArgs:
    """What is changed of the objective."""

    low: float | None = None
    """Least share of the response that is masked (default: the objective's)."""
    high: float | None = None
    """Largest share of the response that is masked (default: the objective's)."""
    cart: float | None = None
    """The p of CART's geometric distribution (default: the objective's)."""
    cutoff: bool | None = None
    """Let all responses of a batch end with that of a random row (default: the objective's)."""
    complementary: bool | None = None
    """Feed every row twice, the second time with the other response columns masked (default: the
    objective's)."""
    confidence: float = 0.0
    """Weight of the entropy of tokens that are right already (LLaDA2.0's CAP); 0 is off."""

    def __post_init__(self):
        self.adapted(Objective())  # so that levels that cannot be are refused here

    def adapted(self, objective: Objective) -> Objective:
        """An objective with these changes."""
        changes = {name: value for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(objective, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(ModelArgs):
    """Masked-diffusion fine-tuning."""

    presets: ClassVar[Presets] = PRESETS
    refused: ClassVar[Mapping[str, str]] = REFUSED
    preset: str | None = None
    """Settings of a published recipe."""
    output: Path
    """Folder for checkpoints, metrics.jsonl and, at the end, model/. An old run here resumes."""
    tokenizer: str | None = None
    """Folder of the tokenizer (or "bundled"); default: the model's own."""
    data: str | None = None
    """Training text, with shares: a.jsonl:2,b.jsonl:1. Also .txt, folders, hub ids (name@split)."""
    task: str | None = None
    """Generated tasks instead of a file, with shares: sudoku:1,countdown:3."""
    examples: int = 100_000
    """How many examples to generate."""
    length: int = 512
    """Columns of a canvas."""
    response_length: int | None = None
    """End each canvas this many columns after its prompt (default: every row fills `length`)."""
    padding: str = "eos"
    """What fills a canvas and is learned: eos, rainbow:7 (eos, then a cycle of 7 ids), or none."""
    packing: bool = False
    """Put several examples into a row; none sees another, and each has its own noise."""
    group_by_length: bool = False
    """Batches of alike lengths, whose canvases end with the longest of them."""
    hidden_reasoning: str | None = None
    """For objective=distil: so many masks, 128:256, in place of what leads to an answer's #### ."""
    objective: str = "auto"
    """What is learned, by name (docs/objectives.md); auto goes by the model."""
    normalise: Literal["batch", "micro"] = "batch"
    """What a loss is divided over; micro, as EDIT and d1, depends on accumulation."""
    batch: int = 8
    """Rows of one update."""
    accumulation: int = 1
    """Micro-batches that an update is split into."""
    epochs: int | None = None
    """Go through the data so often, in place of recipe.steps."""
    loss: LossArgs = LossArgs()
    adapt: AdaptArgs = AdaptArgs()
    recipe: Recipe = Recipe()
    lora: LoraConfig = LoraConfig()
    dynamics: DynamicsConfig = DynamicsConfig()
    save_dtype: str = "bfloat16"
    """Dtype of the weights in output/model."""
    dtype: str = "auto"
    """Compute dtype; auto is bfloat16, on a CPU float32. What trains stays float32."""
    remat: Remat = "none"
    """What the backward pass computes again to save memory: layers (all of them, a third more
    time), or products: all but the products with weights."""
    seed: int = 0
    """Of random weights, generated examples, the order of rows and the corruption."""
    save_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    logger: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where else the metrics go."""
    eval_data: str | None = None
    """Held-out text, in the forms of data: its loss at fixed noise levels is logged."""
    eval_every: int = 500
    """Steps between held-out losses."""
    sample_prompt: str | None = None
    """Complete this prompt as training goes on, into samples.jsonl."""
    sample_every: int = 500
    """Steps between completions of sample_prompt."""

    def __post_init__(self):
        super().__post_init__()
        if (self.data is None) == (self.task is None):
            raise ValueError("name exactly one source of training text: data=FILE or task=NAME")
        self._check_counts()
        if self.adapter is not None and not self.lora.rank:
            raise ValueError(
                f"adapter={self.adapter} is trained on with lora.rank= alone; to train all "
                "parameters, first add it to its base: python -m jdllm.convert merge"
            )
        if self.adapt.sees != "as_is" and self.lora.rank:
            raise ValueError(
                f"adapt.sees={self.adapt.sees} changes the model itself, which an adapter cannot "
                "carry: train all parameters (lora.rank=0)"
            )
        if self.dynamics.names and not self.lora.rank:
            raise ValueError(
                f"dynamics.windows={self.dynamics.windows} are averages over LoRA's B; set "
                "lora.rank= too"
            )
        if self.save_dtype not in SAVE_DTYPES:
            names = ", ".join(SAVE_DTYPES)
            raise ValueError(f"save_dtype={self.save_dtype} must be one of {names}")
        if self.dtype != "auto":  # which asks the devices: too early where processes will join
            compute_dtype(self.dtype, "bfloat16")
        if self.objective not in ("auto", *OBJECTIVES):
            hint = asked(nearest(self.objective, OBJECTIVES))
            known = hint or f"there are auto, {', '.join(OBJECTIVES)}"
            raise ValueError(f"objective={self.objective} is unknown; {known}")
        if (self.objective == "distil") != (self.gap is not None):
            raise ValueError("objective=distil and hidden_reasoning=128:256 need each other")
        if self.objective == "distil" and not self.lora.rank:
            raise ValueError(
                "objective=distil learns from the model without its factors; set lora.rank="
            )
        parse_padding(self.padding)
        alone = {"group_by_length": self.group_by_length, "loss.cutoff": self.loss.cutoff}
        for name, on in alone.items():
            if self.packing and on:
                raise ValueError(f"{name}=true is for rows of one example: leave packing off")
        _ = self.sources, self.held_out

    def _check_counts(self) -> None:
        """ValueError for a number that is too small, or that does not divide another."""
        optional = ("response_length", "epochs")
        counts = (
            "examples", "length", "batch", "accumulation", "save_every", "log_every", "eval_every",
            "sample_every", *(name for name in optional if getattr(self, name) is not None),
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if self.batch % self.accumulation:
            raise ValueError(
                f"accumulation={self.accumulation} must divide batch={self.batch}: "
                "micro-batches have equal size"
            )

    @property
    def gap(self) -> tuple[int, int] | None:
        """The least and the largest number of columns of a hidden reasoning."""
        return None if self.hidden_reasoning is None else parse_gap(self.hidden_reasoning)

    @property
    def sources(self) -> list[Source]:
        """Where the training text comes from."""
        return parse_tasks(self.task or "") if self.data is None else parse_data(self.data)

    @property
    def held_out(self) -> list[Source]:
        """Where the held-out text comes from; empty without one."""
        return [] if self.eval_data is None else parse_data(self.eval_data, "eval_data")

    def objective_of(self, model: ModelConfig) -> Objective:
        """The objective for a model, with what the settings change; ValueError for a misfit."""
        found = self.loss.adapted(choose(self.objective, model))
        return dataclasses.replace(
            found, cutoff=found.cutoff and not self.packing, anneal=self.adapt.anneal
        )

    @property
    def going_on(self) -> str:
        """How to go on after an interrupt."""
        return f"the same command goes on from the last checkpoint in {self.output}"
