"""Programs under test: what counts as passing, the values that tests see, sandboxes, pass@k.

JDLLM_DATA=FOLDER judges the reference solutions of HumanEval and MBPP in that folder as well.
"""

import fractions
import itertools
import math
import os
import struct
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdllm.tasks.graders import code
from jdllm.tasks.graders.guard import filter, judge, wire
from jdllm.tasks.lm_eval import jsonl, mbpp, stock

RIGHT = "def add(a, b):\n    return a + b"
TESTS = "assert add(2, 3) == 5"
USUAL = 30.0  # seconds: machines that run tests are busy


def passes(program: str, tests: str) -> bool:
    return code.run(program, tests, timeout=USUAL).passed


def test_a_right_program_passes_and_a_wrong_one_says_why():
    assert code.run(RIGHT, TESTS, timeout=USUAL) == code.Outcome(True, "passed")
    assert code.run("", "assert False, 'why'", timeout=USUAL).what == "AssertionError: why"
    assert code.run("def f(:", TESTS, timeout=USUAL).what.startswith("SyntaxError")
    assert code.run(RIGHT, "assert add(2, 'x')").what.startswith("TypeError: unsupported")
    assert code.run(RIGHT, "assert subtract(2, 3)").what.startswith("NameError")
    assert code.run("import os; os._exit(0)", "", timeout=USUAL).what == "ended early"
    assert passes("print('much ' * 10**6)\nprint(input)", "")
    assert not passes("assert input() == 'x'", "")


# What tests of programs do -> a program and tests that pass.
USES = {
    "a mutated argument": (
        "def f(x, y):\n    x.sort()\n    y['k'][0] += 1",
        "x, y = [2, 1], {'k': [1]}\ninner = y['k']\nf(x, y)\n"
        "assert x == [1, 2] and inner == [2] and y['k'] is inner",
    ),
    "a function of the test": (
        "def f(g, xs): return [g(x, k=1) for x in xs]",
        "assert f(lambda x, k: 10 * x + k, (n for n in range(3))) == [1, 11, 21]",
    ),
    "an error of the test's function": (
        "def f(g):\n    try: g()\n    except ZeroDivisionError: return 'caught'",
        "assert f(lambda: 1 / 0) == 'caught'",
    ),
    "types and functions of the language": (
        "def f(xs, kind, g): return [g(x) for x in xs if isinstance(x, kind)], kind",
        "assert f([1, 'x'], int, abs) == ([1], int)",
    ),
    "a generator": (
        "def f(n):\n    for i in range(n): yield i",
        "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0 and sum(f(4)) == 6 and 2 in f(3)",
    ),
    "an expected error": (
        "class Odd(KeyError): pass\ndef f(): raise Odd('x')",
        "try:\n    f()\nexcept KeyError as error: assert error.args == ('x',)\nelse: assert False",
    ),
    "objects of the program": (
        "class Node:\n    def __init__(self, x): self.x, self.next = x, None\n"
        "    def up(self, by=1): self.x += by; return self\n    def __len__(self): return 7\n"
        "def last(n):\n    while n.next: n = n.next\n    return n.x",
        "n = Node(1)\nn.next = Node(2)\nassert last(n) == 2 and n.next.up(by=3).x == 5\n"
        "assert len(n) == 7 and n and n != 5 and not n == None",
    ),
    "a match": ("import re\ndef f(s): return re.search('a+', s)", "assert f('ba') and not f('b')"),
    "numbers of NumPy": (
        "import numpy as np\ndef f(x): return np.sum(x)\ndef g(x): return np.array(x) * 2",
        "assert f([1, 2]) == 3 and np.allclose(g([1.0, 2.0]), [2, 4])",
    ),
    "modules": ("import math", "assert math.isclose(math.pi, 3.14159, abs_tol=1e-3)"),
    "several functions": (
        "def encode(s): return s[::-1]\ndef decode(s): return s[::-1]",
        "for s in ('ab', ''): assert decode(encode(s)) == s",
    ),
    "a function named as one of the language": (
        "def sum(a, b): return a * b",
        "assert sum(2, 3) == 6",
    ),
    "a function named as one of math": (
        "def gcd(a, b): return 'mine'",
        "assert gcd(2, 4) == 'mine'",
    ),
    "a variable": ("LIMIT = (1, {2: [3]})", "assert LIMIT == (1, {2: [3]})"),
    "subclasses": (
        "import collections, enum\nclass S(str): pass\nclass E(enum.IntEnum):\n    A = 1\n"
        "P = collections.namedtuple('P', 'x y')\n"
        "def f(): return [S('x'), E.A, P(1, 2), collections.Counter('aab')]",
        "assert f() == ['x', 1, (1, 2), {'a': 2, 'b': 1}]",
    ),
    "threads": (
        "import threading\ndef f():\n    found = []\n"
        "    t = threading.Thread(target=found.append, args=(5,))\n    t.start(); t.join()\n"
        "    return found",
        "assert f() == [5]",
    ),
    "asyncio": (
        "import asyncio\nasync def g(): return 5\ndef f(): return asyncio.run(g())",
        "assert f() == 5",
    ),
    "files of its own": (
        "import os, tempfile\ndef f():\n    open('mine', 'w').write('x')\n    os.mkdir('folder')\n"
        "    os.rename('mine', 'folder/mine')\n    with tempfile.NamedTemporaryFile() as file:\n"
        "        return open('folder/mine').read(), file.write(b'x')",
        "assert f() == ('x', 1)",
    ),
    "nothing of ours": (
        "import os, sys\nsecret = 'SECRET_TOKEN' in os.environ\npath = os.getcwd() in sys.path",
        "assert not secret and not path",
    ),
}


@pytest.mark.parametrize("use", USES)
def test_what_tests_of_programs_do(use: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    program, tests = USES[use]
    assert code.run(program, tests, timeout=USUAL) == code.Outcome(True, "passed")
    assert not passes("", tests)


def test_the_program_is_no_judge_of_itself():
    assert not passes("class P:\n    def __eq__(*_): return True", "assert P() == P()")
    assert not passes("def f(): return 0\nisclose = lambda *_: True", "assert isclose(f(), 1)")
    assert passes("from math import isclose\ndef f(): return 1", "assert isclose(f(), 1)")
    assert not passes("def f(): return 0\ndef set(x): return 5", "assert set([f()]) == set([1])")
    assert not passes("def f(): return 0\nclass np: allclose = max", "assert np.allclose(f(), [1])")
    assert not passes("def f(x): raise StopIteration", "for y in map(f, [1]): pass")


def test_a_program_ends_in_its_time():
    for loop in ("while True: pass", "import time; time.sleep(60)"):
        begin = time.monotonic()
        assert code.run(loop, "", timeout=0.5) == code.Outcome(False, "timed out")
        assert time.monotonic() - begin < 8
    assert code.run("", "while True: pass", timeout=0.5).what == "timed out"


def test_memory_is_bounded_and_the_folder_goes():
    bomb = "x = bytearray(1 << 28)\nwhile True: x = x + x"
    assert code.run(bomb, "", memory=1 << 30, timeout=USUAL).what.startswith("MemoryError")
    large = "file = open('large', 'wb')\nfor _ in range(64): file.write(bytes(1 << 20))"
    assert not passes(large, "")
    before = set(Path(code.tempfile.gettempdir()).glob("jdllm-program-*"))
    passes("open('left', 'w')", "")
    assert set(Path(code.tempfile.gettempdir()).glob("jdllm-program-*")) <= before


# the wire


class Gone(Exception):
    pass


def pair(lends: bool = True) -> wire.Peer:
    def end(why: str) -> None:
        raise Gone(why)

    return wire.Peer(0, 0, judge.OF_TESTS, end, lambda _: lends)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([-1, 1, 2])),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.lists(inner).map(deque)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers())
        | st.frozensets(st.text())
    ),
    max_leaves=20,
)


@settings(max_examples=50, deadline=None)
@given(plain)
def test_values_arrive_as_they_were(value: object):
    peer = pair(lends=False)
    found, _ = peer.unpack(peer.pack(value))
    assert found == value and type(found) is type(value)


def test_odd_values_arrive_too():
    peer = pair()
    for value in (math.inf, -0.0, 1 << 10**5, "\ud800", bytearray(b"x"), Decimal("1e-9"), int):
        found, _ = peer.unpack(peer.pack(value))
        assert found == value and type(found) is type(value)
    assert math.isnan(peer.unpack(peer.pack(math.nan))[0])
    assert peer.unpack(peer.pack(fractions.Fraction(1, 3)))[0] == fractions.Fraction(1, 3)
    lent, _ = peer.unpack(peer.pack(peer))
    assert isinstance(lent, wire.Remote) and lent != 5 and not hasattr(lent, "__array__")
    with pytest.raises(TypeError, match="cannot be given"):
        pair(lends=False).pack(peer)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60), plain)
def test_bytes_that_are_no_value_raise(noise: bytes, value: object):
    peer = pair()
    whole = peer.pack(value)
    for data in (noise, whole[:-1], noise + whole, whole[:5] + noise):
        try:
            found, _ = peer.unpack(data)
        except Exception:
            continue
        peer.pack(found)


# sandboxes


def test_the_filter_is_a_program_that_the_kernel_takes():
    """Each step's jumps stay inside, and the last steps decide."""
    for machine, writes in itertools.product(filter.MACHINES, (True, False)):
        steps = [*struct.iter_unpack("=HBBI", filter.program(machine, {5, 6}, writes))]
        assert len(steps) < 4096 and steps[-1] == (6, 0, 0, 0x7FFF0000)
        for at, (_, yes, no, _) in enumerate(steps):
            assert at + 1 + max(yes, no) <= len(steps)
    with pytest.raises(KeyError):
        filter.program("riscv64", {5}, True)


def test_the_best_sandbox_is_found_and_another_can_be_named(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def run(program: str, tests: str, kind: str, *_: object) -> code.Outcome:
        tried.append(kind)
        return code.Outcome(kind in works, f"no {kind}")

    monkeypatch.setattr(code, "_run", run)
    monkeypatch.setattr(code.sys, "platform", "linux")
    monkeypatch.delenv(code.CHOICE, raising=False)
    sandbox = code.sandbox.__wrapped__
    works = {"landlock", "seccomp"}
    assert sandbox() == "landlock"
    monkeypatch.setenv(code.CHOICE, "seccomp")
    assert sandbox() == "seccomp" and tried[-1] == "seccomp"
    works = set()
    with pytest.raises(ValueError, match=r"no seccomp\): .* set JDLLM_SANDBOX=none to run them"):
        sandbox()
    monkeypatch.setenv(code.CHOICE, "none")
    assert sandbox() == "none"
    monkeypatch.setenv(code.CHOICE, "jail")
    with pytest.raises(ValueError, match="JDLLM_SANDBOX=jail is none of namespaces, landlock"):
        sandbox()
    monkeypatch.delenv(code.CHOICE)
    monkeypatch.setattr(code.sys, "platform", "darwin")
    with pytest.raises(ValueError, match="need a sandbox of Linux; set JDLLM_SANDBOX=none"):
        sandbox()


def test_without_a_sandbox_no_task_is_loaded(monkeypatch: pytest.MonkeyPatch):
    def refuse() -> str:
        raise ValueError("no sandbox")

    monkeypatch.setattr(code, "sandbox", refuse)
    with pytest.raises(ValueError, match="no sandbox"):
        stock.refuse_code({"task": "humaneval", "unsafe_code": True}, confirmed=True)
    stock.refuse_code({"task": "gsm8k"}, confirmed=True)
    with pytest.raises(ValueError, match="confirm_run_unsafe_code=true"):
        stock.refuse_code({"task": "humaneval", "unsafe_code": True}, confirmed=False)


def test_limits_alone_judge_alike():
    assert code._run(RIGHT, TESTS, "none", USUAL).passed
    assert not code._run(RIGHT, "assert add(2, 3) == 6", "none", USUAL).passed


def test_the_guard_stands_alone():
    """It runs in a bare interpreter: it imports the standard library only, and little of it."""
    script = (
        "import sys, runpy; sys.argv = ['']\n"
        f"main = runpy.run_path({str(code.GUARD)!r})\nmain['bare']()\n"
        "from jdllm.tasks.graders.guard import judge, sandbox\nprint(*sys.modules)"
    )
    command = [sys.executable, "-I", "-S", "-c", script]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    outside = {name.partition(".")[0] for name in loaded} - {*sys.stdlib_module_names}
    assert outside == {"jdllm", "__main__"}
    # runpy itself has typing's and re's kin; what the guard imports is in its files
    text = "".join(p.read_text() for p in code.GUARD.parent.glob("*.py"))
    assert "\nimport json" not in text and "\nimport ast" not in text


# pass@k


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
    wrong = "def add(a, b): return 0"
    found = code.scores([RIGHT, wrong, wrong], TESTS)
    assert found == {"pass@1": pytest.approx(1 / 3), "pass@3": 1.0}
    means, _ = code.CodeEval().compute(["assert x == 1"] * 2, [["x = 1"], ["x = 2"]], k=[1, 10])
    assert means == {"pass@1": 0.5}


def test_humaneval_judges_by_the_helpers_of_its_prompt():
    doc = {
        "prompt": "import math\n\ndef poly(xs, x): return sum(xs) - x\n\ndef find(xs):\n",
        "entry_point": "find",
        "test": "def check(candidate): assert math.fabs(poly([5], candidate([5]))) < 1e-4",
    }
    target = stock._own_helpers({"doc_to_target": stock.CHECK})["doc_to_target"](doc)
    right, cheat = "    return sum(xs)\n", "    return 0\n\ndef poly(xs, x): return 0\n"
    assert passes(doc["prompt"] + right, target)
    assert not passes(doc["prompt"] + cheat, target)
    assert stock._own_helpers({"doc_to_target": "{{x}}"}) == {"doc_to_target": "{{x}}"}


# reference solutions


def documents(file: str) -> list[dict]:
    folder = os.environ.get("JDLLM_DATA")
    path = jsonl.find(Path(folder), file) if folder else None
    if path is None:
        pytest.skip(f"JDLLM_DATA names no folder with {file}")
    return [row for _, row in jsonl.read(path)]


def references(file: str) -> dict[int | str, tuple[str, str, str]]:
    """Of each document of a file: its reference solution, one that returns nothing, and tests."""
    found = {}
    for doc in documents(file):
        if "entry_point" in doc:
            target = stock._own_helpers({"doc_to_target": stock.CHECK})["doc_to_target"]
            right, wrong = (doc["prompt"] + s for s in (doc["canonical_solution"], "    pass\n"))
            tests = target(doc)
        else:
            imports = "\n".join(doc.get("test_imports") or [])
            right = f"{imports}\n{doc['code']}"
            names = [line.split("(")[0] for line in doc["code"].split("\n") if line[:4] == "def "]
            wrong = "\n".join(f"{name}(*_, **__): pass" for name in names)
            tests = "\n".join([doc.get("test_setup_code") or "", mbpp.tests(doc)])
        found[doc["task_id"]] = right, wrong, tests
    return found


@pytest.mark.parametrize(
    "file",
    [
        "humaneval/test.jsonl",
        *(
            pytest.param(f"mbpp/{name}_{split}.jsonl", marks=pytest.mark.slow)
            for name in ("sanitized", "full")
            for split in ("prompt", "test", "validation", "train")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_reference_solutions_pass_and_empty_ones_fail(file: str):
    rows = references(file)

    def judged(row: tuple[str, str, str]) -> tuple[bool, bool]:
        right, wrong, tests = row
        return passes(right, tests), passes(wrong, tests)

    with ThreadPoolExecutor(2) as pool:
        verdicts = dict(zip(rows, pool.map(judged, rows.values()), strict=True))
    assert {key: found for key, found in verdicts.items() if found != (True, False)} == {}
