"""Starts one command as several processes of this machine, and ends all where one is lost.

python -m jdllm.launch processes=2 devices=4 jdllm.eval mesh=8x1 output=results/two
python -m jdllm.launch processes=2 devices=4 jdllm.sft mesh=4x2 task=sudoku output=runs/two
"""

import sys
from collections.abc import Sequence

from jdllm.runtime import cli
from jdllm.runtime.launch import LaunchConfig, launch, split

PROG = "python -m jdllm.launch"


def main(words: Sequence[str]) -> int:
    """Runs the command; the exit status is that of the first process that failed, else 0."""
    own, command = split(words)
    config = cli.parse(LaunchConfig, own, PROG)
    if not command:
        print(f"error: {PROG} needs a module to run, such as jdllm.eval", file=sys.stderr)
        return 2
    return launch(config, command)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
