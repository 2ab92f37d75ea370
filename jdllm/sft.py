"""Fine-tunes all parameters, or LoRA factors, with the masked-diffusion objective.

python -m jdllm.sft data=chats.jsonl model=GSAI-ML/LLaDA-8B-Instruct output=runs/mine
python -m jdllm.sft task=sudoku model=random:bundled tokenizer=bundled output=runs/sudoku
python -m jdllm.sft task=sudoku:1,countdown:3 model=models/mine output=runs/lora lora.rank=16

A killed run is continued by the same command and ends in the same bits. docs/training.md explains.
"""

from jdllm.runtime import cli
from jdllm.training.config import SFTConfig
from jdllm.training.run import fine_tune


def main(config: SFTConfig) -> None:
    """Trains, then writes output/model or output/adapter; a finished run is left as it is."""
    fine_tune(config)


if __name__ == "__main__":
    cli.run(main, SFTConfig, "python -m jdllm.sft")
