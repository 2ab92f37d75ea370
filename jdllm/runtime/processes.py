"""Many processes that run as one program, through JAX's own distributed runtime.

A process learns its number from explicit arguments, else from JDLLM_* variables, which
`jdllm.launch` sets, else from a cluster: SLURM, Open MPI and Kubernetes are recognised as JAX does.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdllm.runtime import files

# What a cluster sets in each process; JAX reads the same. None: the count is not in the variables.
CLUSTERS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "slurm": (
        "SLURM_NTASKS",
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
    ),
    "ompi": (
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ),
    "k8s": (None, ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")),
}
# The variable with the processes per node. SLURM lists every node: 1(x2) is one on each of two.
PER_NODE = {"slurm": "SLURM_STEP_TASKS_PER_NODE", "ompi": "OMPI_COMM_WORLD_LOCAL_SIZE"}
PREFIX = "JDLLM_"
HEARTBEAT_SECONDS = 30  # a process that is silent for this long counts as lost: all others end
WAIT_SECONDS = 24 * 3600  # how long a barrier waits for a process that is alive but busy
TEXT_BYTES = 1024  # the longest text that `broadcast_text` carries
_barriers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of one process among several: the first three fields are all given, or none is."""

    coordinator: str | None = None
    """host:port that process 0 listens on."""
    num_processes: int | None = None
    process_id: int | None = None
    """The number of this process, from 0."""
    local_device_ids: tuple[int, ...] | None = None
    """The devices of this host that belong to this process (None: all that it sees)."""

    def __post_init__(self):
        given = (self.coordinator, self.num_processes, self.process_id)
        if any(x is None for x in given) and any(x is not None for x in given):
            raise ValueError(
                "coordinator, num_processes and process_id belong together, got "
                f"coordinator={self.coordinator}, num_processes={self.num_processes}, "
                f"process_id={self.process_id}"
            )
        if self.num_processes is not None and not 0 <= (self.process_id or 0) < self.num_processes:
            raise ValueError(
                f"process_id={self.process_id} must be one of 0..{self.num_processes - 1}"
            )


def read_place(environment: Mapping[str, str]) -> Place:
    """Returns the place that the JDLLM_* variables describe.

    They are COORDINATOR, NUM_PROCESSES, PROCESS_ID and LOCAL_DEVICE_IDS. Raises ValueError where
    one of them is malformed or missing beside the others.
    """

    def whole(name: str) -> int | None:
        text = environment.get(PREFIX + name)
        if text is not None and not text.isdigit():
            raise ValueError(f"{PREFIX}{name}={text} must be a whole number")
        return None if text is None else int(text)

    ids = environment.get(PREFIX + "LOCAL_DEVICE_IDS")
    if ids is not None and not all(part.isdigit() for part in ids.split(",")):
        raise ValueError(f"{PREFIX}LOCAL_DEVICE_IDS={ids} must be numbers such as 0,1")
    return Place(
        environment.get(PREFIX + "COORDINATOR"),
        whole("NUM_PROCESSES"),
        whole("PROCESS_ID"),
        None if ids is None else tuple(map(int, ids.split(","))),
    )


def find_cluster(environment: Mapping[str, str]) -> str | None:
    """Returns the cluster that started this process as one of several, or None.

    All of a cluster's variables must be set: a shell inside a job has only a few of them.
    """
    for name, (count, needed) in CLUSTERS.items():
        if all(variable in environment for variable in needed):
            several = count is None or int(environment.get(count, 1)) > 1
            return name if several else None
    return None


def alone_on_node(environment: Mapping[str, str], cluster: str) -> bool:
    """Returns whether the cluster says that no node runs two processes of this program."""
    text = environment.get(PER_NODE.get(cluster, ""), "")
    return re.fullmatch(r"1(\(x\d+\))?", text) is not None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
) -> None:
    """Joins the other processes of this program, before anything touches a device.

    Does nothing where neither arguments nor the environment say that there are others, or where it
    was called already. When a process is lost, the others end within a minute. Raises ValueError
    for a place that is incomplete, RuntimeError where the other processes do not join.
    """
    if jax.distributed.is_initialized():
        return
    ids = None if local_device_ids is None else tuple(local_device_ids)
    place = read_place(os.environ)
    if coordinator is not None or num_processes is not None or process_id is not None:
        ids = place.local_device_ids if ids is None else ids
        place = Place(coordinator, num_processes, process_id, ids)
    elif ids is not None:
        place = dataclasses.replace(place, local_device_ids=ids)
    cluster = None if place.num_processes else find_cluster(os.environ)
    if place.num_processes == 1 or not (place.num_processes or cluster):
        return
    ids = place.local_device_ids
    if cluster and ids is None and alone_on_node(os.environ, cluster):
        ids = ()  # all; left to itself, JAX gives a process of a cluster a single GPU
    # JAX would take note of SIGTERM, and the process would go on.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        ids,
        cluster_detection_method=cluster or "deactivate",
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes, if any; inside the block only process 0 prints to stdout."""
    initialize()
    if not jax.distributed.is_initialized() or is_main():
        yield
    else:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield


def describe() -> str:
    """Returns one line about the processes: "P processes x D devices"."""
    counts = {"process": jax.process_count(), "device": jax.local_device_count()}
    ends = {"process": "es", "device": "s"}
    return " x ".join(f"{n} {name}{ends[name] if n > 1 else ''}" for name, n in counts.items())


def device_put(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Returns arrays that every process holds whole, put onto the devices of all processes."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf)))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree)


def gather(tree: Any) -> Any:
    """Returns arrays on any devices as whole numpy arrays, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def is_main() -> bool:
    """Returns whether this is process 0, which writes and prints for all."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a message to standard error, once for all processes."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


def barrier(name: str) -> None:
    """Waits until every process has arrived here; `name` appears in errors.

    It may take hours. Devices take no part: a collective between CPUs gives up after 30 s.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        wait = multihost.get_barrier_sync_fn()
        wait(key=f"jdllm {next(_barriers)} {name}", timeout_ms=WAIT_SECONDS * 1000)


def broadcast_text(text: str) -> str:
    """Returns, in every process, the text that process 0 passes: at most 1024 bytes of UTF-8."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    barrier("broadcast_text")
    sent = np.frombuffer(text.encode().ljust(TEXT_BYTES, b"\0"), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(sent)).rstrip(b"\0").decode()


def main_first[T](work: Callable[[], T]) -> T:
    """Runs `work` in process 0, then in the others, which find its files on the disk."""
    if not is_main():
        barrier("main_first")
        return work()
    done = work()
    barrier("main_first")
    return done


@contextlib.contextmanager
def shared_folder(folder: Path) -> Iterator[Path]:
    """Yields one `files.atomic_folder` to all processes; all leave it once it has its name."""
    own = files.atomic_folder(folder) if is_main() else contextlib.nullcontext(folder)
    with own as partial:
        yield folder.absolute().with_name(broadcast_text(partial.name))
        barrier("written")
    barrier("named")


def fail(error: BaseException) -> None:
    """Prints why this process ends and ends it at once, where there are others.

    A normal exit would hang: JAX waits for the others there, and they wait for this process.
    """
    code = error.code if isinstance(error, SystemExit) else 1
    if not jax.distributed.is_initialized() or not code:
        return
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
        # Most often another process was lost. JAX will say which and end this one.
        time.sleep(HEARTBEAT_SECONDS + 10)
    os._exit(code if isinstance(code, int) else 1)
