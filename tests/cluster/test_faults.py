"""Evaluation, generation and serving on a real Ray cluster of this machine, and what may be lost.

They need Ray: pip install -e '.[test,cluster]'.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import add_node, workers_of
from tests.support.tiny_models import write_small

# Ray leaves some sockets to the collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROOT = Path(__file__).parents[2]
DECODE = ["decode.gen_length=8", "decode.block_length=4", "decode.threshold=0.02", "mesh=1x1"]
PROMPTS = 240


def command(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"jdllm.{module}", *words]


def spread(folder: Path, *words: str) -> list[str]:
    """Bulk generation, a prompt per task."""
    return command(
        "generate", f"file={folder / 'prompts.jsonl'}", f"output={folder / 'out'}",
        f"model={folder / 'model'}", "batch_size=1", "executor=ray", *DECODE, *words,
    )  # fmt: skip


def finished(folder: Path) -> int:
    path = folder / "out" / "finished.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(true: Callable[[], Any], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def completions(folder: Path) -> list[dict[str, Any]]:
    return lines(folder / "out" / "completions.jsonl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and prompts, some of which repeat."""
    write_small(tmp_path / "model", 64)
    prompts = [json.dumps({"prompt": f"Add {i % 200} and one."}) for i in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    return tmp_path


@pytest.fixture
def wanted(folder: Path, variables: dict[str, str]) -> list[dict[str, Any]]:
    """What one process makes of the prompts."""
    words = [word for word in spread(folder) if word != "executor=ray"]
    words = [f"output={folder / 'local' / 'out'}" if w.startswith("output=") else w for w in words]
    subprocess.run(words, env=variables, check=True, capture_output=True)
    return completions(folder / "local")


def whole(folder: Path, wanted: list[dict[str, Any]]) -> None:
    """Nothing is lost, doubled, or other than one process makes it."""
    keys = Counter(one["key"] for one in lines(folder / "out" / "finished.jsonl"))
    assert len(keys) == PROMPTS and set(keys.values()) == {1}
    assert completions(folder) == wanted


def test_a_killed_worker(folder, variables, wanted, start_cluster):
    """Its prompt goes to another worker, and one takes its place; the command ends well."""
    cluster = start_cluster({}, {})
    variables["RAY_ADDRESS"] = cluster.address
    run = subprocess.Popen(spread(folder), env=variables, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: finished(folder) > 5)
    victims = [pid for node in cluster.own for pid in workers_of(node)]
    os.kill(victims[0], signal.SIGKILL)
    said = run.communicate(timeout=300)[1]
    assert run.returncode == 0, said
    assert said.count("was lost (ActorDiedError); another one takes its place") == 1
    whole(folder, wanted)


def test_a_killed_head_and_a_killed_command(folder, variables, wanted, start_cluster):
    """Either ends the command; the same command goes on with a new cluster."""
    cluster = start_cluster({}, {})
    variables["RAY_ADDRESS"] = cluster.address
    run = subprocess.Popen(spread(folder), env=variables, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: finished(folder) > 5)
    run.kill()
    run.communicate()
    before = finished(folder)
    long = folder / "long"  # enough for as long as it takes to miss the head
    long.mkdir()
    (long / "model").symlink_to(folder / "model")
    (long / "prompts.jsonl").write_text(((folder / "prompts.jsonl").read_text() + "\n") * 40)
    run = subprocess.Popen(spread(long), env=variables, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: finished(long) > 5)
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 1, said
    assert f"error: the head of the Ray cluster, {cluster.address}, is lost; what is" in said
    assert "Traceback" not in said
    done = subprocess.run(spread(folder), env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"error: no Ray cluster answers at RAY_ADDRESS={cluster.address}" in done.stderr
    variables["RAY_ADDRESS"] = start_cluster({}, {}).address
    done = subprocess.run(spread(folder), env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 5 < before <= finished(folder)
    assert f"{finished_before(done.stderr)} prompts are finished" in done.stderr


def finished_before(said: str) -> int:
    return int(said.partition(" prompts are finished")[0].split()[-1])


def test_another_version_and_a_full_disk(folder, variables, wanted, start_cluster):
    """Neither node can do it all, in one sentence each; with a third one the command goes on."""
    other = folder / "other"
    for name in ("jdllm", "convert", "kernels"):
        shutil.copytree(ROOT / name, other / name, symlinks=True)
    with (other / "jdllm" / "__init__.py").open("a") as file:
        file.write("\n__version__ = '0.0.9'\n")
    full = folder / "full"
    full.mkdir()
    (full / "sitecustomize.py").write_text(FULL)
    cluster = start_cluster({"PYTHONPATH": str(other)}, {"PYTHONPATH": f"{full}{os.pathsep}{ROOT}"})
    variables["RAY_ADDRESS"] = cluster.address
    options: Any = {"env": variables, "cwd": folder, "capture_output": True, "text": True}
    run = subprocess.run(spread(folder), **options)
    assert run.returncode == 1, run.stderr
    assert "has jdllm 0.0.9 (" in run.stderr and "; install the same there" in run.stderr
    assert "gives up: [Errno 28] No space left on device" in run.stderr
    assert "error: no worker is left: " in run.stderr and "Traceback" not in run.stderr
    assert finished(folder) == 3
    add_node(cluster, {})
    run = subprocess.run(spread(folder), **options)
    assert run.returncode == 0, run.stderr
    assert "3 prompts are finished in" in run.stderr
    whole(folder, wanted)


FULL = """
import errno, importlib.machinery, itertools, os

run, calls = importlib.machinery.SourceFileLoader.exec_module, itertools.count()

def exec_module(self, module):
    run(self, module)
    if module.__name__ == "jdllm.cluster.worker":
        stream = module.Worker.stream
        def until_it_is_full(self, *arguments):
            if next(calls) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch")
            return stream(self, *arguments)
        module.Worker.stream = until_it_is_full

importlib.machinery.SourceFileLoader.exec_module = exec_module
"""


def test_sweep_and_eval_are_those_of_one_process(folder, variables, start_cluster):
    variables["RAY_ADDRESS"] = start_cluster({}, {}).address
    plan = folder / "plan.yaml"
    plan.write_text("models: [bundled]\ntasks: [sudoku]\ngrid: {threshold: [0.9, 0.02]}\n")
    own = [f"plan={plan}", f"model={folder / 'model'}", "limit=6", "batch_size=2", "mesh=1x1"]
    rows = {}
    for name, more in {"local": [], "ray": ["executor=ray", "workers=2"]}.items():
        words = command("sweep", *own, f"output={folder / name}", *more)
        done = subprocess.run(words, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        done = lines(folder / name / "finished.jsonl")
        rows[name] = {one["key"]: one["completion"] for one in done}
        report = (folder / name / "report.html").read_text()
        assert ("<td>workers</td><td>2</td>" in report) == (name == "ray")
    assert rows["local"] == rows["ray"] and len(rows["ray"]) == 12
    words = command(
        "eval", "task=sudoku", f"model={folder / 'model'}", "limit=6", "mesh=1x1",
        "executor=ray", f"output={folder / 'eval'}", *DECODE[:-1],
    )  # fmt: skip
    done = subprocess.run(words, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 workers, each mesh data=1 x model=1" in done.stderr
    facts = json.loads((folder / "eval" / "results.json").read_text())
    assert facts["environment"]["workers"] == 2 and facts["tasks"]["sudoku"]["n"] == 6


def test_serving_replicas(folder, variables, start_cluster):
    """Two processes behind one address answer as one does; a killed one is replaced."""
    cluster = start_cluster({}, {})
    variables["RAY_ADDRESS"] = cluster.address
    words = command(
        "serve", "executor=ray", "replicas=2", "port=0", f"model={folder / 'model'}", "mesh=1x1",
        "name=small", "engine.slots=2", "engine.columns=256", "warm=false", "drain=5",
    )  # fmt: skip
    run = subprocess.Popen(words, env=variables, stderr=subprocess.PIPE, text=True)
    assert run.stderr
    line = next((x for x in run.stderr if "small is served at" in x), "")
    url = line.split()[-1]
    body = {"messages": [{"role": "user", "content": "7 + 5 ="}], "max_tokens": 8}

    def ask() -> str:
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(),
            {"content-type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]

    assert len({ask() for _ in range(6)}) == 1
    before = [pid for node in cluster.own for pid in workers_of(node)]
    assert len(before) >= 2
    os.kill(before[0], signal.SIGKILL)
    good = 0
    for _ in range(60):
        try:
            ask()
            good += 1
        except OSError:  # what the killed one had begun
            time.sleep(0.5)
        if good >= 8:
            break
    assert good >= 8
    wait_for(lambda: len([p for n in cluster.own for p in workers_of(n) if p != before[0]]) >= 2)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 0
