"""Runs a plan of models x tasks x decode settings, and reports it; run again to go on after a kill.

python -m jdllm.sweep                                              # twelve settings, bundled model
python -m jdllm.sweep plan=plan.yaml limit=200 dry_run=true            # an estimate, nothing run
python -m jdllm.sweep plan=dllmexp confirm_run_unsafe_code=true output=results/dllmexp
"""

from jdllm.evaluation.sweeps import SweepConfig, main
from jdllm.runtime import cli

if __name__ == "__main__":
    cli.run(main, SweepConfig, "python -m jdllm.sweep")
