"""Files that start Ray elsewhere: the batch script is played, the manifests are read."""

import os
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jdllm.evaluation.config import EvalConfig
from jdllm.evaluation.sweeps import SweepConfig
from jdllm.runtime import cli
from jdllm.server import spread
from jdllm.server.config import ServeConfig

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "slurm" / "ray.sbatch"
MANIFESTS = ROOT / "experiments" / "k8s"

# What KubeRay's v1 types have (ray-operator/apis/ray/v1): name, and whether it must be there.
CLUSTER = {"rayVersion": False, "headGroupSpec": True, "workerGroupSpecs": False}
HEAD = {"rayStartParams": True, "template": True}
WORKERS = HEAD | dict.fromkeys(("groupName", "minReplicas", "maxReplicas"), True)
WORKERS |= {"replicas": False, "numOfHosts": False}
KINDS: dict[str, dict[str, bool]] = {
    "RayService": {"serveConfigV2": True, "rayClusterConfig": True},
    "RayJob": {"entrypoint": True, "rayClusterSpec": True, "backoffLimit": False,
               "shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": False},
}  # fmt: skip


def allowed(found: dict[str, Any], fields: dict[str, bool]) -> None:
    """Nothing that is not a field, and all that must be there."""
    assert set(found) <= set(fields), set(found) - set(fields)
    assert {name for name, needed in fields.items() if needed} <= set(found)


def pods(template: dict[str, Any]) -> None:
    """A pod as Kubernetes takes it, as far as these use it; its volumes are those it mounts."""
    spec = template["spec"]
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in spec["containers"]:
        allowed(container, {"name": True, "image": True, "resources": True, "ports": False,
                            "env": False, "volumeMounts": False})  # fmt: skip
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        assert all(isinstance(amount, str) for amount in limits.values())
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
        assert all(isinstance(one["value"], str) for one in container.get("env", []))


def cluster(found: dict[str, Any]) -> tuple[int, int]:
    """Checks a cluster; returns its workers and the GPUs of each."""
    allowed(found, CLUSTER)
    allowed(found["headGroupSpec"], HEAD)
    pods(found["headGroupSpec"]["template"])
    (group,) = found["workerGroupSpecs"]
    allowed(group, WORKERS)
    pods(group["template"])
    for params in (found["headGroupSpec"]["rayStartParams"], group["rayStartParams"]):
        assert all(isinstance(value, str) for value in params.values())
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return group["replicas"], int(limits["nvidia.com/gpu"])


def manifest(name: str) -> dict[str, Any]:
    found = yaml.safe_load((MANIFESTS / name).read_text())
    assert found["apiVersion"] == "ray.io/v1" and found["metadata"]["name"]
    allowed(found["spec"], KINDS[found["kind"]])
    return found["spec"]


def test_the_service_is_one_that_we_have():
    spec = manifest("rayservice.yaml")
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    assert module == "jdllm.server.spread" and callable(getattr(spread, name))
    words = spread.words_of(application["args"])
    config = cli.parse(ServeConfig, words, prog="jdllm.serve")
    assert (config.executor, config.engine.slots) == ("ray", 16)
    assert (config.replicas, config.gpus) == cluster(spec["rayClusterConfig"])


def test_the_job_is_a_command_of_ours():
    spec = manifest("rayjob.yaml")
    python, m, module, *words = shlex.split(spec["entrypoint"])
    assert (python, m, module) == ("python", "-m", "jdllm.sweep")
    config = cli.parse(SweepConfig, words, prog=module)
    assert config.executor == "ray"
    assert (config.workers, config.gpus) == cluster(spec["rayClusterSpec"])
    mounts = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    folder = mounts["volumeMounts"][0]["mountPath"]
    assert config.output.is_relative_to(folder)  # the journal outlives the pod


@pytest.mark.parametrize("words", [[], ["jdllm.eval", "executor=ray", "output=results/a b"]])
def test_the_batch_script(words: list[str], tmp_path: Path):
    """srun, ray and python are played: who starts the head, who joins, which command runs."""
    played = {
        "scontrol": "printf 'localhost\\nother\\n'",
        "ray": f'echo "$SLURM_PROCID $*" >> {shlex.quote(str(tmp_path))}/ray.log',
        "srun": 'shift; for i in 0 1; do SLURM_PROCID=$i "$@"; done; exec sleep 60',
        "python": f'echo "$RAY_ADDRESS"; until [ "$(wc -l < {shlex.quote(str(tmp_path))}/ray.log)"'
        " = 2 ]; do sleep 0.1; done; printf '%s\\n' \"$@\"",
    }
    for tool, text in played.items():
        (tmp_path / tool).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / tool).chmod(0o755)
    with socket.create_server(("localhost", 0)) as listener:  # the head, as it listens
        port = listener.getsockname()[1]
        variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PORT": str(port)}
        variables |= {"SLURM_JOB_NODELIST": "a", "SLURM_CPUS_PER_TASK": "16", "SLURM_JOB_ID": "7"}
        done = subprocess.run(
            ["bash", SCRIPT, *words], env=os.environ | variables, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    address, m, module, *rest = done.stdout.splitlines()
    assert (address, m) == (f"localhost:{port}", "-m")
    config = {"jdllm.sweep": SweepConfig, "jdllm.eval": EvalConfig}[module]
    assert cli.parse(config, rest, prog=module).executor == "ray"
    assert rest == words[1:] if words else module == "jdllm.sweep"
    head, other = sorted((tmp_path / "ray.log").read_text().splitlines())
    assert head.startswith("0 start --head") and f"--port={port}" in head
    assert other == f"1 start --address=localhost:{port} --block --num-cpus=16"


def test_batch_scripts_are_clean_shell():
    for script in (ROOT / "experiments" / "slurm").glob("*.sbatch"):
        subprocess.run(["bash", "-n", script], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--shell=bash", script], check=True)
