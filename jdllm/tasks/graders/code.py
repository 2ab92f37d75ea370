"""Running what models write: each program in a sandbox, its tests outside of it (guard/); pass@k.

No program of a model is run unless the user confirms it, nor without a sandbox; resolve() asks
before anything is generated.
"""

import contextlib
import functools
import marshal
import math
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 5.0  # seconds; twice HumanEval's own, for busy machines
MEMORY = 4 << 30  # bytes of address space: libraries for numbers reserve much more than they use
KS = (1, 5, 10, 25, 50, 100)
GUARD = Path(__file__).with_name("guard") / "__main__.py"
# A program sees none of our environment, and numpy starts no threads.
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
LIBRARIES = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
SYSTEM = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime"]
READABLE = [*dict.fromkeys([sys.base_prefix, *LIBRARIES, *SYSTEM])]
# The best first; each is tried on an empty program.
SANDBOXES = {
    "namespaces": "namespaces (users, files, processes, network) and a filter of system calls",
    "landlock": "Landlock and a filter of system calls",
    "seccomp": "a filter of system calls alone",
}
CHOICE = "JDLLM_SANDBOX"
OPEN = f"set {CHOICE}=none to run them with limits alone, in a container that you can lose"


@dataclass(frozen=True)
class Outcome:
    """How a program ended: "passed", "timed out", "ended early", or its or its tests' error."""

    passed: bool
    what: str


@functools.cache
def sandbox() -> str:
    """Returns the name of the sandbox that programs run in: the best that this machine has.

    The environment variable JDLLM_SANDBOX names another one, or "none". ValueError where there is
    none and that was not asked for.
    """
    choice = os.environ.get(CHOICE)
    if choice is not None and choice not in {*SANDBOXES, "none"}:
        raise ValueError(f"{CHOICE}={choice} is none of {', '.join(SANDBOXES)} and none")
    if choice == "none":
        return choice
    if sys.platform != "linux":
        raise ValueError(f"programs of models need a sandbox of Linux; {OPEN}")
    tried = {name: _run("", "", name) for name in ([choice] if choice else SANDBOXES)}
    for name, outcome in tried.items():
        if outcome.passed:
            return name
    why = "; ".join(outcome.what for outcome in tried.values())
    raise ValueError(
        f"programs of models have no sandbox on this machine ({why}): run on Linux 5.13 or newer, "
        f"or {OPEN}"
    )


def described() -> str:
    """Returns what sandbox() found, in words."""
    return SANDBOXES.get(sandbox(), "no sandbox: limits on time and memory alone")


def run(program: str, tests: str, *, timeout: float = TIMEOUT, memory: int = MEMORY) -> Outcome:
    """Runs tests on a program, each in a fresh process, the program's in a sandbox.

    They have `timeout` seconds and `memory` bytes each, no network, no other processes, and the
    program may change files in a temporary folder only. It passes when the tests run to their end
    without an error. They reach what the program defines by its names, and judge copies of its
    values; the program sees neither them nor the verdict. Whatever it started is killed with it.
    """
    return _run(program, tests, sandbox(), timeout, memory)


def _run(
    program: str, tests: str, kind: str, timeout: float = TIMEOUT, memory: int = MEMORY
) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="jdllm-program-", ignore_cleanup_errors=True) as folder:
        home = os.path.realpath(folder)
        facts = {"sandbox": kind, "timeout": timeout, "memory": memory, "home": home}
        facts |= {"readable": READABLE, "path": LIBRARIES}
        sent = marshal.dumps({"program": program, "tests": tests})
        with subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), marshal.dumps(facts).hex()],
            cwd=home,
            env=ENVIRONMENT | {"HOME": home, "TMPDIR": home},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(sent, timeout=timeout)
            except subprocess.TimeoutExpired:
                return Outcome(False, "timed out")
            finally:
                _end(process)
    passed, what = said[:1] == b"1", said[1:].decode(errors="replace")
    return Outcome(passed, what or f"the judge ended early ({process.returncode})")


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all of its group, and waits until they are gone, at most one second."""
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.01)


def run_all(
    programs: Sequence[str], tests: str, *, timeout: float = TIMEOUT, memory: int = MEMORY
) -> list[Outcome]:
    """Returns run() of each program, as many at a time as there are processor cores."""
    sandbox()
    one = functools.partial(run, tests=tests, timeout=timeout, memory=memory)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(one, programs))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Returns the chance that k of the samples, drawn without replacement, hold a right one.

    The unbiased estimate of Codex: 1 - C(samples - right, k) / C(samples, k). ValueError where
    there are fewer samples than k.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs {k} samples or more of each document, not {samples}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def ks(samples: int) -> list[int]:
    """Returns the k to report for a number of samples: the usual ones up to it, and itself."""
    return sorted({k for k in KS if k < samples} | {samples, 1})


def scores(programs: Sequence[str], tests: str) -> dict[str, float]:
    """Returns pass@k of one document's programs for every k of ks()."""
    right = sum(outcome.passed for outcome in run_all(programs, tests))
    return {f"pass@{k}": pass_at_k(len(programs), right, k) for k in ks(len(programs))}


class CodeEval:
    """Takes the place of `evaluate.load("code_eval")`, which needs the network and forks."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k=(1,), **_
    ) -> tuple[dict[str, float], dict]:
        """Returns mean pass@k over documents, as the metric of that name returns it."""
        found: list[tuple[int, int]] = []
        for tests, programs in zip(references, predictions, strict=True):
            outcomes = run_all(programs, tests)
            found.append((len(programs), sum(outcome.passed for outcome in outcomes)))
        at = [number for number in k if all(number <= samples for samples, _ in found)]
        means = {
            f"pass@{number}": sum(pass_at_k(n, right, number) for n, right in found) / len(found)
            for number in at
        }
        return means, {}
