"""Measures decoding: blocked and cached against vanilla, and model calls per second over a grid.

python -m jdllm.bench                                          # bundled model, generated puzzles
python -m jdllm.bench dataset=sample_200.jsonl source=gsm8k model=GSAI-ML/LLaDA-8B-Instruct
python -m jdllm.bench grid model=random:tiny blocks=8,16 batches=1,4 caches=none,dual
"""

import sys

from jdllm.evaluation import bench, grid
from jdllm.runtime import cli

if __name__ == "__main__":
    if sys.argv[1:2] == ["grid"]:
        del sys.argv[1]
        cli.run(grid.main, grid.GridConfig, "python -m jdllm.bench grid")
    else:
        cli.run(bench.main, bench.BenchConfig, "python -m jdllm.bench")
