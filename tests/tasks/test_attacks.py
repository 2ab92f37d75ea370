"""Programs that attack their grader (attacks.py): none fakes a pass or reaches anything of ours."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jdllm.tasks.graders import code
from tests.support import attacks

if os.uname().sysname != "Linux":
    pytest.skip("sandboxes need Linux", allow_module_level=True)

MEMORY = 1 << 30
SLACK = 5  # seconds that a busy machine takes to start and to end a program


def works(kind: str) -> bool:
    return code._run("", "", kind, timeout=30).passed


# The best one always, the others where the machine has them, with -m slow.
KINDS = [
    "namespaces",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("landlock", "seccomp")),
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if not works(request.param):
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def processes() -> dict[int, str]:
    """The command lines of all processes, by number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found[int(path.parent.name)] = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
    return found


@pytest.fixture
def homes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder below which the programs of this test have theirs."""
    folder = tmp_path_factory.mktemp("homes")
    monkeypatch.setattr(code.tempfile, "tempdir", str(folder))
    return folder


def alive(homes: Path) -> set[int]:
    """Graders and the programs they run, whose command lines tell where their folder is."""
    name = str(homes).encode().hex()
    return {pid for pid, line in processes().items() if name in line}


def judged(
    kind: str, programs: dict[str, str], timeout: float
) -> dict[str, tuple[code.Outcome, float]]:
    """Every program's outcome by TESTS, and the seconds it took."""

    def one(program: str) -> tuple[code.Outcome, float]:
        begin = time.monotonic()
        return code._run(program, attacks.TESTS, kind, timeout, MEMORY), time.monotonic() - begin

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(programs, pool.map(one, programs.values()), strict=True))


def test_a_right_program_passes(kind: str, homes: Path):
    assert code._run(attacks.RIGHT, attacks.TESTS, kind, timeout=30).passed
    watch = "assert look() == 1\nimport time\ntime.sleep(5)"
    with ThreadPoolExecutor(1) as pool:  # while one runs, it is seen
        pool.submit(code._run, "def look(): return 1", watch, kind, 5)
        deadline = time.monotonic() + 5
        while not alive(homes) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert alive(homes)


@pytest.mark.parametrize("group", attacks.GROUPS)
def test_no_attack_fakes_a_pass_or_outlives_its_time(
    kind: str, group: str, tmp_path: Path, homes: Path
):
    (tmp_path / "secret").write_text("secret")
    texts = attacks.GROUPS[group].items()
    secret = str(tmp_path / "secret")
    programs = {name: attacks.filled(text, secret=secret) for name, text in texts}
    if kind == "seccomp":  # which lets programs read
        programs.pop("files of ours", None)
    timeout = 1 if group == "bomb" else 5
    for name, (outcome, seconds) in judged(kind, programs, timeout).items():
        assert not outcome.passed, f"{name} passed"
        assert seconds < timeout + SLACK, f"{name} took {seconds} s: {outcome}"
    assert not alive(homes) and not [*homes.iterdir()]


def test_no_attack_reaches_anything(kind: str, tmp_path: Path, homes: Path):
    kept, outside = tmp_path / "kept", tmp_path / "outside"
    kept.write_text("kept")
    before = kept.stat()
    mark = f"jdllm-{os.getpid()}-stray"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=2) as datagrams:
        port = server.getsockname()[1]
        datagrams.bind(("127.0.0.1", port))
        aims = {"kept": str(kept), "outside": str(outside), "port": port, "mark": mark}
        programs = {
            name: attacks.filled(f"{attacks.RIGHT}{text}", **aims)
            for name, text in attacks.REACHES.items()
        }
        for name, (outcome, _) in judged(kind, programs, 10).items():
            assert not outcome.passed and outcome.what != "timed out", f"{name}: {outcome}"
        for listening in (server, datagrams):
            listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        with pytest.raises(BlockingIOError):
            datagrams.recv(1)
    after = kept.stat()
    assert [*tmp_path.iterdir()] == [kept] and kept.read_text() == "kept"
    assert (after.st_mode, after.st_mtime, after.st_nlink) == (
        before.st_mode,
        before.st_mtime,
        before.st_nlink,
    )
    assert not alive(homes) and not any(mark in line for line in processes().values())


def test_there_are_many_attacks():
    assert sum(map(len, attacks.GROUPS.values())) + len(attacks.REACHES) >= 140
