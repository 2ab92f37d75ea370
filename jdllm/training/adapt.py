"""A causal model made a diffusion model: what is changed of its facts before it is trained."""

import dataclasses
from typing import Literal

from jdllm.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class AdaptArgs:
    """What a causal model is to become; its weights stay, what it sees changes."""

    sees: Literal["as_is", "full", "blocks"] = "as_is"
    """full: every column sees every other; blocks: it sees its own block and earlier ones."""
    block: int = 32
    """Columns of a block."""
    shift: bool = False
    """Keep predicting column i in row i - 1, as the causal model did."""
    mask_id: int | None = None
    """The id that stands for a token still to come: one that the tokenizer does not use."""
    anneal: int = 0
    """Updates in which later columns come into sight, at random, more of them with each (full)."""

    def __post_init__(self):
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if self.sees == "as_is" and changed:
            raise ValueError(
                f"adapt.{changed[0]} does nothing without adapt.sees=full or adapt.sees=blocks"
            )
        if self.sees != "as_is" and self.mask_id is None:
            raise ValueError(
                "adapt.sees= needs adapt.mask_id=, an id that the tokenizer does not use; of "
                "Qwen2.5 151665"
            )
        if self.block < 1:
            raise ValueError(f"adapt.block={self.block} must be at least 1")
        if self.anneal < 0 or (self.anneal and self.sees != "full"):
            raise ValueError(
                f"adapt.anneal={self.anneal} must be a number of updates, with adapt.sees=full"
            )

    def applied(self, config: ModelConfig) -> ModelConfig:
        """The facts of the model that is trained. ValueError where they cannot be these.

        Seeing everything with shifted logits is Dream's form, and can be exported as such.
        """
        if self.sees == "as_is":
            return config
        if not config.causal:
            raise ValueError(
                f"adapt.sees={self.sees} is for causal models, and this one is a diffusion model; "
                "leave adapt out"
            )
        mask_id = self.mask_id or 0
        if not 0 <= mask_id < config.vocab:
            raise ValueError(
                f"adapt.mask_id={mask_id} must be one of the {config.vocab} ids of the model"
            )
        return dataclasses.replace(
            config,
            causal=False,
            mask_id=mask_id,
            shift_logits=self.shift,
            block_causal=self.block if self.sees == "blocks" else None,
            family="dream" if self.sees == "full" and self.shift else "adapted",
        )
