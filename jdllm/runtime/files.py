"""Writes files and folders that are complete or absent, and never written by two processes."""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial-"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a temporary file that is renamed to `path` when the block ends without error."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, facts: Any) -> None:
    """Writes facts as indented JSON, whole or not; what JSON does not know becomes text."""
    with atomic_file(path) as file:
        file.write(json.dumps(facts, indent=2, default=str).encode() + b"\n")


def write_json_lines(path: Path, rows: Iterable[Any], strict: bool = False) -> None:
    """Writes facts as JSON, one per line, whole or not; if `strict`, ValueError for NaN and inf."""
    with atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=not strict).encode() + b"\n")


def refuse_existing(folder: Path) -> None:
    """Raises FileExistsError where `folder` exists: results are never overwritten."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it or name another output")


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents. Raises OSError, in one sentence, where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{folder} cannot be made ({error.strerror or error}): name an output that you may "
            "write to"
        ) from None


def require_writable(path: Path) -> None:
    """Makes the folder of `path`. Raises OSError where a file cannot be written there."""
    make_folder(path.parent)
    partial = path.with_name(path.name + PARTIAL + uuid.uuid4().hex[:8])
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}): name an output that you may "
            "write to"
        ) from None


def require_space(folder: Path, size: int) -> None:
    """Raises OSError where the disk of an existing folder has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"{size / 1e9:.2f} GB are needed, but the disk of {folder.parent} has "
            f"{free / 1e9:.2f} GB free: make room or name another output"
        )


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `folder` when the block ends without error.

    What an interrupted earlier attempt left behind is removed first. Raises FileExistsError where
    `folder` exists, or where another process is writing it now.
    """
    folder = folder.absolute()
    refuse_existing(folder)
    make_folder(folder.parent)
    for stale in folder.parent.iterdir():
        if stale.name.startswith(folder.name + PARTIAL):
            _remove_stale(stale, folder)
    partial = folder.with_name(f"{folder.name}{PARTIAL}{uuid.uuid4().hex[:8]}")
    make_folder(partial)
    lock = _lock(partial)
    try:
        yield partial
        refuse_existing(folder)  # rename would replace a folder that is empty
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int:
    """Locks a folder until the returned descriptor is closed or the process dies.

    Raises BlockingIOError where another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_stale(partial: Path, folder: Path) -> None:
    try:
        os.close(_lock(partial))
    except BlockingIOError:
        raise FileExistsError(
            f"another process is writing {folder} now: wait for it or name another output"
        ) from None
    shutil.rmtree(partial)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds its lock for the block; the lock dies with the process.

    Raises BlockingIOError, in one sentence, where another run holds it.
    """
    make_folder(folder)
    require_writable(folder / "lock")
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another run is writing to {folder}; wait for it or name another output"
            ) from None
        except OSError:
            pass  # a file system without locks: carry on as if alone
        yield


def home() -> Path:
    """Returns the folder for converted models and compiled programs.

    It is JDLLM_HOME, or ~/.cache/jdllm.
    """
    return Path(os.environ.get("JDLLM_HOME", "~/.cache/jdllm")).expanduser()


def prune(folder: Path, limit: int) -> None:
    """Deletes the files of a folder that were not used for longest, until `limit` bytes are left.

    Several processes may do so at once, and a file that cannot be deleted stays.
    """
    files = []
    with contextlib.suppress(OSError):  # no folder yet
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                facts = entry.stat(follow_symlinks=False)
                if entry.is_file(follow_symlinks=False):
                    files.append((max(facts.st_atime, facts.st_mtime), facts.st_size, entry.path))
    excess = sum(size for _, size, _ in files) - limit
    for _, size, path in sorted(files):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
            excess -= size
