"""Both ends of a judgement: the program's namespace, and the tests that use it from afar."""

from __future__ import annotations

import _ast as ast  # ast.py imports much that is not needed here
import builtins
import math
import os
import sys

from jdllm.tasks.graders.guard import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType
    from typing import Any


ALIASES = {"np": "numpy", "numpy": "numpy"}
JUDGES = ("fabs", "isclose", "isfinite", "isinf", "isnan")  # of math
TESTS = "tests"


def called(function: Any, *given: Any, **named: Any) -> Any:
    """Returns the object called; it comes first so that its arguments may be named anything."""
    return function(*given, **named)


# What the tests may do with an object of the program.
OF_PROGRAM: dict[str, Callable] = {
    "call": called,
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda whole, key: whole[key],
    "setitem": lambda whole, key, value: whole.__setitem__(key, value),
    **{kind.__name__: kind for kind in (iter, next, len, bool, int, float, str, repr)},
}
# What the program may do with a function or iterator that a test hands it.
OF_TESTS: dict[str, Callable] = {"call": called, "iter": iter, "next": next}


def perform(read: int, write: int) -> None:
    """Runs the program when asked to, then does with its objects what is asked."""
    names: dict[str, Any] = {"__name__": "__main__"}

    def load(program: str, wanted: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
        exec(compile(program, "program", "exec", dont_inherit=True), names)
        found = {name: names[name] for name in wanted if name in names}
        modules = {n: v.__name__ for n, v in found.items() if isinstance(v, type(sys))}
        return modules, {n: v for n, v in found.items() if n not in modules}

    def end(why: str) -> None:
        os._exit(1)

    operations = {"load": load, **OF_PROGRAM}
    wire.Peer(read, write, operations, end, lends=lambda _: True).serve()


def judge(read: int, write: int, program: str, tests: str, end: Callable[[str], None]) -> str:
    """Returns the verdict: "passed", or the error of the program or the tests that use it.

    Names that the tests define, of the language and of modules mean here what they always do;
    others are the program's. `end(why)` reports at once where the program is gone.
    """
    ours: Any = {"__name__": TESTS}
    peer = wire.Peer(read, write, OF_TESTS, end, lends=_lends)
    try:
        tree: Any = compile(tests, TESTS, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        names = (*wanted(tree),)  # a list could be changed there
        modules, values = peer.ask("load", program, names)
        found = chosen(tree, modules, values)  # of which a forged answer may hold more than asked
        ours |= {name: found[name] for name in names if name in found}
        exec(compile(tree, TESTS, "exec", dont_inherit=True), ours)
    except BaseException as problem:
        return f"{type(problem).__name__}: {wire.text(problem)}"
    return "passed"


def _lends(value: Any) -> bool:
    return not isinstance(value, type(sys)) and (callable(value) or hasattr(value, "__next__"))


def walk(node: ast.AST) -> Iterator[Any]:
    """Returns a node of a syntax tree and all below it, in order of appearance."""
    yield node
    for field in node._fields:
        value = getattr(node, field, None)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from walk(part)


def wanted(tree: ast.AST) -> list[str]:
    """Returns the names that tests use and do not define, in order of appearance."""
    nodes = [*walk(tree)]
    defined = {
        name
        for node in nodes
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
            else [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
            if isinstance(node, ast.Import | ast.ImportFrom)
            else []
        )
    }
    used = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    return [n for n in dict.fromkeys(used) if n not in defined and not n.startswith("__")]


def chosen(tree: ast.AST, modules: dict[str, str], values: dict[str, Any]) -> dict[str, Any]:
    """Returns what the program's names mean to the tests.

    A module is this side's own, and only one of the standard library or NumPy. What the tests
    judge by, functions of the language and JUDGES, is never the program's, unless it is the one
    such name there and nothing else is the program's: then that is what the tests are about.
    """
    found = {name: _module(name, real) for name, real in modules.items()}
    subjects = {name: value for name, value in values.items() if not _judges(name)}
    if subjects:
        return found | {n: getattr(math, n) for n in JUDGES if n in values} | subjects
    named = {n.id for n in walk(tree) if isinstance(n, ast.Name) and _judges(n.id)}
    return found | (values if len(named) == 1 else {})


def _judges(name: str) -> bool:
    return name in JUDGES or hasattr(builtins, name)


def _module(name: str, real: str) -> ModuleType:
    real = ALIASES.get(name, name if name in sys.stdlib_module_names else real)
    if real.partition(".")[0] not in {*sys.stdlib_module_names, "numpy"}:
        raise ImportError(f"{name} is no module that tests may use")
    return __import__(real, fromlist=[""])
