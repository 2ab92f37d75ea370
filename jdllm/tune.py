"""Finds the fastest decode settings whose accuracy stays within a bound, and writes them.

python -m jdllm.tune max_drop=0.5                     # bundled model, sudoku; writes tuned.json
python -m jdllm.tune task=countdown max_drop=1 output=tuned.json
python -m jdllm.eval task=sudoku decode_file=tuned.json
"""

from jdllm.evaluation.tuning import TuneConfig, main
from jdllm.runtime import cli

if __name__ == "__main__":
    cli.run(main, TuneConfig, "python -m jdllm.tune")
