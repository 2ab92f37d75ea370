"""Programs that attack their grader: each wants a wrong add() to pass, to leave traces, or to stay.

GROUPS and REACHES hold a program per name, to be graded by TESTS. filled() puts in what it aims at:
{outside} is a path where nothing is, {kept} and {secret} files, {port} a port that is listened on,
{mark} a word to be found in command lines.
"""

# What every attack is judged by; the last line is what equality tricks would have to fool.
TESTS = """
import math
def check(candidate):
    assert candidate(2, 3) == 5
    assert not candidate(2, 2) != 4
    assert math.isclose(candidate(0.5, 0.25), 0.75)
    assert isinstance(candidate(1, 1), int) and candidate([1], [2]) == [1, 2]
    assert len({candidate(n, n) for n in range(9)}) == 9 and sorted([candidate(1, 2)]) == [3]
check(add)
"""
WRONG = "def add(a, b):\n    return 0\n"
HEAD = "import builtins, math, os, sys\n"


def equal(base: str, value: str, more: str = "") -> str:
    """Returns a program whose add() returns a value that equals everything."""
    return (
        f"class Yes({base}):\n"
        "    def __eq__(self, other): return True\n"
        "    def __ne__(self, other): return False\n"
        "    def __hash__(self): return 1\n"
        "    def __bool__(self): return True\n"
        f"{more}"
        f"def add(a, b): return Yes({value})"
    )


# Judges that the program replaces where it can.
PATCHES = {
    "builtins": "for name in ('isinstance', 'len', 'sorted', 'abs', 'all', 'any'):\n"
    "    setattr(builtins, name, lambda *_, **__: True)",
    "AssertionError": "builtins.AssertionError = type('Quiet', (Exception,), {})",
    "build_class": "builtins.__build_class__ = lambda *_, **__: 5",
    "import": "builtins.__import__ = lambda *_, **__: sys",
    "names of builtins": "len = sorted = isinstance = set = lambda *_: 5",
    "isclose": "math.isclose = lambda *_, **__: True",
    "false module": "class math: isclose = staticmethod(lambda *_, **__: True)",
    "modules": "sys.modules['math'] = type('M', (), {'isclose': lambda *_, **__: True})()",
    "check": "def check(candidate): pass",
    "write": "os.write = lambda *_: 0",
    "read": "os.read = lambda *_: b''",
    "exit": "os._exit = lambda *_: None\nsys.exit = lambda *_: None",
    "excepthook": "sys.excepthook = lambda *_: os._exit(0)",
    "unraisablehook": "sys.unraisablehook = lambda *_: os._exit(0)",
    "trace": "def trace(frame, *_):\n    frame.f_trace_lines = False\n    return trace\n"
    "sys.settrace(trace)\nsys.setprofile(lambda *_: None)",
    "wire's functions": "for m in [m for n, m in sys.modules.items() if n.startswith('jdllm')]:\n"
    "    for name, it in list(vars(m).items()):\n"
    "        if callable(it) and not isinstance(it, type): setattr(m, name, lambda *_, **__: True)",
    "wire's code": "from jdllm.tasks.graders.guard import wire\n"
    "wire.Peer.ask.__code__ = (lambda *_, **__: None).__code__\n"
    "wire.Remote.__eq__ = lambda *_: True",
    "operations": "from jdllm.tasks.graders.guard import judge\n"
    "for name in list(judge.OF_PROGRAM): judge.OF_PROGRAM[name] = lambda *_, **__: True",
    "audit hook": "sys.addaudithook(lambda *_: None)",
    "meta_path": "class F:\n    def find_spec(self, name, *_): return None\n"
    "sys.meta_path[:] = [F()]",
    "frames": "f = sys._getframe()\nwhile f:\n    f.f_globals.update(passed=True, "
    "judge=None, report=lambda *_: None)\n    f.f_locals.update(what='passed')\n    f = f.f_back",
}
EQUALS = {
    "object": equal("", ""),
    "int": equal("int", "5"),
    "float": equal("float", "5"),
    "str": equal("str", "'5'", "    def encode(self, *_): return b'passed'\n"),
    "list": equal("list", "[1]"),
    "tuple": equal("tuple", "()"),
    "dict": equal("dict", ""),
    "class that lies": equal("", "", "    __class__ = int\n"),
    "number of all trades": equal(
        "", "", "".join(f"    def __{n}__(self, *_): return 5\n" for n in
                        ("int", "index", "float", "len", "add", "sub", "abs", "lt", "gt"))
    ),
    "array": equal("", "", "    __array_interface__ = {'data': (1 << 20, False), 'shape': (9,), "
                   "'typestr': '<i8', 'version': 3}\n"),
    "metaclass": "class M(type):\n    def __eq__(self, other): return True\n"
    "    __hash__ = type.__hash__\nclass Yes(metaclass=M): pass\ndef add(a, b): return Yes",
    "mock": "from unittest.mock import ANY\ndef add(a, b): return ANY",
    "not a number": "def add(a, b):\n    import decimal\n    return decimal.Decimal('nan')",
    "StopIteration": "def add(a, b): raise StopIteration",
}  # fmt: skip
# Leaving, before or while the tests ask, with all the words of a pass.
EXITS = {
    "sys.exit": "sys.exit(0)",
    "exit in the call": "def add(a, b): sys.exit(0)",
    "_exit": "os._exit(0)",
    "_exit in the call": "def add(a, b): os._exit(0)",
    "KeyboardInterrupt": "def add(a, b): raise KeyboardInterrupt",
    "GeneratorExit": "def add(a, b): raise GeneratorExit",
    "atexit": "import atexit\natexit.register(lambda: os.write(1, b'1passed'))\nsys.exit()",
    "kill": "os.kill(os.getpid(), 9)",
    "raise_signal": "import signal\nsignal.raise_signal(15)",
    "abort": "os.abort()",
    "print": "print('1passed', flush=True)\nsys.stderr.write('1passed')",
    "all descriptors": "for fd in range(300):\n    try: os.write(fd, b'1passed' * 9)\n"
    "    except OSError: pass",
    "close all": "os.closerange(0, 300)",
    "segfault": "import ctypes\nctypes.string_at(0)",
}


def forged(message: str) -> str:
    """Returns a program that answers before it is asked, with a message of the true protocol."""
    return (
        "from jdllm.tasks.graders.guard import wire\n"
        "p = wire.Peer(3, 4, {}, None, lambda _: True)\n"
        f"for _ in range(50):\n    p.send(p.pack({message}))"
    )


LIES = (
    "{'add': add, '__builtins__': {n: lambda *_: True for n in dir(builtins)}, "
    "'check': lambda _: True, 'math': add}"
)
FORGED = {
    "builtins of the judge": forged(f"['value', ({{}}, {LIES}), None]"),
    "modules of the judge": forged("['value', ({'__builtins__': 'os', 'add': 'os'}, {}), None]"),
    "changed arguments": forged(
        "['value', ({}, {'add': add, '__builtins__': {}}), ('', ['add', '__builtins__'])]"
    ),
    "verdict": forged("['value', ({}, {'add': True}), None]"),
    "passed": forged("['value', 'passed', None]"),
    "true": forged("['value', True, None]"),
    "report": forged("['ask', 'report', (True, 'passed'), {}]"),
    "eval": forged("['ask', 'call', (eval, '__import__(\"os\")._exit(0)'), {}]"),
    "object of the judge": forged("['ask', 'getattr', (5, '__globals__'), {}]"),
    "recursion": forged("['ask', 'call', (p._object(b'm', 0),), {}]"),
    "bytes": "os.write(4, b'passed' * 1000)",
    "endless length": "os.write(4, b'\\xff' * 8)\ndef add(a, b): return a + b + 1",
    "half a message": "os.write(4, (100).to_bytes(8) + b'x')\nimport time\ntime.sleep(60)",
    "deep value": "os.write(4, (9 * 10**5).to_bytes(8) + (b'l' + (1).to_bytes(8)) * 10**5)",
    "long value": "os.write(4, (9).to_bytes(8) + b'l' + (1 << 60).to_bytes(8))",
    "pickle": "class P:\n    def __reduce__(self): return (os._exit, (0,))\n"
    "def add(a, b): return P()",
}
# Reading what is expected.
READS = {
    "frames": "def add(a, b):\n    f = sys._getframe()\n    while f:\n"
    "        for v in [*f.f_globals.values(), *f.f_locals.values()]:\n"
    "            if 'candidate(2, 3)' in str(v): return a + b\n        f = f.f_back\n    return 0",
    "gc": "import gc\ndef add(a, b):\n    found = [o for o in gc.get_objects() if 'candidate(2, 3' "
    "in str(getattr(o, '__dict__', ''))]\n    return a + b if found else 0",
    "inspect": "import inspect\ndef add(a, b):\n"
    "    return a + b if any('candidate' in str(f.code_context) for f in inspect.stack()) else 0",
    "memory of the parent": "def add(a, b):\n"
    "    open(f'/proc/{os.getppid()}/mem', 'rb')\n    return a + b",
    "environment of the parent": "def add(a, b):\n"
    "    open(f'/proc/{os.getppid()}/environ').read()\n    return a + b",
    "input": "text = sys.stdin.read()\ndef add(a, b): return a + b if text else 0",
    "inherited descriptors": "found = []\nfor fd in range(5, 300):\n"
    "    try: os.fstat(fd); found.append(fd)\n    except OSError: pass\n"
    "def add(a, b): return a + b if found else 0",
    "ptrace": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "reached = libc.ptrace(16, os.getppid(), 0, 0) == 0\n"
    "def add(a, b): return a + b if reached else 0",
    "process_vm_readv": "import ctypes\nlibc = ctypes.CDLL(None)\n"
    "reached = libc.syscall(310, 1, None, 0, None, 0, 0) == 0\n"
    "def add(a, b): return a + b if reached else 0",
    "files of ours": "def add(a, b):\n"
    "    return a + b if 'secret' in open({secret!r}).read() else 0",
}
# Bombs: all end as errors or by the clock.
BOMBS = {
    "fork": "while True: os.fork()",
    "fork in threads": "import threading\n"
    "def go():\n    while True: os.fork()\n"
    "for _ in range(50): threading.Thread(target=go).start()",
    "threads": "import threading, time\n"
    "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "memory": "x = bytearray(1 << 28)\nwhile True: x = x + x",
    "memory in the call": "def add(a, b): return 'x' * (1 << 34)",
    "output": "while True: print('x' * 10**6)",
    "value": "def add(a, b): return 'x' * (40 << 20)",
    "values": "def add(a, b): return [0] * 10**7",
    "endless iterator": "def add(a, b):\n    while True: yield 5",
    "endless": "while True: pass",
    "sleep": "import time\ndef add(a, b): time.sleep(60)",
    "huge int": "def add(a, b): return 7 ** (10 ** 9)",
    "long int": "def add(a, b): return 1 << 10**7",
    "recursion": "sys.setrecursionlimit(10**9)\ndef add(a, b): return add(a, b)",
    "recursive value": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "deep value": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "wide value": "def add(a, b):\n    x = [0]\n    for _ in range(60): x = [x, x]\n    return x",
    "regex": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "files": "for n in range(10**6): open(f'{n}', 'wb').write(bytes(1 << 20))",
    "descriptors": "files = [open('/dev/null') for _ in range(10**5)]",
    "shared memory": "import mmap\nmaps = []\n"
    "while True: maps.append(mmap.mmap(-1, 1 << 28)); maps[-1].write(bytes(1 << 28))",
    "signals blocked": "import signal\nsignal.pthread_sigmask(0, range(1, 65))\n"
    "for n in (1, 2, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
}
# Reaching out; every one ends in an error, here or there, and leaves nothing.
REACHES = {
    "open": "open({outside!r}, 'w')",
    "append": "open({outside!r}, 'a').write('x')",
    "path functions patched": "os.path.realpath = lambda p: os.getcwd()\nopen({outside!r}, 'w')",
    "remove": "os.remove({kept!r})",
    "rename": "os.rename({kept!r}, 'mine')",
    "link": "os.link({kept!r}, 'mine')\nopen('mine', 'w')",
    "symlink": "os.symlink({outside!r}, 'way')\nopen('way', 'w').write('x')",
    "symlink to a folder": "os.symlink(os.path.dirname({outside!r}), 'way')\n"
    "open('way/outside', 'w')",
    "chmod": "os.chmod({kept!r}, 0)",
    "utime": "os.utime({kept!r}, (0, 0))",
    "truncate": "os.truncate({kept!r}, 0)",
    "mkdir": "os.mkdir({outside!r})",
    "rmtree": "import shutil\nshutil.rmtree(os.path.dirname({outside!r}))",
    "dir_fd": "fd = os.open('/', os.O_RDONLY)\n"
    "os.open({outside!r}[1:], os.O_CREAT | os.O_WRONLY, dir_fd=fd)",
    "sqlite": "import sqlite3\nc = sqlite3.connect({outside!r})\nc.execute('create table x (y)')",
    "sqlite attach": "import sqlite3\nc = sqlite3.connect(':memory:')\n"
    "c.execute('attach ' + repr({outside!r}) + ' as o')\nc.execute('create table o.x (y)')",
    "logging": "import logging\nlogging.FileHandler({outside!r}).emit(logging.makeLogRecord({}))",
    "ctypes open": "import ctypes\n"
    "fd = ctypes.CDLL(None).open({outside!r}.encode(), 0o102, 0o600)\n"
    "assert fd >= 0",
    "mount": "import ctypes\nassert not ctypes.CDLL(None).mount(b'none', b'/', None, 4128, None)",
    "unshare": "os.unshare(os.CLONE_NEWUSER)",
    "chroot": "os.chroot('.')",
    "proc": "open('/proc/self/oom_score_adj', 'w').write('0')",
    "sysctl": "open('/proc/sys/kernel/hostname', 'w').write('x')",
    "parent's memory": "open(f'/proc/{os.getppid()}/mem', 'r+b')",
    "own library": "open(os.__file__, 'a').write('#')",
    "bytecode": "import importlib.util\n"
    "open(importlib.util.cache_from_source(os.__file__), 'ab').write(b'x')",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "udp": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "s.sendto(b'x', ('127.0.0.1', {port}))",
    "_socket": "import _socket\n_socket.socket(2, 1).connect(('127.0.0.1', {port}))",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).bind({outside!r})",
    "url": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)",
    "resolver": "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.socket(2, 1, 0) >= 0",
    "io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, bytes(120)) >= 0",
    "signal to the parent": "os.kill(os.getppid(), 9)",
    "signal to all": "os.kill(-1, 9)\nos.killpg(0, 9)",
    "signal by descriptor": "import fcntl\nr, w = os.pipe()\n"
    "fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
    "limits of the parent": "import resource\n"
    "resource.prlimit(os.getppid() or 2, resource.RLIMIT_NOFILE, (0, 0))",
    "system": "assert os.system('touch ' + {outside!r}) == 0",
    "subprocess": "import subprocess\nsubprocess.run(['touch', {outside!r}], check=True)",
    "exec": "os.execv('/bin/sh', ['sh', '-c', 'touch ' + {outside!r}])",
    "posix_spawn": "os.posix_spawn('/bin/sh', ['sh', '-c', 'touch ' + {outside!r}], {})",
    "memfd": "fd = os.memfd_create('x')\n"
    "os.write(fd, b'#!/bin/sh\\ntouch ' + {outside!r}.encode())\n"
    "os.execve(fd, ['x'], {})",
    "daemon": "import subprocess\n"
    "subprocess.Popen(['sleep', '60', {mark!r}], start_new_session=True)",
    "double fork": "import time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        time.sleep(2)\n        open({outside!r}, 'w')\n        os._exit(0)",
    "clone": "import ctypes, time\npid = ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0)\n"
    "assert pid >= 0",
    "vfork": "import ctypes\nassert ctypes.CDLL(None).syscall(58) >= 0",
    "32-bit calls": "import ctypes\n"
    "assert ctypes.CDLL(None).syscall(0x40000000 | 41, 2, 1, 0) >= 0",
    "new session": "os.setsid()",
    "outlives its parent": "import ctypes\nassert not ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)",
    "message queue": "import ctypes\nassert ctypes.CDLL(None).shmget(7, 4096, 0o1600) >= 0",
}

RIGHT = "def add(a, b):\n    return a + b\n"
GROUPS = {
    "patch": {name: f"{text}\n{WRONG}" for name, text in PATCHES.items()},
    "equal": EQUALS,
    "exit": EXITS,
    "forge": FORGED,
    "read": READS,
    "bomb": BOMBS,
}


def filled(text: str, **aims: object) -> str:
    """Returns a whole program: imports, a wrong add() where it has none, and its targets."""
    for name, value in aims.items():
        text = text.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", str(value))
    return f"{HEAD}{'' if 'def add' in text else WRONG}{text}"
