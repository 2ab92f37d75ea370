"""A Ray cluster of this machine: a head that does no work, and nodes with one CPU each."""

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

STORE = 80_000_000  # bytes of a node's object store, the least that Ray takes


def workers_of(node: Any) -> list[int]:
    """The processes of a node that work for a crew, by the process that started them."""
    (raylet,) = [info.process.pid for info in node.all_processes["raylet"]]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text()
        except OSError:  # it has ended
            continue
        if parent == raylet and command.startswith("ray::") and "IDLE" not in command:
            found.append(int(folder.name))
    return found


def add_node(cluster: Any, variables: dict[str, str]) -> Any:
    """A node of one CPU whose processes have these variables, too."""
    with warnings.catch_warnings():  # Ray starts programs by fork, and they are other programs
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        return cluster.add_node(num_cpus=1, object_store_memory=STORE, env_vars=variables)


@pytest.fixture
def start_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A function that starts a cluster with a node for each dict of variables, and names it."""
    if not find_spec("ray"):
        pytest.fail("these tests need Ray: pip install -e '.[test,cluster]'")
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    started = []
    # One thread for each worker, which is not to see the virtual devices of the tests either.
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")

    def start(*nodes: dict[str, str]) -> Any:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
        with warnings.catch_warnings():  # Ray starts programs by fork, and they are other programs
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
            cluster: Any = Cluster(initialize_head=True, head_node_args=head)
            started.append(cluster)
        cluster.own = [add_node(cluster, variables) for variables in nodes]
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        return cluster

    yield start
    for cluster in started:
        cluster.shutdown()
    started.clear()
    gc.collect()


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """The environment of a command that is to work on the cluster."""
    root = str(Path(__file__).parents[2])
    return dict(os.environ) | {"PYTHONPATH": root, "JDLLM_HOME": str(tmp_path / "home")}
