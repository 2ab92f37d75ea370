"""Walls of the operating system around a process: namespaces, Landlock or seccomp; and limits."""

import ctypes
import os
import resource
import struct
import sys

from jdllm.tasks.graders.guard import filter

LARGEST_FILE = 16 << 20  # bytes
LARGEST_FOLDER = 64 << 20  # bytes in all, where the folder is a file system of its own
OPEN_FILES = 64
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
CAPSET = {"x86_64": 126, "aarch64": 91}
MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

libc = ctypes.CDLL(None, use_errno=True)


def _must(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def limit(timeout: float, memory: int) -> None:
    """Bounds seconds, processor seconds, address space and files of this process for good."""
    seconds = int(timeout) + 1
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(what, (most, most))
        except (OSError, ValueError):
            if sys.platform == "linux":  # others do not have all of them
                raise
    libc.alarm(seconds + 2)  # should whoever started this be gone


def namespaces(home: str, readable: list[str]) -> None:
    """Moves this process into a file system of `readable`, read-only, and a `home` in memory.

    It has no network, shares no memory with others, and its children are a world of their own,
    which ends with the first of them. OSError where the kernel does not let ordinary users do so.
    """
    user, group = os.getuid(), os.getgid()
    os.unshare(
        os.CLONE_NEWUSER
        | os.CLONE_NEWNS
        | os.CLONE_NEWPID
        | os.CLONE_NEWNET
        | os.CLONE_NEWIPC
        | os.CLONE_NEWUTS
    )
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _mount(None, "/", None, MS_PRIVATE | MS_REC)
    _mount("tmpfs", home, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=755,size={1 << 20}")
    for path in (*readable, *DEVICES):
        _show(path, home)
    inner = home + home
    os.makedirs(inner, exist_ok=True)
    _mount("tmpfs", inner, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=700,size={LARGEST_FOLDER}")
    os.chdir(home)
    pivot = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    _must(libc.syscall(pivot, b".", b"."), "pivot_root")
    _must(libc.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    _mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV | 1)
    os.chdir(home)


def _show(path: str, root: str) -> None:
    """Lets a file, folder or link be seen below a new root, read-only."""
    place = root + path
    if not os.path.exists(path) or os.path.exists(place):
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.mkdir(place)
    else:
        open(place, "w").close()
    _mount(path, place, None, MS_BIND | MS_REC)
    read_only = struct.pack("=4Q", 1, 0, 0, 0)
    arguments = (AT_FDCWD, place.encode(), AT_RECURSIVE, read_only, len(read_only))
    _must(libc.syscall(MOUNT_SETATTR, *arguments), f"read-only {path}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    words = [word and word.encode() for word in (source, target, kind)]
    arguments = (*words, ctypes.c_ulong(flags), data.encode() or None)
    _must(libc.mount(*arguments), f"mount {target}")


def landlock(home: str, readable: list[str]) -> None:
    """Lets this process read files only below `readable`, and change them only below `home`.

    OSError where the kernel has no Landlock.
    """
    version = _must(libc.syscall(LANDLOCK_CREATE, None, 0, 1), "landlock")
    files = (1 << (13 + (version >= 2) + (version >= 3))) - 1  # every right over files and folders
    tcp = 0b11 if version >= 4 else 0
    scoped = 0b11 if version >= 6 else 0  # abstract sockets and signals
    rules = struct.pack("=3Q", files, tcp, scoped)[: 8 + 8 * (version >= 4) + 8 * (version >= 6)]
    handle = _must(libc.syscall(LANDLOCK_CREATE, rules, len(rules), 0), "landlock")
    folder, file = 0b1101, 0b101  # to run, read files, read folders
    paths = [(path, folder if os.path.isdir(path) else file) for path in readable]
    paths += [(device, 0b111 | (files & 1 << 14)) for device in DEVICES] + [(home, files)]
    for path, rights in paths:
        if not os.path.exists(path):
            continue
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, opened)
        _must(libc.syscall(LANDLOCK_ADD, handle, 1, rule, 0), f"landlock {path}")
        os.close(opened)
    _no_new_rights()
    _must(libc.syscall(LANDLOCK_RESTRICT, handle, 0), "landlock")
    os.close(handle)


def seccomp(home: str, readable: list[str]) -> None:
    """Does nothing yet: confine() is all of this sandbox, and refuses every change of files."""


def none(home: str, readable: list[str]) -> None:
    """Does nothing: without a sandbox there are only the limits."""


KINDS = {each.__name__: each for each in (namespaces, landlock, seccomp, none)}


def _no_new_rights() -> None:
    _must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def confine(kind: str, child: int = 0) -> None:
    """Builds the last walls: no capabilities, filtered calls, no new processes.

    The process may send signals to itself and its `child` only.
    """
    if kind == "none":
        return
    _no_new_rights()
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    machine = os.uname().machine
    if machine in CAPSET:
        _must(libc.syscall(CAPSET[machine], header, nothing), "capset")
    filter.install({os.getpid(), child or os.getpid()}, writes=kind != "seccomp")


def follow() -> None:
    """Has the kernel end this process when its parent ends."""
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)


def hide() -> None:
    """Hides the memory of this process from others of the same user."""
    if sys.platform == "linux":
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
