"""Progress bars on standard error that say what they wait for."""

import contextlib
from collections.abc import Iterator
from typing import Any, Self

from tqdm import tqdm

_open: list["Bar"] = []


class Bar(tqdm):
    """tqdm's bar, which `doing` finds while it is entered."""

    def __enter__(self) -> Self:
        _open.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _open.remove(self)
        super().__exit__(*error)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """The bar that was entered last, where one is shown, says `what` while the block runs."""
    if not _open or _open[-1].disable:
        yield
        return
    bar = _open[-1]
    before = bar.postfix or ""
    bar.set_postfix_str(what)
    try:
        yield
    finally:
        bar.set_postfix_str(before)
