"""One command as several processes of this machine, all of which end where one is lost.

Process 0 speaks; what the others print is kept and shown where one of them fails. On a cluster its
own launcher (srun, mpirun) takes this place.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO

from jdllm.runtime import signals

GRACE_SECONDS = 10  # between asking a process to end and ending it


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Several processes of this machine."""

    processes: int = 2
    devices: int | None = None
    """Devices of each process (default: all that it sees); on a CPU so many virtual ones."""
    port: int | None = None
    """Port of process 0 (default: a free one)."""

    def __post_init__(self):
        if self.processes < 1 or (self.devices or 1) < 1:
            raise ValueError("processes and devices must be 1 or more")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's own words, and the module to run with its words."""
    first = next((i for i, w in enumerate(words) if "=" not in w and w[:1] != "-"), len(words))
    return list(words[:first]), list(words[first:])


def environment(config: LaunchConfig, port: int, process: int) -> dict[str, str]:
    """What tells a process its place; see `jdllm.runtime.processes`."""
    place = {
        "JDLLM_COORDINATOR": f"localhost:{port}",
        "JDLLM_NUM_PROCESSES": str(config.processes),
        "JDLLM_PROCESS_ID": str(process),
    }
    if config.devices:
        first = process * config.devices
        ids = range(first, first + config.devices)
        place["JDLLM_LOCAL_DEVICE_IDS"] = ",".join(map(str, ids))
        place["JAX_NUM_CPU_DEVICES"] = str(config.devices)
    return dict(os.environ) | place


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(
    config: LaunchConfig, command: list[str], logs: Sequence[IO[str]]
) -> list[subprocess.Popen]:
    """All processes; {process} in a word becomes the number of the process."""
    port = config.port or free_port()
    started = []
    for process, log in enumerate(logs):
        words = [word.replace("{process}", str(process)) for word in command]
        out = None if process == 0 else log
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *words],
                env=environment(config, port, process),
                stdout=out,
                stderr=None if process == 0 else subprocess.STDOUT,
            )
        )
    return started


def wait(children: list[subprocess.Popen]) -> tuple[int, int] | None:
    """Waits for all to end well, or for the first that does not: its number and exit status."""
    running = {child.pid: process for process, child in enumerate(children)}
    while running:
        # Wakes at the first end: what the others die of in turn must not be taken for the cause.
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        process = running.pop(ended.si_pid if ended else 0)
        if status := children[process].wait():
            return process, status
    return None


def end(children: list[subprocess.Popen]) -> None:
    """Ends those that still run."""
    for child in children:
        child.terminate()
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
        child.kill()
        child.wait()


def launch(config: LaunchConfig, command: list[str]) -> int:
    """Runs a module with its words; returns the status of the first process that failed, else 0."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.raised())
        logs = [
            stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            for _ in range(config.processes)
        ]
        children = start(config, command, logs)
        try:
            lost = wait(children)
        except KeyboardInterrupt as error:
            status = signals.status(error)
            if status == 128 + signal.SIGINT:  # the terminal has told all processes
                with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                    children[0].wait(GRACE_SECONDS)
            return status
        finally:
            end(children)
        if lost is None:
            return 0
        process, status = lost
        logs[process].seek(0)
        said = logs[process].read().strip().splitlines()[-20:]
        how = f"signal {-status}" if status < 0 else f"status {status}"
        print("\n".join(said), file=sys.stderr)
        print(
            f"error: process {process} of {config.processes} was lost ({how}); ended the others",
            file=sys.stderr,
        )
        return status if status > 0 else 128 - status
