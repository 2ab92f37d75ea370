"""The way into a Ray cluster: joining it, what a worker takes of it, and who may work with whom."""

import functools
import hashlib
import logging
import os
import socket
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jdllm


def need_ray() -> None:
    """ValueError where Ray is not installed."""
    if not find_spec("ray"):
        raise ValueError("executor=ray needs Ray: pip install 'jdllm[cluster]'")


def connect() -> Any:
    """Joins a cluster and returns the module ray.

    That is the one that RAY_ADDRESS names, else one that runs on this machine, else one that is
    started for this process, with all of the machine. ConnectionError where there is none at the
    address. This process only plans: it takes no accelerator, which a worker may have.
    """
    need_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import jax
    import ray  # pyright: ignore[reportMissingImports]

    if ray.is_initialized():
        return ray
    jax.config.update("jax_platforms", "cpu")
    address = known_address()
    try:
        with warnings.catch_warnings():  # Ray starts programs by fork, and they are other programs
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
            ray.init(address or "local", logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConnectionError(f"Ray did not start or join a cluster: {reason}") from None
    return ray


def known_address() -> str:
    """Where a cluster is: what RAY_ADDRESS says, or what was started on this machine; else "".

    ConnectionError where none answers at RAY_ADDRESS. Ray itself would try for minutes, and also
    where a file tells of a cluster on this machine that was killed.
    """
    if address := os.environ.get("RAY_ADDRESS", ""):
        if "://" not in address and address not in ("auto", "local") and not answers(address):
            raise ConnectionError(
                f"no Ray cluster answers at RAY_ADDRESS={address}; start its head (ray start "
                "--head), or unset RAY_ADDRESS"
            )
        return address
    told = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    address = told.read_text().strip() if told.is_file() else ""
    return address if answers(address) else ""


def answers(address: str, seconds: float = 3) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), seconds).close()
    except (OSError, ValueError):
        return False
    return True


@functools.cache
def identity() -> str:
    """What must be equal where processes work together: versions, and a digest of jdllm's files."""
    digest = hashlib.sha256()
    root = Path(jdllm.__file__).parent
    folders = [root, root / "convert", root / "kernels"]  # two may be links, which rglob leaves out
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"jdllm {jdllm.__version__} ({digest.hexdigest()[:8]}), jax {version('jax')}"


def share(mesh: str, gpus: float | None) -> dict[str, float]:
    """What a worker takes of the cluster: a CPU, and `gpus`.

    By default those are as many as the mesh has devices, or one, where the cluster has any.
    """
    from jdllm.runtime import sharding  # not for those who ask whether Ray is there

    if gpus is None:
        some = connect().cluster_resources().get("GPU", 0) > 0
        gpus = 0 if not some else 1 if mesh == "auto" else sharding.abstract_mesh(mesh).size
    return {"num_cpus": 1, "num_gpus": float(gpus)}


def room(share: dict[str, float]) -> int:
    """How many workers with that share the cluster holds now."""
    total = connect().cluster_resources()
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    fits = [total.get(names[name], 0) // part for name, part in share.items() if part]
    return int(min(fits, default=1))
