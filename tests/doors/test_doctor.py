"""The doctor: broken facts are named with a fix, and a real run really generates."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jdllm import checkup
from jdllm.checkup import Finding, Machine, Probe
from jdllm.runtime import machine
from jdllm.runtime.machine import Folder, HuggingFace, Packages
from tests.support.marks import quick

ROOT = Path(__file__).parents[2]
GOOD = Packages(
    python=(3, 12),
    versions={"jdllm": "0.1.0", "jax": "0.12.0.1", "jaxlib": "0.12.0.1", "numpy": "2.2"},
    requirements={"jax": ("jaxlib<=0.12.0.1,>=0.11.2", "requests; extra == 'tpu'")},
)
CUDA = {"jax-cuda13-plugin": "0.12.0.1", "jax-cuda13-pjrt": "0.12.0.1"}
ROW = {"operation": "attention", "chosen": "xla", "refused": {"cudnn": "a mask"}, "shapes": []}
CPU = Probe(backend="cpu", devices=("cpu",), text="1", solved=True, tokens=2, seconds=1.0)
GPU = dataclasses.replace(CPU, backend="gpu", devices=("H200",), device_memory=105 * 10**9)
FOLDER = Folder(Path("/home/me/jdllm"), "", 10**12)


def packages(**versions: str | None) -> Packages:
    """GOOD with other versions; None takes one away."""
    given = {name.replace("_", "-"): version for name, version in versions.items()}
    merged = {n: v for n, v in {**GOOD.versions, **given}.items() if v is not None}
    return dataclasses.replace(GOOD, versions=merged)


def gpu(driver: str | None, platforms: str = "", probe: Probe = GPU, **versions: str) -> Machine:
    return Machine(driver, platforms, packages(**versions), probe)


def with_cuda(driver: str | None, platforms: str = "", probe: Probe = GPU) -> Machine:
    return gpu(driver, platforms, probe, **CUDA)


BROKEN = Folder(Path("/readonly"), "Permission denied", 10**12)
FULL = Folder(Path("/full"), "", 1000)
CASES: list[tuple[Any, Any, str, str]] = [
    (checkup.check_python, GOOD, "ok", "3.12"),
    (checkup.check_python, dataclasses.replace(GOOD, python=(3, 11)), "WRONG", "3.11 is too old"),
    (checkup.check_versions, GOOD, "ok", "jaxlib 0.12.0.1"),
    (checkup.check_versions, packages(jdllm=None), "note", "runs uninstalled"),
    (checkup.check_versions, packages(jaxlib="0.12.1"), "WRONG", "installed is 0.12.1"),
    (checkup.check_versions, packages(jaxlib="0.10.0"), "WRONG", "jaxlib<=0.12.0.1,>=0.11.2"),
    (checkup.check_versions, packages(jaxlib=None), "WRONG", "jaxlib, which is not installed"),
    (checkup.check_plugin, GOOD, "ok", "only GPUs need one"),
    (checkup.check_plugin, packages(**CUDA), "ok", "jax-cuda13-plugin 0.12.0.1"),
    (
        checkup.check_plugin,
        packages(**CUDA | {"jax-cuda13-pjrt": "0.12.0"}),
        "WRONG",
        "do not fit jaxlib 0.12.0.1",
    ),
    (
        checkup.check_plugin,
        packages(**CUDA | {"jax-cuda12-plugin": "0.12.0.1"}),
        "note",
        "plugins of two CUDA versions",
    ),
    (checkup.check_triton, GOOD, "ok", "not installed"),
    (checkup.check_triton, packages(jax_triton="0.3.1", triton="3.6.0"), "ok", "0.3.1"),
    (checkup.check_triton, packages(jax_triton="0.4.1", triton="3.7.0"), "ok", "0.4.1"),
    (
        checkup.check_triton,
        packages(jax_triton="0.4.1", triton="3.6.0"),
        "WRONG",
        "needs triton 3.7",
    ),
    (checkup.check_triton, packages(jax_triton="0.4.1"), "WRONG", "without triton"),
    (checkup.check_gpu, gpu(None, probe=CPU), "ok", "no NVIDIA driver"),
    (checkup.check_gpu, with_cuda("580.65.06"), "ok", "JAX uses it"),
    (checkup.check_gpu, with_cuda("570.1"), "WRONG", "too old for jax-cuda13-plugin"),
    (checkup.check_gpu, gpu("580.65.06", probe=CPU), "WRONG", "has no CUDA plugin and sees cpu"),
    (checkup.check_gpu, with_cuda("580.65.06", probe=CPU), "WRONG", "but JAX sees cpu"),
    (checkup.check_gpu, with_cuda("580.65.06", "cpu", CPU), "note", "JAX_PLATFORMS=cpu keeps"),
    (checkup.check_devices, gpu(None, probe=CPU), "ok", "1 x cpu (cpu)"),
    (checkup.check_devices, with_cuda("580.1"), "ok", "105.0 GB for JAX on each"),
    (checkup.check_devices, gpu(None, "tpu", Probe(error="no tpu")), "WRONG", "JAX_PLATFORMS=tpu"),
    (checkup.check_devices, gpu(None, probe=Probe(error="no end")), "WRONG", "no end"),
    (checkup.check_memory, 8 * 10**9, "ok", "8.0 GB available"),
    (checkup.check_memory, 10**8, "WRONG", "0.1 GB available"),
    (checkup.check_home, FOLDER, "ok", "1000.0 GB free"),
    (checkup.check_home, BROKEN, "WRONG", "nothing can be written to /readonly: Permission denied"),
    (checkup.check_home, FULL, "WRONG", "0.0 GB free"),
    (checkup.check_hugging_face, HuggingFace(FOLDER, False, True), "ok", "a token is set"),
    (checkup.check_hugging_face, HuggingFace(FOLDER, False, False), "ok", "no token"),
    (checkup.check_hugging_face, HuggingFace(FOLDER, True, True), "note", "forbids downloads"),
    (checkup.check_hugging_face, HuggingFace(BROKEN, False, True), "note", "Permission denied"),
    (checkup.check_generation, CPU, "ok", "solved a sudoku, 2 tokens in 1.0 s"),
    (checkup.check_generation, dataclasses.replace(CPU, solved=False), "WRONG", "is wrong: '1'"),
    (checkup.check_generation, Probe(error="killed"), "WRONG", "killed"),
    (
        checkup.check_kernels,
        dataclasses.replace(CPU, kernels=[ROW]),
        "ok",
        "by xla (cudnn: a mask)",
    ),
    (checkup.check_kernels, Probe(error="killed"), "note", "nothing was generated"),
]


@pytest.mark.parametrize(("check", "facts", "status", "words"), CASES)
def test_facts_are_judged(check: Any, facts: Any, status: str, words: str):
    finding: Finding = check(facts)
    assert (finding.status, words in finding.text) == (status, True), finding
    assert finding.fix or status == "ok"


def test_the_fix_of_a_stray_plugin_names_this_jax():
    stray = packages(**CUDA | {"jax-cuda13-plugin": "0.11.2"})
    assert "'jax[cuda13]==0.12.0.1'" in checkup.check_plugin(stray).fix


def test_every_check_is_in_the_table():
    checks = {value for name, value in vars(checkup).items() if name.startswith("check_")}
    assert {check.judge for check in checkup.checks(1)} == checks


def test_facts_of_this_machine():
    found = machine.read_packages()
    assert found.versions["jax"] and any("jaxlib" in line for line in found.requirements["jax"])
    assert machine.read_memory() > 10**7
    assert machine.release("0.12.0.1.dev3+g1") == (0, 12, 0, 1)


def test_folders_are_tried(tmp_path: Path):
    fine = machine.read_folder(tmp_path / "a" / "b")
    assert fine.error == "" and fine.free > 0 and (tmp_path / "a" / "b").is_dir()
    assert machine.read_folder(tmp_path / "c" / "d", create=False).error == ""
    assert not (tmp_path / "c").exists()
    (tmp_path / "file").write_text("")
    assert machine.read_folder(tmp_path / "file" / "below").error == "Not a directory"


def test_facts_that_cannot_be_read_are_wrong():
    def read() -> int:
        raise OSError("no such file")

    ((name, finding),) = checkup.examine([checkup.Check("memory", read, checkup.check_memory)])
    assert (name, finding.status) == ("memory", "WRONG") and "no such file" in finding.text


def test_a_child_that_hangs_is_ended():
    start = time.perf_counter()
    code = 'import time; print(\'{"backend": "cpu"}\', flush=True); time.sleep(60)'
    found = checkup.run_probe(1.0, code)
    assert time.perf_counter() - start < 20
    assert found.backend == "cpu" and "no end after 1 s" in found.error


def test_a_child_that_dies_says_why():
    found = checkup.run_probe(20.0, "raise RuntimeError('no kernel image')")
    assert found.error == "the process ended with status 1: RuntimeError: no kernel image"


@pytest.mark.parametrize("home", quick(["writable", "a file"], "writable"))
def test_the_command(tmp_path: Path, home: str):
    """It really generates; without a place to write, the status says so."""
    if home == "a file":
        (tmp_path / "home").write_text("")
    environment = dict(os.environ, JDLLM_HOME=str(tmp_path / "home"), XLA_FLAGS="")
    run = subprocess.run(
        [sys.executable, "-m", "jdllm.doctor"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = {line[7:20].strip(): line for line in run.stdout.splitlines() if line[:6].strip()}
    assert lines["devices"].startswith("ok") and "cpu" in lines["devices"]
    if home == "writable":
        assert run.returncode == 0 and "WRONG" not in run.stdout
        assert "solved a sudoku" in lines["generation"]
        assert "attention by reference (split: it needs a GPU, cudnn" in lines["kernels"]
        assert "experts:grouped is not for this device: it needs a GPU" in lines["kernels"]
    else:
        assert run.returncode == 1 and lines["JDLLM_HOME"].startswith("WRONG")
        assert "set JDLLM_HOME" in run.stdout


def test_json_holds_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    found = [("one", Finding("ok", "fine", "unused")), ("two", Finding("WRONG", "bad", "mend it"))]
    monkeypatch.setattr(checkup, "examine", lambda table: iter(found))
    assert not checkup.report(checkup.DoctorConfig(json=True))
    assert json.loads(capsys.readouterr().out) == {
        "good": False,
        "checks": [
            {"check": "one", "status": "ok", "text": "fine", "fix": ""},
            {"check": "two", "status": "WRONG", "text": "bad", "fix": "mend it"},
        ],
    }
