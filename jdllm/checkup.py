"""Checkup: whether this machine can generate, and what to do where it cannot.

Versions against each other, driver, devices, memory, folders; then the bundled model really solves
a puzzle. Facts are read first and judged by pure functions, so that a test can feed broken ones.
Whatever might hang or crash runs in a child process with a time limit. No network is needed.
"""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jdllm.runtime import machine
from jdllm.runtime.machine import Folder, HuggingFace, Packages, cuda_series, release

NEED_MEMORY = 1_000_000_000  # bytes: JAX, a compilation and the bundled model take 0.53 GB
NEED_DISK = 100_000_000  # bytes: room for compiled programs, 0.3 MB each
SHOWN = ("jax", "jaxlib", "flax", "orbax-checkpoint", "transformers")
WHOLE_STORY = 'python -c "from jdllm.checkup import probe; probe()" tells the whole story'
# By the CUDA version of JAX's plugin, and by the series of jax-triton.
OLDEST_DRIVER: dict[str, tuple[int, ...]] = {"12": (525,), "13": (580,)}
OLDEST_TRITON: dict[tuple[int, ...], tuple[int, ...]] = {(0, 4): (3, 7)}


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Examines this machine."""

    seconds: float = 300.0
    """How long finding devices and generating may take together."""
    json: bool = False
    """Print one JSON object instead of the table."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check says."""

    status: Literal["ok", "note", "WRONG"]
    text: str
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the child process saw and did."""

    backend: str = ""
    devices: tuple[str, ...] = ()
    device_memory: int | None = None
    """Bytes that JAX may use of one device, where it says so."""
    text: str = ""
    solved: bool = False
    tokens: int = 0
    seconds: float = 0.0
    kernels: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """What `kernels.choose.choices` tells of the generation."""
    canaries: dict[str, str] = dataclasses.field(default_factory=dict)
    """What `kernels.choose.canaries` says."""
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The driver, and what decides whether JAX uses it."""

    driver: str | None
    """Version of the NVIDIA driver that is loaded."""
    platforms: str
    """JAX_PLATFORMS."""
    packages: Packages
    probe: Probe


def check_python(facts: Packages) -> Finding:
    """3.12, which JAX and this package ask for."""
    version = ".".join(map(str, facts.python))
    if facts.python < (3, 12):
        return Finding("WRONG", f"{version} is too old", "install Python 3.12 or newer")
    return Finding("ok", version)


def check_versions(facts: Packages) -> Finding:
    """Every declared requirement of the packages that matter, as pip would check it."""
    for owner, texts in facts.requirements.items():
        for requirement in map(Requirement, texts):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            name = canonicalize_name(requirement.name)
            found = facts.versions.get(name)
            fix = f"python -m pip install '{requirement.name}{requirement.specifier}'"
            if found is None:
                return Finding("WRONG", f"{owner} asks for {name}, which is not installed", fix)
            if not requirement.specifier.contains(found, prereleases=True):
                asked = f"{name}{requirement.specifier}"
                return Finding("WRONG", f"{owner} asks for {asked}, installed is {found}", fix)
    text = ", ".join(f"{name} {facts.versions.get(name, 'missing')}" for name in SHOWN)
    if "jdllm" not in facts.versions:
        fix = "python -m pip install -e ."
        return Finding("note", f"{text}; jdllm runs uninstalled, its own needs are unchecked", fix)
    return Finding("ok", text)


def check_plugin(facts: Packages) -> Finding:
    """JAX leaves a CUDA plugin of another version than jaxlib's aside."""
    if not facts.cuda:
        return Finding("ok", "none installed; only GPUs need one")
    jaxlib, jax = facts.versions.get("jaxlib", "0"), facts.versions.get("jax", "")
    series = sorted({cuda_series(name) for name in facts.cuda})
    text = ", ".join(f"{name} {version}" for name, version in facts.cuda.items())
    install = f"python -m pip install -U 'jax[cuda{series[-1]}]=={jax}'"
    if any(release(version) != release(jaxlib) for version in facts.cuda.values()):
        return Finding("WRONG", f"{text} do not fit jaxlib {jaxlib}, so JAX ignores them", install)
    if len(series) > 1:
        others = [name for name in facts.cuda if cuda_series(name) != series[-1]]
        fix = f"python -m pip uninstall {' '.join(others)}"
        return Finding("note", f"{text}: plugins of two CUDA versions get in each other's way", fix)
    return Finding("ok", text)


def check_triton(facts: Packages) -> Finding:
    """Pairs of jax-triton and triton that work with each other."""
    ours, triton = facts.versions.get("jax-triton"), facts.versions.get("triton")
    if ours is None:
        return Finding("ok", "jax-triton is not installed; only GPUs can use it")
    if triton is None:
        fix = f"python -m pip install 'jax-triton=={ours}' triton"
        return Finding("WRONG", f"jax-triton {ours} without triton", fix)
    oldest = OLDEST_TRITON.get(release(ours)[:2], ())
    if release(triton) < oldest:
        need = ".".join(map(str, oldest))
        fix = f"python -m pip install 'triton>={need}', or 'jax-triton==0.3.1' with triton 3.6"
        return Finding("WRONG", f"jax-triton {ours} needs triton {need}, not {triton}", fix)
    return Finding("ok", f"jax-triton {ours} with triton {triton}")


def check_gpu(facts: Machine) -> Finding:
    """A GPU that is there is used, by a driver that is new enough."""
    driver, cuda = facts.driver, facts.packages.cuda
    if driver is None:
        return Finding("ok", "no NVIDIA driver is loaded")
    for name in cuda:
        oldest = OLDEST_DRIVER.get(cuda_series(name), ())
        if release(driver) < oldest:
            fix = f"install driver {oldest[0]} or newer, or a JAX for an older CUDA"
            return Finding("WRONG", f"driver {driver} is too old for {name}", fix)
    if facts.probe.backend == "gpu":
        return Finding("ok", f"driver {driver}, and JAX uses it")
    if facts.platforms and "cuda" not in facts.platforms and "gpu" not in facts.platforms:
        text = f"driver {driver}, but JAX_PLATFORMS={facts.platforms} keeps JAX off it"
        return Finding("note", text, "unset JAX_PLATFORMS")
    seen = facts.probe.backend or "nothing"
    if not cuda:
        text = f"driver {driver}, but JAX has no CUDA plugin and sees {seen}"
        return Finding("WRONG", text, "python -m pip install -e '.[cuda13]'")
    text = f"driver {driver} and a CUDA plugin, but JAX sees {seen}"
    return Finding("WRONG", text, "python -c 'import jax; jax.devices(\"cuda\")' says why")


def check_devices(facts: Machine) -> Finding:
    """What JAX computes on."""
    probe = facts.probe
    if not probe.devices:
        text = f"JAX finds no device: {probe.error}"
        if facts.platforms:
            text = f"with JAX_PLATFORMS={facts.platforms} {text}"
        return Finding("WRONG", text, "unset JAX_PLATFORMS" if facts.platforms else WHOLE_STORY)
    text = f"{len(probe.devices)} x {probe.devices[0]} ({probe.backend})"
    if probe.device_memory:
        text += f", {probe.device_memory / 1e9:.1f} GB for JAX on each"
    return Finding("ok", text)


def check_memory(available: int) -> Finding:
    """Host memory, within the limit of a container."""
    text = f"{available / 1e9:.1f} GB available"
    if available < NEED_MEMORY:
        fix = f"free some: even the bundled model needs {NEED_MEMORY / 1e9:.1f} GB"
        return Finding("WRONG", text, fix)
    return Finding("ok", text)


def check_home(facts: Folder) -> Finding:
    """Where converted models and compiled programs are kept."""
    fix = "set JDLLM_HOME to a folder on a disk with room that you may write to"
    if facts.error:
        return Finding("WRONG", f"nothing can be written to {facts.path}: {facts.error}", fix)
    text = f"{facts.path}, {facts.free / 1e9:.1f} GB free"
    return Finding("WRONG" if facts.free < NEED_DISK else "ok", text, fix)


def check_hugging_face(facts: HuggingFace) -> Finding:
    """Downloads; nothing here keeps the bundled model from generating."""
    cache = facts.cache
    token = "a token is set" if facts.token else "no token (public models need none)"
    if cache.error:
        fix = "set HF_HOME to a folder that you may write to"
        return Finding("note", f"nothing can be written to {cache.path}: {cache.error}", fix)
    text = f"{cache.path}, {cache.free / 1e9:.1f} GB free, {token}"
    if facts.offline:
        return Finding("note", f"{text}; HF_HUB_OFFLINE forbids downloads", "unset HF_HUB_OFFLINE")
    return Finding("ok", text)


def check_generation(facts: Probe) -> Finding:
    """The bundled model answers a puzzle, and rightly: so the numbers are right, too."""
    if facts.error:
        return Finding("WRONG", facts.error, WHOLE_STORY)
    speed = f"{facts.tokens} tokens in {facts.seconds:.1f} s with compilation"
    if not facts.solved:
        text = f"the bundled model's answer to a sudoku is wrong: {facts.text!r} ({speed})"
        return Finding(
            "WRONG",
            text,
            "this device or its libraries compute wrongly: report it with these lines",
        )
    return Finding("ok", f"the bundled model solved a sudoku, {speed}")


def check_kernels(facts: Probe) -> Finding:
    """Which implementations served, why none that is preferred did, and what canaries say."""
    if not facts.kernels:
        fix = "see to the generation, one line above"
        return Finding("note", "unknown, since nothing was generated", fix)
    said = []
    for row in facts.kernels:
        why = ", ".join(f"{name}: {reason}" for name, reason in row["refused"].items())
        said.append(f"{row['operation']} by {row['chosen']}" + (f" ({why})" if why else ""))
    for name, reason in facts.canaries.items():
        said.append(f"{name} {f'is not for this device: {reason}' if reason else 'agrees'}")
    return Finding("ok", "; ".join(said))


def probe() -> None:
    """What the child process does: a line of JSON about devices, then one about a generation."""
    import jax

    devices = jax.devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    kinds = [device.device_kind for device in devices]
    seen = {"backend": jax.default_backend(), "devices": kinds, "device_memory": memory}
    print(json.dumps(seen), flush=True)

    from jdllm.kernels.choose import canaries, choices
    from jdllm.llm import LLM
    from jdllm.load import enable_compilation_cache
    from jdllm.tasks import TASKS

    start = time.perf_counter()
    enable_compilation_cache()
    task = TASKS["sudoku"]
    (puzzle,) = task.generate(1, 0, held_out=True)
    (completion,) = LLM.load("bundled").generate([task.prompt(puzzle)])
    text = completion.text or ""
    done = {"text": text, "solved": task.grade(puzzle, text)["solved"] == 1}
    done |= {"tokens": len(completion.ids), "seconds": time.perf_counter() - start}
    done |= {"kernels": choices(), "canaries": canaries()}
    print(json.dumps(done), flush=True)


def run_probe(seconds: float, code: str = "from jdllm.checkup import probe; probe()") -> Probe:
    """Runs `probe` in a process of its own, which is killed after `seconds`.

    Its output goes to files, so that not even a child that cannot be killed keeps this waiting.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=err)
        error = ""
        try:
            if status := child.wait(seconds):
                error = f"the process ended with status {status}"
        except subprocess.TimeoutExpired:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
            error = f"no end after {seconds:.0f} s; seconds=... waits longer"
        out.seek(0)
        err.seek(0)
        facts: dict[str, Any] = {}
        for line in filter(lambda line: line.startswith("{"), out.read().splitlines()):
            facts |= json.loads(line)
        last = [line for line in err.read().splitlines() if line.strip()][-1:]
    if error:
        facts["error"] = ": ".join([error, *last])
    facts["devices"] = tuple(facts.get("devices", ()))
    return Probe(**facts)


class Check(NamedTuple):
    """One line of the table: how its facts are read, and how they are judged."""

    name: str
    read: Callable[[], Any]
    judge: Callable[[Any], Finding]


def checks(seconds: float) -> list[Check]:
    """The table, in the order in which it is printed."""
    packages, child = functools.cache(machine.read_packages), functools.cache(run_probe)

    def read_machine() -> Machine:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return Machine(machine.read_driver(), platforms, packages(), child(seconds))

    def read_child() -> Probe:
        return child(seconds)

    return [
        Check("Python", packages, check_python),
        Check("packages", packages, check_versions),
        Check("CUDA plugin", packages, check_plugin),
        Check("triton", packages, check_triton),
        Check("GPU", read_machine, check_gpu),
        Check("devices", read_machine, check_devices),
        Check("memory", machine.read_memory, check_memory),
        Check("JDLLM_HOME", machine.read_home, check_home),
        Check("Hugging Face", machine.read_hugging_face, check_hugging_face),
        Check("generation", read_child, check_generation),
        Check("kernels", read_child, check_kernels),
    ]


def examine(table: list[Check]) -> Iterator[tuple[str, Finding]]:
    """Findings by name; facts that cannot even be read are WRONG, too."""
    for name, read, judge in table:
        try:
            finding = judge(read())
        except Exception as error:
            finding = Finding("WRONG", f"cannot be found out: {type(error).__name__}: {error}")
        yield name, finding


def report(config: DoctorConfig) -> bool:
    """Prints the table, and returns whether nothing in it is WRONG."""
    found = []
    for name, finding in examine(checks(config.seconds)):
        fix = finding.fix if finding.status != "ok" else ""
        found.append({"check": name, **dataclasses.asdict(finding), "fix": fix})
        if not config.json:
            print(f"{finding.status:<6} {name:<13} {finding.text}", flush=True)
            print(f"{'':20} fix: {fix}\n" * bool(fix), end="", flush=True)
    good = all(one["status"] != "WRONG" for one in found)
    if config.json:
        print(json.dumps({"good": good, "checks": found}, indent=2))
    return good
