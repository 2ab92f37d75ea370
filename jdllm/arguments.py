"""Arguments: the settings that commands share, as dataclasses that their configs extend.

Fields of a base class are settings of the command like its own: `model=`, `mesh=`, `verifier=`.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jdllm.kernels.choose import parse

if TYPE_CHECKING:  # imported when a model is loaded, so that --help is quick
    from jdllm.llm import LLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """A model, and where it runs."""

    model: str = "bundled"
    """bundled, a converted folder, random:<name>, or a Hugging Face folder or id."""
    adapter: Path | None = None
    """Folder of a LoRA adapter in PEFT's files, which is added to the model."""
    allow_unknown: tuple[str, ...] = ()
    """Keys of a Hugging Face config.json to ignore although their meaning is not known here."""
    mesh: str = "auto"
    """data x model, for example 4x1; auto is data parallel where the model fits a device."""
    dtype: str = "auto"
    """Compute dtype; auto keeps the stored one, on a CPU float32."""
    kernel: str = "auto"
    """Implementations that are forced: reference, or by operation, attention:xla,experts:ragged."""
    seed: int = 0
    """Seed of the generated documents, and of the weights of random:<name>."""

    def __post_init__(self):
        parse(self.kernel)

    def load_llm(self, verifier: str | None = None) -> "LLM":
        """Loads the model; ValueError or OSError as from LLM.load."""
        from jdllm.llm import LLM

        return LLM.load(
            self.model, self.mesh, self.dtype, self.seed, verifier, self.allow_unknown,
            self.kernel, self.adapter,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingArgs(ModelArgs):
    """A model that decodes, and the causal one that decode.rule=verify asks."""

    verifier: str | None = None
    """The causal model that decode.rule=verify asks."""
    engine: Literal["auto", "on", "off"] = "auto"
    """Rows that end make room for others at once; auto: where that pays (docs/engine.md)."""

    def load_llm(self, verifier: str | None = None) -> "LLM":
        """Loads the model with its verifier; ValueError or OSError as from LLM.load."""
        llm = super().load_llm(verifier or self.verifier)
        llm.engine = self.engine
        return llm
