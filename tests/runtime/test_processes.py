"""Many processes: who says what a process's place is, the local launcher, and equal results."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jdllm import LLM, DecodeConfig
from jdllm.evaluation.config import EvalConfig
from jdllm.load import load_model
from jdllm.runtime import cli, launch, sharding
from jdllm.runtime.launch import LaunchConfig
from jdllm.runtime.processes import Place, alone_on_node, find_cluster, read_place
from jdllm.training.config import SFTConfig

ROOT = Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "2",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # a shell inside a job
        (OMPI, "ompi"),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod of no indexed job
    ],
)
def test_clusters_are_recognised(environment: dict[str, str], cluster: str | None):
    assert find_cluster(environment) == cluster


@pytest.mark.parametrize(
    ("cluster", "environment", "alone"),
    [
        ("slurm", {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, True),
        ("slurm", {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, False),
        ("slurm", {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, False),
        ("slurm", {}, False),
        ("ompi", {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ("ompi", {"OMPI_COMM_WORLD_LOCAL_SIZE": "12"}, False),
        ("k8s", {}, False),
    ],
)
def test_processes_of_a_node(cluster: str, environment: dict[str, str], alone: bool):
    """A process that has a node to itself takes all its GPUs; others get one each from JAX."""
    assert alone_on_node(environment, cluster) is alone


@pytest.mark.parametrize(("name", "config"), [("eval", EvalConfig), ("sft", SFTConfig)])
def test_batch_scripts(name: str, config: type, tmp_path: Path):
    """What they start can be parsed, and its mesh is all GPUs of all nodes; srun is played."""
    script = ROOT / "experiments" / "slurm" / f"{name}.sbatch"
    for tool, text in {"srun": 'shift; exec "$@"', "python": "printf '%s\\n' \"$@\""}.items():
        (tmp_path / tool).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / tool).chmod(0o755)
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", script], env=os.environ | variables | {"DATA": "a b.jsonl"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    m, module, *words = done.stdout.splitlines()
    assert (m, module) == ("-m", f"jdllm.{name}")
    asked = dict(
        re.findall(r"#SBATCH --(nodes|ntasks-per-node|gpus-per-node)=(\d+)", script.read_text())
    )
    mesh = sharding.abstract_mesh(cli.parse(config, words, prog=name).mesh)
    assert mesh.size == int(asked["nodes"]) * int(asked["gpus-per-node"])
    assert int(asked["gpus-per-node"]) % mesh.shape["model"] == 0  # within a node
    assert asked["ntasks-per-node"] == "1"


def test_a_place_in_the_environment():
    told = launch.environment(LaunchConfig(processes=3, devices=2), 1234, 2)
    assert read_place(told) == Place("localhost:1234", 3, 2, (4, 5))
    assert read_place({}) == Place()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JDLLM_PROCESS_ID": "1"}, "belong together"),
        ({"JDLLM_PROCESS_ID": "one"}, "JDLLM_PROCESS_ID=one must be a whole number"),
        ({"JDLLM_LOCAL_DEVICE_IDS": "0;1"}, "must be numbers such as 0,1"),
        (
            {
                "JDLLM_COORDINATOR": "a:1",
                "JDLLM_NUM_PROCESSES": "2",
                "JDLLM_PROCESS_ID": "2",
            },
            "process_id=2 must be one of 0..1",
        ),
    ],
)
def test_half_a_place_is_refused(environment: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        read_place(environment)


def test_words_of_the_launcher_and_of_the_command():
    words = ["processes=2", "devices=4", "jdllm.eval", "mesh=8x1", "limit=3"]
    assert launch.split(words) == (words[:2], words[2:])
    assert launch.split(["processes=2"]) == (["processes=2"], [])


def run(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a fresh process, without the virtual devices of the tests themselves."""
    kept = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    kept["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_lost_process_ends_the_others_and_is_named(tmp_path: Path):
    """Process 1 dies after all have met, as a killed one does; process 0 would wait for it."""
    (tmp_path / "one_dies.py").write_text(
        "import os, signal, time\n"
        "from jdllm.runtime import processes\n"
        "processes.initialize()\n"
        "import jax\n"
        "assert (jax.process_count(), jax.device_count()) == (2, 4)\n"
        "print(processes.describe(), flush=True)\n"
        "if jax.process_index() == 1:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(300)\n"
    )
    start = time.perf_counter()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run(["jdllm.launch", "processes=2", "devices=2", "one_dies"], PYTHONPATH=path)
    assert time.perf_counter() - start < 60
    assert done.returncode == 128 + 9
    assert "2 processes x 2 devices" in done.stdout
    assert "process 1 of 2 was lost (signal 9); ended the others" in done.stderr


def test_what_a_failed_process_said_is_shown(tmp_path: Path):
    (tmp_path / "says.py").write_text(
        "import sys, time\nif sys.argv[1] == '1':\n    sys.exit('no luck')\ntime.sleep(300)\n"
    )
    done = run(["jdllm.launch", "processes=3", "says", "{process}"], PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "no luck",
        "error: process 1 of 3 was lost (status 1); ended the others",
    ]


@pytest.mark.slow
def test_a_process_that_fails_does_not_wait_for_the_others():
    """They wait for it: left to JAX, all would end after half a minute, and another be named."""
    done = run(["jdllm.launch", "processes=2", "jdllm.eval", "mesh=2x{process}"])
    assert done.returncode == 1
    assert "error: mesh=2x0 is not a mesh" in done.stderr and "Traceback" not in done.stderr
    assert "process 0 of 2 was lost (status 1)" in done.stderr


def test_a_mesh_needs_every_process():
    class Device:
        device_kind = "one"

        def __init__(self, process_index: int):
            self.process_index = process_index

    devices = [Device(0), Device(0), Device(1), Device(1)]
    with pytest.raises(ValueError, match="mesh of 2x1 leaves process 1 without a device"):
        sharding.parse_mesh("2x1", devices)


@pytest.mark.slow
def test_two_processes_decode_as_one(tmp_path: Path):
    """Rows of both processes, a model that is split over the devices of each."""
    prompts = [[7, 8, 9], [3] * 20, [1, 2], [5], [11] * 6]
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "threshold": 0.02}
    (tmp_path / "decodes.py").write_text(
        "import json\n"
        "from jdllm.runtime import processes\n"
        "processes.initialize()\n"
        "from jdllm import LLM, DecodeConfig\n"
        "llm = LLM.load('random:tiny', '2x2')\n"
        f"found = llm.generate({prompts}, DecodeConfig(**{settings}))\n"
        "print('FOUND', json.dumps([[c.ids, c.nfe] for c in found]))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run(["jdllm.launch", "processes=2", "devices=2", "decodes"], PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    one = LLM.load("random:tiny", "2x2").generate(prompts, DecodeConfig(**settings))
    assert json.loads(line.removeprefix("FOUND")) == [[c.ids, c.nfe] for c in one]


@pytest.mark.slow
def test_a_download_is_converted_once_for_all(tmp_path: Path):
    """Whoever waits may do so for longer than a collective of CPUs lasts (30 s)."""
    source = ROOT / "tests" / "goldens" / "llada"
    (tmp_path / "converts.py").write_text(
        "import time\n"
        "from pathlib import Path\n"
        "from jdllm import load\n"
        "from jdllm.runtime import processes\n"
        "processes.initialize()\n"
        "load.CONVERT_ABOVE = 0\n"
        f"load.fetch = lambda model: Path({str(source)!r})\n"
        "processes.main_first(lambda: time.sleep(35 * processes.is_main()))\n"
        "print('FOUND', load.locate('owner/name'))\n"
    )
    home = tmp_path / "home"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    words = ["jdllm.launch", "processes=2", "devices=2", "converts"]
    done = run(words, PYTHONPATH=path, JDLLM_HOME=str(home))
    assert done.returncode == 0, done.stderr
    (folder,) = (home / "models").iterdir()
    assert f"FOUND {folder}\n" in done.stdout
    mesh = sharding.parse_mesh("1x1")
    ours, theirs = (load_model(str(path), mesh) for path in (folder, source))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_two_processes_generate_as_one(tmp_path: Path):
    """The same text and the same record of it, printed and written once."""
    words = ["jdllm.generate", "prompt=1320041002004030", "decode.gen_length=16", "viz=live"]
    launch = ["jdllm.launch", "processes=2", "devices=2"]
    said, records = [], []
    for name, command in {"two": [*launch, *words], "one": words}.items():
        trace = tmp_path / f"{name}.jsonl"
        done = run([*command, f"trace={trace}"], JAX_NUM_CPU_DEVICES="4")
        assert done.returncode == 0, done.stderr
        shown = [line for line in done.stdout.splitlines() if "[Gloo]" not in line]
        said.append(shown)
        records.append([json.loads(line) for line in trace.read_text().splitlines()[1:]])
    assert said[0] == said[1] != []
    assert [r["candidates"] for r in records[0]] == [r["candidates"] for r in records[1]] != []


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path: Path):
    """2 processes x 4 devices and 1 x 8: the same samples, to the last token and model call."""
    words = ["jdllm.eval", "limit=19", "mesh=8x1"]
    home = {"JDLLM_HOME": str(tmp_path / "home")}
    launch = ["jdllm.launch", "processes=2", "devices=4", *words, f"output={tmp_path / 'two'}"]
    two = run(launch, **home)
    assert two.returncode == 0, two.stderr
    assert "2 processes x 4 devices, mesh data=8 x model=1" in two.stderr
    one = run([*words, f"output={tmp_path / 'one'}"], JAX_NUM_CPU_DEVICES="8", **home)
    assert one.returncode == 0, one.stderr
    assert "1 process x 8 devices" in one.stderr

    def samples(name: str) -> list[dict[str, Any]]:
        """Without the seconds that they took."""
        lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    assert len(samples("one")) == 19 and samples("one") == samples("two")
    again = run(launch, **home)  # the folder is shared: all processes know what is finished
    assert again.returncode == 0, again.stderr
    assert "19 samples are finished" in again.stderr
    assert samples("two") == samples("one")
