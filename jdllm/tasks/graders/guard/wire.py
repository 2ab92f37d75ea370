"""How two processes use each other's values: messages of plain data, objects by number.

A message is one value behind its length; a value is a tag, a length or count, and its bytes or
parts. Values of the language's own types travel as they are, subclasses as what they are made of;
every other object stays where it is and is used from afar, as a Remote. Whatever arrives is data:
nothing of it is ever run. Modules that take long to import (typing, json, re) are not used here.
"""

from __future__ import annotations

import builtins
import os
from _collections import deque  # pyright: ignore[reportMissingImports]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

MOST = 32 << 20  # bytes that one side takes from the other, in all
CHANGEABLE = (list, dict, set, bytearray, deque)  # what a call may change in its arguments

# type, tag, what gives its bytes, what makes it of them; a subclass goes as the first that fits
SCALARS: tuple[tuple[type, bytes, Callable, Callable], ...] = (
    (type(None), b"N", lambda value: b"", lambda data: None),
    (bool, b"T", lambda value: b"1" * value, bool),
    (int, b"i", lambda value: f"{int(value):x}".encode(), lambda data: int(data, 16)),
    (float, b"f", lambda value: float.hex(value).encode(),
     lambda data: float.fromhex(data.decode())),
    (str, b"s", lambda value: str.encode(value, "utf-8", "surrogatepass"),
     lambda data: data.decode("utf-8", "surrogatepass")),
    (bytes, b"b", bytes, bytes),
    (bytearray, b"B", bytes, bytearray),
)  # fmt: skip
# the same of their parts
WHOLES: tuple[tuple[type, bytes, Callable, Callable], ...] = (
    (dict, b"d", lambda value: [part for pair in dict.items(value) for part in pair],
     lambda parts: dict(zip(parts[::2], parts[1::2], strict=True))),
    (list, b"l", list.__iter__, list),
    (tuple, b"t", tuple.__iter__, tuple),
    (set, b"S", set.__iter__, set),
    (frozenset, b"F", frozenset.__iter__, frozenset),
    (deque, b"q", deque.__iter__, deque),
    (complex, b"c", lambda value: (value.real, value.imag), lambda parts: complex(*parts)),
    (range, b"r", lambda value: (value.start, value.stop, value.step), lambda parts: range(*parts)),
)  # fmt: skip
# Types of libraries: module, name, the text or list that makes one, and what makes it of that.
LIBRARY = (
    ("decimal", "Decimal", str, "Decimal"),
    ("fractions", "Fraction", str, "Fraction"),
    ("numpy", "ndarray", lambda array: array.tolist(), "array"),
)
READ_SCALAR = {tag: make for _, tag, _, make in SCALARS}
READ_WHOLE = {tag: make for _, tag, _, make in WHOLES}


class Remote:
    """An object of the other process: using it asks there, comparing it asks nobody.

    It equals no plain value. Two of them cannot be compared: the program would be its own judge.
    """

    __slots__ = ("_ask", "_number")

    def __init__(self, ask: Callable[..., Any], number: int):
        self._ask, self._number = ask, number

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._ask("call", self, *given, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)  # protocols of libraries, of memory even
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Remote.__slots__:
            object.__setattr__(self, name, value)
        else:
            self._ask("setattr", self, name, value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote):
            raise TypeError("objects of the program's own classes cannot be compared")
        return False

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return self._ask("bool", self) is True


def _from_afar(name: str, kind: type | None) -> Callable[..., Any]:
    def method(self: Remote, *given: Any) -> Any:
        found = self._ask(name, self, *given)
        if kind and type(found) is not kind:
            raise TypeError(f"{name}() of the program gives no {kind.__name__}")
        return found

    return method


for _name, _kind in {
    "iter": None, "next": None, "getitem": None, "setitem": None,
    "len": int, "int": int, "float": float, "str": str, "repr": str,
}.items():  # fmt: skip
    setattr(Remote, f"__{_name}__", _from_afar(_name, _kind))


class Peer:
    """One end of the line: asks the other side to do an operation, and does what it is asked."""

    def __init__(
        self, read: int, write: int, operations: dict[str, Callable], end: Callable, lends: Callable
    ):
        """`end(why)` is called where the other side is gone or sends no message, and must not
        return; `lends(object)` says whether the other side may use an object from afar.
        """
        self.read, self.write, self.operations = read, write, operations
        self.end, self.lends = end, lends
        self.left = MOST
        self.lent: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}

    def pack(self, value: Any) -> bytes:
        """Returns a value's bytes; TypeError for one that is no data and may not be lent."""
        for kind, tag, give, _ in SCALARS:
            if isinstance(value, kind):
                data = give(value)
                return tag + len(data).to_bytes(8) + data
        for kind, tag, give, _ in WHOLES:
            if isinstance(value, kind):
                return self._whole(tag, give(value))
        kind = type(value)
        for number, (module, name, give, _) in enumerate(LIBRARY):
            if (kind.__module__, kind.__name__) == (module, name):
                return self._whole(b"L", (number, give(value)))
        if kind is Remote:
            return self._whole(b"y", (value._number,))
        if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
            return self._whole(b"k", (value.__name__,))
        if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
            return self.pack(value.item())
        if not self.lends(value):
            raise TypeError(f"a {kind.__name__} cannot be given to the program")
        number = self.numbers.setdefault(id(value), len(self.lent))
        self.lent[number] = value
        return self._whole(b"m", (number,))

    def _whole(self, tag: bytes, parts: Iterable) -> bytes:
        packed = [*map(self.pack, parts)]
        return tag + len(packed).to_bytes(8) + b"".join(packed)

    def unpack(self, data: bytes, at: int = 0) -> tuple[Any, int]:
        """Returns the value that begins at `at`, and where it ends. Raises where there is none."""
        tag, size, at = data[at : at + 1], int.from_bytes(data[at + 1 : at + 9]), at + 9
        if size > len(data) - at:
            raise ValueError("a value is longer than its message")
        if tag in READ_SCALAR:
            return READ_SCALAR[tag](data[at : at + size]), at + size
        parts = []
        for _ in range(size):
            part, at = self.unpack(data, at)
            parts.append(part)
        if tag in READ_WHOLE:
            return READ_WHOLE[tag](parts), at
        return self._object(tag, *parts), at

    def _object(self, tag: bytes, what: Any, given: Any = None) -> Any:
        """Returns an object that is no plain data: of a library, lent by a side, or a type."""
        if tag == b"L":
            module, _, _, make = LIBRARY[what]
            return getattr(__import__(module), make)(given)
        if tag == b"m" and type(what) is int:
            return Remote(self.ask, what)
        if tag == b"y":
            return self.lent[what]
        if tag == b"k" and isinstance(vars(builtins)[what], type):
            return vars(builtins)[what]
        raise ValueError(f"{tag} is the tag of no value")

    def send(self, message: bytes) -> None:
        """Writes a message whole."""
        data = memoryview(len(message).to_bytes(8) + message)
        try:
            while data:
                data = data[os.write(self.write, data) :]
        except OSError:
            self.end("ended early")

    def receive(self) -> Any:
        """Returns the next message; end() where there is none, or too much of it."""
        size = int.from_bytes(self._bytes(8))
        self.left -= size
        if self.left < 0:
            self.end("too much output")
        data = self._bytes(size)
        try:
            return self.unpack(data)[0]
        except Exception:
            self.end("sent no message")

    def _bytes(self, count: int) -> bytes:
        parts = []
        while count:
            part = os.read(self.read, min(count, 1 << 16))
            if not part:
                self.end("ended early")
            count -= len(part)
            parts.append(part)
        return b"".join(parts)

    def ask(self, operation: str, *given: Any, **named: Any) -> Any:
        """Returns what the other side returns, or raises the error that it raises there.

        Changes that it makes to lists and other containers of its arguments are made here too.
        """
        self.send(self.pack(["ask", operation, given, named]))
        while True:
            match self.receive():
                case ["ask", str(asked), tuple(), dict()] as message:
                    self.answer(asked, *message[2:])
                case ["value", result, changed]:
                    if changed is not None:
                        restore(given, changed)
                    return result
                case ["raised", list(names), str(words)]:
                    raise error(names, words, operation)
                case _:
                    self.end("sent no message")

    def answer(self, operation: str, given: tuple, named: dict) -> None:
        """Does an operation and sends what it returns or raises."""
        try:
            watched = any(isinstance(one, CHANGEABLE) for one in given)
            before = self.pack(given) if watched else None
            result = self.operations[operation](*given, **named)
            changed = watched and self.pack(given) != before
            reply = self.pack(["value", result, given if changed else None])
        except Exception as problem:
            names = [kind.__name__ for kind in type(problem).__mro__]
            reply = self.pack(["raised", names, text(problem)])
        self.send(reply)

    def serve(self) -> None:
        """Answers until the line ends."""
        while True:
            _, operation, given, named = self.receive()
            self.answer(operation, given, named)


def text(problem: BaseException) -> str:
    """Returns an error's words, at most 500 of its letters."""
    try:
        own = problem.args[0] if len(problem.args) == 1 else None  # KeyError quotes its own
        return str(own if isinstance(own, str) else problem)[:500]
    except Exception:
        return ""


def error(names: list, words: str, operation: str) -> Exception:
    """Returns the nearest of Python's own errors to one that has these names, its own first.

    StopIteration ends loops that run over calls, so only next() may raise it.
    """
    for name in names:
        if name == "StopIteration" and operation != "next":
            return RuntimeError("StopIteration")
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(words)
            except TypeError:  # one that wants more than words
                continue
    return Exception(words)


def restore(old: Any, new: Any) -> Any:
    """Puts `new` into the container `old` where types agree, inner ones too, and returns it."""
    if type(old) is not type(new):
        return new
    if isinstance(old, list | deque):
        pairs = zip(old, new, strict=False)
        kept = [restore(*pair) for pair in pairs] + list(new)[len(old) :]
        old.clear()
        old.extend(kept)
    elif isinstance(old, tuple) and len(old) == len(new):
        for pair in zip(old, new, strict=True):
            restore(*pair)
    elif isinstance(old, dict):
        kept = {key: restore(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(kept)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new
    else:
        return new
    return old
