"""Completes one prompt, and says what it cost.

python -m jdllm.generate prompt="Fill in this sudoku ..." model=GSAI-ML/LLaDA-8B-Instruct
"""

import dataclasses

from jdllm import cli, sharding
from jdllm.decode import DecodeConfig
from jdllm.load import enable_compilation_cache


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Generation from one prompt."""

    prompt: str
    """The user's message."""
    model: str = "bundled"
    """bundled, a converted folder, random:<name>, or a Hugging Face folder or id."""
    decode: DecodeConfig = DecodeConfig()
    chat: bool = True
    """Frame the prompt with the model's chat template; false passes it on as it is."""
    mesh: str = "auto"
    """data x model, for example 1x4; auto is data parallel where the model fits a device."""
    dtype: str = "auto"
    """Compute dtype; auto keeps the stored one, on a CPU float32."""
    seed: int = 0
    """Seed of the weights of random:<name>; sampling has decode.seed."""

    def __post_init__(self):
        if not self.prompt.strip():
            raise ValueError('prompt is empty; write prompt="some text"')


def main(config: GenerateConfig) -> None:
    """Prints the completion, then a line with what it cost."""
    from jdllm.llm import LLM

    enable_compilation_cache()
    llm = LLM.load(config.model, config.mesh, config.dtype, config.seed)
    (batch,) = llm.stream([config.prompt], config.decode, chat=config.chat)
    completion = batch.completions[0]
    tokens = len(completion.ids)
    print(completion.text)
    print(
        f"\nfinish {completion.finish_reason}, {tokens} tokens, NFE {completion.nfe}, "
        f"{tokens / batch.seconds:.1f} tokens/s on {sharding.describe(llm.mesh)} "
        f"(compilation {batch.compile_seconds:.1f} s apart)"
    )


if __name__ == "__main__":
    cli.run(main, GenerateConfig, "python -m jdllm.generate")
