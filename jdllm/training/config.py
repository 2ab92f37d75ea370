"""What a fine-tuning run is asked for."""

import dataclasses
from pathlib import Path

from jdllm.arguments import ModelArgs
from jdllm.load import compute_dtype
from jdllm.model.lora import LoraConfig
from jdllm.train.optimiser import Recipe
from jdllm.training.data import parse_mixture
from jdllm.training.dynamics import DynamicsConfig

SAVE_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(ModelArgs):
    """Masked-diffusion fine-tuning."""

    output: Path
    """Folder for checkpoints, metrics.jsonl and, at the end, model/. An old run here resumes."""
    tokenizer: str | None = None
    """Folder of the tokenizer (or "bundled"); default: the model's own."""
    data: Path | None = None
    """Training text: .jsonl (prompt and response, or messages, or text) or .txt."""
    task: str | None = None
    """Generated tasks instead of a file, with shares: sudoku:1,countdown:3."""
    examples: int = 100_000
    """How many examples to generate."""
    length: int = 512
    """Columns of a canvas."""
    response_length: int | None = None
    """End each canvas this many columns after its prompt (default: every row fills `length`)."""
    batch: int = 8
    """Rows of one update."""
    accumulation: int = 1
    """Micro-batches that an update is split into."""
    recipe: Recipe = Recipe()
    lora: LoraConfig = LoraConfig()
    dynamics: DynamicsConfig = DynamicsConfig()
    save_dtype: str = "bfloat16"
    """Dtype of the weights in output/model."""
    dtype: str = "auto"
    """Compute dtype; auto is bfloat16, on a CPU float32. What trains stays float32."""
    remat: bool = False
    """Compute layers again in the backward pass: less memory, a third more time."""
    seed: int = 0
    """Of random weights, generated examples, the order of rows and the corruption."""
    save_every: int = 500
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self):
        super().__post_init__()
        if (self.data is None) == (self.task is None):
            raise ValueError("name exactly one source of training text: data=FILE or task=NAME")
        counts = ("examples", "length", "batch", "accumulation", "save_every", "log_every")
        for name in counts + ("response_length",) * (self.response_length is not None):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if self.batch % self.accumulation:
            raise ValueError(
                f"accumulation={self.accumulation} must divide batch={self.batch}: "
                "micro-batches have equal size"
            )
        if self.adapter is not None and not self.lora.rank:
            raise ValueError(
                f"adapter={self.adapter} is trained on with lora.rank= alone; to train all "
                "parameters, first add it to its base: python -m jdllm.convert merge"
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
        if self.task is not None:
            parse_mixture(self.task)

    @property
    def going_on(self) -> str:
        """How to go on after an interrupt."""
        return f"the same command goes on from the last checkpoint in {self.output}"
