"""Pages: which of the pool's pages are free, whose they are, and what those of beginnings hold."""

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jdllm.model.model import Model

NONE = 0
"""The page that nobody writes: it stands in a table where a row has no page."""

ROOM = 0.15
"""Of a device's memory: what a dispatch takes besides the weights and the pages."""


def affordable(model: Model, page: int) -> int:
    """How many pages of `page` columns fit beside the weights; a CPU says nothing, and all fit."""
    config, mesh = model.config, model.mesh
    jax.block_until_ready(model.params)
    device = mesh.local_devices[0] if mesh else jax.local_devices()[0]
    facts = device.memory_stats() or {}
    if (limit := facts.get("bytes_limit")) is None:
        return sys.maxsize
    heads = config.kv_heads // (mesh.shape["model"] if mesh else 1) or 1
    width = np.dtype(model.dtype).itemsize
    per_page = 2 * config.layers * page * heads * config.head_dim * width
    room = (1 - ROOM) * limit - facts.get("bytes_in_use", 0)
    return max(1, int(room // per_page))


def digests(tokens: np.ndarray, page: int, root: str) -> list[bytes]:
    """By page of `page` tokens: what tells its content and all before it. The rest is left out.

    `root` stands for everything else on which keys depend.
    """
    found, before = [], root.encode()
    for start in range(0, len(tokens) // page * page, page):
        text = np.ascontiguousarray(tokens[start : start + page], np.int32).tobytes()
        before = hashlib.blake2b(before + text, digest_size=16).digest()
        found.append(before)
    return found


class PagePool:
    """Pages 1 to `count`, by number. Published pages may have several users, and outlive them: what
    nobody uses is kept until its page is needed, the one used least recently first."""

    def __init__(self, count: int):
        self.count = count
        self._blank = list(range(count, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._users: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that may be taken."""
        return len(self._blank) + len(self._idle)

    @property
    def kept(self) -> int:
        """Pages that nobody uses, but whose content may be asked for."""
        return len(self._idle)

    def take(self, count: int) -> list[int]:
        """So many pages for one user, or none of them where there are fewer."""
        if count > self.free:
            return []
        pages = [self._blank.pop() if self._blank else self._oldest() for _ in range(count)]
        self._users |= dict.fromkeys(pages, 1)
        return pages

    def _oldest(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        return page

    def release(self, pages: Iterable[int]) -> None:
        """One user of each of the pages leaves. The last pages of a text are forgotten first."""
        for page in reversed(list(pages)):
            self._users[page] -= 1
            if self._users[page]:
                continue
            del self._users[page]
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Others may use a page for its content; a second one of the same stays private."""
        if digest not in self._page_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def adopt(self, digest: bytes) -> int | None:
        """The page of that content, which has one user more; None where there is none."""
        page = self._page_of.get(digest)
        if page is not None:
            self._idle.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1
        return page

    def forget(self, pages: Sequence[int]) -> None:
        """The content of some pages is offered to nobody any more."""
        for page in pages:
            if page in self._digest_of:
                del self._page_of[self._digest_of.pop(page)]
            if page in self._idle:
                del self._idle[page]
                self._blank.append(page)
