"""Running what models write: each program in a fresh, limited interpreter (guard.py); pass@k.

No program of a model is run unless the user confirms it; resolve() asks before anything is
generated.
"""

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 5.0  # seconds; twice HumanEval's own, for busy machines
MEMORY = 4 << 30  # bytes of address space: libraries for numbers reserve much more than they use
KS = (1, 5, 10, 25, 50, 100)
GUARD = Path(__file__).with_name("guard.py")
# A program sees none of our environment, and numpy starts no threads, which are refused.
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """How a program ended: "passed", "timed out", "killed", or its error."""

    passed: bool
    what: str


def run(program: str, *, timeout: float = TIMEOUT, memory: int = MEMORY) -> Outcome:
    """Runs a program in a fresh interpreter, a temporary folder and a process group of its own.

    It has `timeout` seconds, `memory` bytes, no network, no other processes, and may change files
    in its folder only. It passes when it runs to its end without an error: leaving early, even
    with exit code 0, is not passing. Whatever it started is killed with it.
    """
    token = secrets.token_hex(16)
    facts = {"token": token, "timeout": timeout, "memory": memory}
    with tempfile.TemporaryDirectory(prefix="jdllm-program-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(GUARD)],
            cwd=folder,
            env=ENVIRONMENT | {"HOME": folder, "TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        sent = f"{json.dumps(facts)}\n{program}".encode(errors="replace")
        try:
            said, _ = process.communicate(sent, timeout=timeout + 1)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    known, _, what = said.decode(errors="replace").partition(" ")
    if known == token:
        return Outcome(what == "passed", what)
    timed_out = -process.returncode in (signal.SIGALRM, signal.SIGXCPU)
    return Outcome(False, "timed out" if timed_out else f"ended early ({process.returncode})")


def run_all(programs: Sequence[str], *, timeout: float = TIMEOUT) -> list[Outcome]:
    """run() of each program, as many at once as there are processor cores."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda program: run(program, timeout=timeout), programs))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that k of the samples, drawn without replacement, hold a right one.

    The unbiased estimate of Codex: 1 - C(samples - right, k) / C(samples, k). ValueError where
    there are fewer samples than k.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs {k} samples or more of each document, not {samples}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def ks(samples: int) -> list[int]:
    """The k to report for a number of samples: the usual ones up to it, and itself."""
    return sorted({k for k in KS if k < samples} | {samples, 1})


def scores(programs: Sequence[str]) -> dict[str, float]:
    """pass@k of one document's programs, tests included, for every k of ks()."""
    right = sum(outcome.passed for outcome in run_all(programs))
    return {f"pass@{k}": pass_at_k(len(programs), right, k) for k in ks(len(programs))}


class CodeEval:
    """Takes the place of `evaluate.load("code_eval")`, which needs the network and forks."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k=(1,), **_
    ) -> tuple[dict[str, float], dict]:
        """Mean pass@k over documents, as the metric of that name returns it."""
        found: list[tuple[int, int]] = []
        for test, programs in zip(references, predictions, strict=True):
            outcomes = run_all([f"{program}\n{test}" for program in programs])
            found.append((len(programs), sum(outcome.passed for outcome in outcomes)))
        at = [number for number in k if all(number <= samples for samples, _ in found)]
        means = {
            f"pass@{number}": sum(pass_at_k(n, right, number) for n, right in found) / len(found)
            for number in at
        }
        return means, {}
