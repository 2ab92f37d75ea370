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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpreadArgs(DecodingArgs):
    """Decoding that may be spread over the workers of a Ray cluster."""

    executor: Literal["local", "ray"] = "local"
    """ray: workers of a Ray cluster decode, each with the whole model (docs/cluster.md)."""
    workers: int = 0
    """executor=ray: how many (default: as many as the cluster has room for)."""
    gpus: float | None = None
    """executor=ray: GPUs of a worker (default: one per device of the mesh, where there are any)."""

    def __post_init__(self):
        super().__post_init__()
        check_spread(self.executor, {"workers": self.workers}, self.gpus)

    def load_llm(self, verifier: str | None = None) -> "LLM":
        """Loads the model, here or in the workers; ValueError or OSError as from LLM.load."""
        if self.executor == "local":
            return super().load_llm(verifier)
        from jdllm.cluster.fleet import Fleet

        settings = {
            "model": self.model, "mesh": self.mesh, "dtype": self.dtype, "seed": self.seed,
            "verifier": verifier or self.verifier, "allow_unknown": self.allow_unknown,
            "kernel": self.kernel, "adapter": self.adapter, "engine": self.engine,
        }  # fmt: skip
        return Fleet.start(settings, self.workers, self.gpus)


def check_spread(executor: str, counts: dict[str, int], gpus: float | None) -> None:
    """ValueError for settings of a cluster that are none, or that come without executor=ray."""
    given = {name: n for name, n in counts.items() if n} | ({} if gpus is None else {"gpus": gpus})
    for name, number in given.items():
        if executor == "local":
            raise ValueError(f"{name}={number} belongs to executor=ray; add that, or leave it out")
        if number < 0:
            raise ValueError(f"{name}={number} must be 0 or more")
