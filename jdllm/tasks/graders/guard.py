"""Runs one untrusted program inside limits; started by code.py in a fresh interpreter, as a script.

The first line of standard input is {"token", "timeout", "memory"}, the rest is the program. On
standard output comes the token and "passed", or what went wrong. Nothing is imported but the
standard library.

This is a fence against what models write by mistake, not a prison against an attacker: run models
whose programs you distrust in a container.
"""

import _posixsubprocess
import contextlib
import json
import os
import resource
import signal
import sys

LARGEST_FILE = 16 << 20  # bytes
OPEN_FILES = 64
# Audit events of starting or ending other processes, of the network and of native code.
REFUSED = (
    "os.fork",
    "os.forkpty",
    "os.exec",
    "os.posix_spawn",
    "os.system",
    "os.kill",
    "os.killpg",
    "signal.pthread_kill",
    "subprocess.",
    "pty.",
    "socket.",
    "ctypes.dlsym",
    "ctypes.dlopen",
    "sqlite3.enable_load_extension",
)
CHANGES = (  # events that change the file system; their first arguments are paths
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "sqlite3.connect",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(timeout: float, memory: int) -> None:
    """Bounds processor seconds, address space, files and processes of this process for good."""
    seconds = int(timeout) + 1
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # a second after SIGXCPU, which tells why, the kernel would send SIGKILL
        resource.setrlimit(what, (most, most + 1 if what == resource.RLIMIT_CPU else most))
    # should whoever started this be killed: an end comes all the same
    signal.setitimer(signal.ITIMER_REAL, timeout + 1)


def isolate() -> None:
    """Leaves the network behind, where the kernel lets an ordinary user do so."""
    with contextlib.suppress(OSError, AttributeError):
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWIPC)


def fence(home: str) -> None:
    """Refuses, through an audit hook that cannot be removed, what REFUSED and CHANGES list.

    Files may be changed under `home` only.
    """

    def inside(path: object) -> bool:
        if isinstance(path, int):
            return True  # a descriptor that was opened before, and passed this test then
        found = os.path.realpath(os.fsdecode(path))  # pyright: ignore[reportArgumentType]
        return found == home or found.startswith(home + os.sep) or found == os.devnull

    def hook(event: str, arguments: tuple) -> None:
        itself = event == "ctypes.dlopen" and arguments[0] is None  # importing ctypes opens that
        if event.startswith(REFUSED) and not itself:
            raise PermissionError(f"{event} is refused to programs under test")
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & WRITES
            # A folder's descriptor makes paths relative that this hook takes for others.
            changed = [path] if writes or not isinstance(path, int) and os.path.isdir(path) else []
        elif event in CHANGES:
            changed = [path for path in arguments[:2] if isinstance(path, str | bytes)]
        else:
            return
        if not all(map(inside, changed)):
            raise PermissionError(f"{event} of {changed} is refused to programs under test")

    def refuse(*_: object) -> None:
        raise PermissionError("starting processes is refused to programs under test")

    _posixsubprocess.fork_exec = refuse  # the one way to a process that no hook hears of
    sys.addaudithook(hook)


def main() -> None:
    """Reads limits and program, runs it, and reports on the descriptor standard output had."""
    facts = json.loads(sys.stdin.readline())
    program = compile(sys.stdin.read(), "program", "exec", dont_inherit=True)
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    isolate()
    limit(facts["timeout"], facts["memory"])
    fence(os.path.realpath(os.getcwd()))
    try:
        exec(program, {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: who leaves early has not passed the tests
        verdict = f"{type(error).__name__}: {error}"[:500]
    else:
        verdict = "passed"
    os.write(report, f"{facts['token']} {verdict}".encode(errors="replace"))
    os._exit(0)


if __name__ == "__main__":
    main()
