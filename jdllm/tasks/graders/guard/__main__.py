"""Judges one program: `python -I -S __main__.py FACTS`, with program and tests on standard input.

FACTS is {"sandbox", "timeout", "memory", "home", "readable", "path"}, marshalled, in hexadecimal;
the input {"program", "tests"}, marshalled. On standard output comes 1 or 0 and what happened. The
process forks: the child, which runs the program, has two pipes to the parent, which runs the tests
and gives the verdict.
"""

import marshal
import os
import sys


def bare() -> None:
    """Lets this folder be imported without the packages around it, which take seconds."""
    for name, folder in (
        ("jdllm", []),
        ("jdllm.tasks", []),
        ("jdllm.tasks.graders", []),
        ("jdllm.tasks.graders.guard", [os.path.dirname(os.path.abspath(__file__))]),
    ):
        sys.modules[name] = type(sys)(name)
        sys.modules[name].__path__ = folder


def report(passed: bool, what: str, program: int = 0) -> None:
    """Ends the program's process, then says the verdict, and ends this one whatever it does."""
    if program:
        os.kill(program, 9)
        os.waitpid(program, 0)
    os.write(1, f"{int(passed)}{what}".encode(errors="replace"))
    os._exit(0)


def silent(kept: int) -> None:
    """Points standard input and output at nothing, and closes all files from `kept` on."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(kept, 1 << 16)


def child(facts: dict, asked: int, said: int) -> None:
    """Runs the program, behind all walls, until the parent has no more questions."""
    from jdllm.tasks.graders.guard import judge, sandbox

    asked, said = os.dup2(asked, 200), os.dup2(said, 201)
    asked, said = os.dup2(asked, 3), os.dup2(said, 4)
    silent(5)
    sandbox.follow()
    sandbox.limit(facts["timeout"], facts["memory"])
    sandbox.confine(facts["sandbox"])
    judge.perform(asked, said)


def main() -> None:
    """Builds the walls, parts program and tests, and reports."""
    bare()
    from jdllm.tasks.graders.guard import judge, sandbox

    facts = marshal.loads(bytes.fromhex(sys.argv[1]))
    sys.path += facts["path"]
    sandbox.follow()
    try:
        sandbox.KINDS[facts["sandbox"]](facts["home"], facts["readable"])
    except (OSError, AttributeError) as error:
        report(False, f"no {facts['sandbox']}: {error}")
    asked, ask = os.pipe()
    say, said = os.pipe()
    program = os.fork()
    if not program:
        try:
            child(facts, asked, said)
        finally:
            os._exit(1)
    os.close(asked)
    os.close(said)
    sandbox.hide()
    sandbox.limit(facts["timeout"], facts["memory"])
    sandbox.confine(facts["sandbox"], program)
    given = marshal.loads(sys.stdin.buffer.read())

    def end(why: str) -> None:
        report(False, why, program)

    what = judge.judge(say, ask, given["program"], given["tests"], end)
    report(what == "passed", what, program)


if __name__ == "__main__":
    main()
