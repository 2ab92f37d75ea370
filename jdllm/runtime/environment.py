"""What numbers were measured on, and when: versions, devices, the host, the commit."""

import datetime
import platform
import resource
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

import jdllm

PACKAGES = ("jax", "jaxlib", "flax", "lm_eval")


def commit() -> str | None:
    """The git commit of the package's own checkout, marked -dirty where files differ from it.

    None where there is no git, or where the package is not one of the checkout's own files (an
    environment may lie inside some other project's checkout).
    """
    here = Path(jdllm.__file__)
    git = ["git", "-C", str(here.parent)]
    own = [*git, "ls-files", "--error-unmatch", here.name]
    name = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        subprocess.run(own, check=True, capture_output=True)
        return subprocess.run(name, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    devices = jax.devices()
    return {
        "jdllm": jdllm.__version__,
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": devices[0].device_kind,
        "device_count": len(devices),
        "host": platform.node(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def peak_bytes() -> int:
    """What the first device has held at most so far; of a CPU, the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return (
        stats.get("peak_bytes_in_use") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )


def _version(package: str) -> str | None:
    """The version of a package; None where it is absent, as what needs it then is."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
