"""Says whether this machine can generate, and what to do where it cannot.

python -m jdllm.doctor
python -m jdllm.doctor json=true        # one JSON object instead of the table
python -m jdllm.doctor seconds=900      # a machine that compiles slowly
"""

from jdllm.checkup import DoctorConfig, report
from jdllm.runtime import cli


def main(config: DoctorConfig) -> None:
    """Prints the table; exit status 1 where something is WRONG."""
    if not report(config):
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main, DoctorConfig, "python -m jdllm.doctor")
