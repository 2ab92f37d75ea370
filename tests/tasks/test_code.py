"""Programs under test: what they may not do, what counts as passing, pass@k."""

import itertools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jdllm.tasks.graders import code

RIGHT = "def add(a, b):\n    return a + b\nassert add(2, 3) == 5"


def running(word: str) -> list[str]:
    """Command lines of processes that hold a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [line] if word in line else []
    return found


def test_a_right_program_passes_and_a_wrong_one_says_why():
    assert code.run(RIGHT) == code.Outcome(True, "passed")
    assert code.run(RIGHT.replace("a + b", "a - b")).what.startswith("AssertionError")
    assert code.run("def f(:").what.startswith("ended early")
    assert code.run("print('much ' * 10**6)\nprint(input)").passed
    assert not code.run("assert input() == 'x'").passed


@pytest.mark.parametrize(
    "way_out",
    [
        "import sys; sys.exit(0)",
        "exit()",
        "import os; os._exit(0)",
        "import os, signal; signal.raise_signal(signal.SIGKILL)",
        "print('passed')",
        "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'x passed')\n"
        "    except OSError: pass\nos._exit(0)",
    ],
)
def test_leaving_before_the_tests_is_not_passing(way_out):
    assert not code.run(f"{way_out}\nassert False").passed


@pytest.mark.parametrize("loop", ["while True: pass", "import time; time.sleep(60)"])
def test_an_endless_program_is_stopped(loop):
    begin = time.monotonic()
    assert code.run(loop, timeout=0.5) == code.Outcome(False, "timed out")
    assert time.monotonic() - begin < 8


def test_a_memory_bomb_ends_as_an_error():
    bomb = "x = bytearray(1 << 28)\nwhile True: x = x + x"
    assert code.run(bomb, memory=1 << 30).what.startswith("MemoryError")
    assert code.run("x = bytearray(1 << 26)", memory=1 << 30).passed


@pytest.mark.parametrize(
    "start",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing\np = multiprocessing.Process(target=print); p.start()",
        "from multiprocessing import util; util.spawnv_passfds(b'/bin/true', [b'true'], [])",
        "import os; os.kill(os.getppid(), 9)",
        "import ctypes; ctypes.CDLL('libc.so.6').fork()",
        "import ctypes; ctypes.CDLL(None).fork()",
    ],
)
def test_other_processes_are_out_of_reach(start):
    outcome = code.run(start)
    assert not outcome.passed and outcome.what != "timed out", outcome


def test_processes_that_get_through_the_fence_are_killed_with_the_group(tmp_path, monkeypatch):
    mark = f"jdllm-{os.getpid()}-stray"
    loose = tmp_path / "guard.py"
    loose.write_text(
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(code, "GUARD", loose)
    assert not code.run("", timeout=0.5).passed
    deadline = time.monotonic() + 5
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(mark)


def test_files_are_written_in_the_own_folder_only(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("kept")
    inside = (
        "import os\nopen('mine', 'w').write('x')\nassert open('mine').read() == 'x'\n"
        "os.mkdir('folder'); os.remove('mine')\n"
        "import tempfile\nwith tempfile.NamedTemporaryFile() as file: file.write(b'x')"
    )
    assert code.run(inside).passed, code.run(inside)
    for deed in (
        f"open({str(outside)!r}, 'w')",
        f"import os; os.remove({str(outside)!r})",
        f"import os; os.rename({str(outside)!r}, 'mine')",
        f"import os; os.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)",
        f"import pathlib; pathlib.Path({str(tmp_path / 'new')!r}).mkdir()",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import sqlite3; sqlite3.connect({str(tmp_path / 'new')!r})",
        f"import os; os.symlink({str(outside)!r}, 'way'); open('way', 'w')",
    ):
        assert code.run(deed).what.startswith("PermissionError"), deed
    assert outside.read_text() == "kept" and [*tmp_path.iterdir()] == [outside]


def test_files_have_a_largest_size_and_the_folder_goes():
    whole = "import os\nfile = open('large', 'wb')\nfor _ in range(64): file.write(bytes(1 << 20))"
    assert not code.run(whole).passed
    before = set(Path(code.tempfile.gettempdir()).glob("jdllm-program-*"))
    code.run("import os\nraise ValueError(os.getcwd())")
    assert set(Path(code.tempfile.gettempdir()).glob("jdllm-program-*")) <= before


@pytest.mark.parametrize("isolated", [True, False])
def test_the_network_is_out_of_reach(isolated, tmp_path, monkeypatch):
    if not isolated:  # as on a kernel that grants no namespaces
        text = code.GUARD.read_text().replace("    isolate()\n", "")
        assert text != code.GUARD.read_text()
        (tmp_path / "guard.py").write_text(text)
        monkeypatch.setattr(code, "GUARD", tmp_path / "guard.py")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for call in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
            "import socket; socket.socket()",
            "import socket; socket.getaddrinfo('localhost', 80)",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)",
        ):
            assert not code.run(call).passed, call


def test_a_program_sees_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert code.run("import os; assert 'SECRET_TOKEN' not in os.environ").passed
    assert code.run("import sys, os; assert os.getcwd() not in sys.path").passed


def test_pass_at_k_is_the_mean_over_all_draws():
    for samples, right in itertools.product(range(1, 7), range(7)):
        if right <= samples:
            marks = [True] * right + [False] * (samples - right)
            for k in range(1, samples + 1):
                draws = [any(draw) for draw in itertools.combinations(marks, k)]
                assert code.pass_at_k(samples, right, k) == pytest.approx(sum(draws) / len(draws))
    with pytest.raises(ValueError, match="pass@3 needs 3 samples"):
        code.pass_at_k(2, 1, 3)
    assert code.ks(1) == [1] and code.ks(7) == [1, 5, 7] and code.ks(10) == [1, 5, 10]


def test_scores_of_several_samples():
    wrong = "assert False"
    assert code.scores([RIGHT, wrong, wrong]) == {"pass@1": pytest.approx(1 / 3), "pass@3": 1.0}
    means, _ = code.CodeEval().compute(["assert x == 1"] * 2, [["x = 1"], ["x = 2"]], k=[1, 10])
    assert means == {"pass@1": 0.5}


def test_the_guard_stands_alone():
    """It is run as a script in a bare interpreter, so it may import the standard library only."""
    command = [sys.executable, "-I", "-S", str(code.GUARD)]
    facts = '{"token": "t", "timeout": 5, "memory": 4294967296}\nx = 1'
    done = subprocess.run(command, input=facts, capture_output=True, text=True, check=True)
    assert done.stdout == "t passed"
