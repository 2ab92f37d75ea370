"""Reads facts about the machine without importing JAX: packages, driver, memory, folders."""

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from packaging.utils import canonicalize_name

# Packages whose declared requirements count.
OWNERS = (
    "jdllm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "jax-triton",
)  # fmt: skip
CUDA = re.compile(r"jax-cuda(\d+)-(plugin|pjrt)")


@dataclasses.dataclass(frozen=True)
class Packages:
    """The Python packages that are installed."""

    python: tuple[int, int]
    versions: Mapping[str, str]
    """Version by canonical package name."""
    requirements: Mapping[str, tuple[str, ...]]
    """The requirements that the packages in OWNERS declare."""

    @property
    def cuda(self) -> dict[str, str]:
        """Returns the versions of JAX's CUDA packages."""
        return {name: v for name, v in self.versions.items() if CUDA.fullmatch(name)}


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder that commands write to."""

    path: Path
    error: str
    """Why nothing can be written there; empty where writing works."""
    free: int
    """Free bytes on its disk."""


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """The settings of huggingface_hub that downloads depend on."""

    cache: Folder
    offline: bool
    token: bool
    """Whether a token is set; its value is not kept."""


def release(version: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version, for comparing."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def cuda_series(name: str) -> str:
    """Returns the CUDA version in the name of one of JAX's CUDA packages, "" for other names."""
    match = CUDA.fullmatch(name)
    return match[1] if match else ""


def read_packages() -> Packages:
    """Returns what is installed, from package metadata; nothing is imported."""
    versions: dict[str, str] = {
        canonicalize_name(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()
    }
    owners = [*OWNERS, *(name for name in versions if CUDA.fullmatch(name))]
    asked = {n: tuple(importlib.metadata.requires(n) or ()) for n in owners if n in versions}
    return Packages(sys.version_info[:2], versions, asked)


def read_driver() -> str | None:
    """Returns the version of the loaded NVIDIA driver, or None without one."""
    with contextlib.suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    return None


def read_memory() -> int:
    """Returns the bytes of free host memory; where Linux does not say, of all host memory."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        available = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # "max", or no such limit
        limit = int((group / "memory.max").read_text())
        available = min(available, limit - int((group / "memory.current").read_text()))
    return available


def read_folder(path: Path, create: bool = True) -> Folder:
    """Returns facts about a folder after a trial write.

    Without `create` the trial is made in the nearest parent that exists.
    """
    error, place = "", path
    try:
        if create:
            path.mkdir(parents=True, exist_ok=True)
        while not place.exists() and place != place.parent:
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as problem:
        error = problem.strerror or str(problem)
    with contextlib.suppress(OSError):
        return Folder(path, error, shutil.disk_usage(place).free)
    return Folder(path, error, 0)


def read_home() -> Folder:
    """Returns facts about the folder of compiled programs in JDLLM_HOME."""
    from jdllm.runtime.files import home

    return read_folder(home() / "xla")


def read_hugging_face() -> HuggingFace:
    """Returns how huggingface_hub is set up."""
    from huggingface_hub import constants, get_token

    cache = read_folder(Path(constants.HF_HUB_CACHE), create=False)
    return HuggingFace(cache, constants.HF_HUB_OFFLINE, get_token() is not None)


def process_age() -> float | None:
    """Seconds since this process began, its imports included; None where /proc does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        now = float(Path("/proc/uptime").read_text().split()[0])
        return now - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
