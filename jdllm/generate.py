"""Completes one prompt, or a file of them, says what it cost, and shows how it came about.

python -m jdllm.generate prompt="Fill in this sudoku ..." model=GSAI-ML/LLaDA-8B-Instruct
python -m jdllm.generate prompt="..." viz=live trace=run.jsonl html=run.html
python -m jdllm.generate file=prompts.jsonl output=results/prompts executor=ray workers=4
"""

from jdllm.generation import GenerateConfig, generate
from jdllm.runtime import cli


def main(config: GenerateConfig) -> None:
    """Completes the prompt, or shows a recorded run, and writes the files that were asked for."""
    generate(config)


if __name__ == "__main__":
    cli.run(main, GenerateConfig, "python -m jdllm.generate")
