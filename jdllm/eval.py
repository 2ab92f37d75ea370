"""Evaluates a model on tasks through lm-eval; without arguments, the bundled one on 100 sudokus.

python -m jdllm.eval
python -m jdllm.eval task=countdown limit=20 decode.threshold=0.8 output=results/countdown
python -m jdllm.eval task=gsm8k,mmlu data=FOLDER model=FOLDER output=results/llada
"""

from jdllm.evaluation.config import EvalConfig
from jdllm.evaluation.run import main
from jdllm.runtime import cli

if __name__ == "__main__":
    cli.run(main, EvalConfig, "python -m jdllm.eval")
