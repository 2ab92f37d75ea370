"""Decides which generated items may be trained on: by a hash of the item, never by a seed.

An item's key (the sudoku's puzzle string, a countdown's sorted numbers and target) is hashed with
sha256. One hash in HELD_OUT_SHARE is reserved for evaluation whatever seed drew it, and the
hashes listed in held_out.txt (published test items of d1 and Dream) are never trained on either.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable
from importlib import resources

import numpy as np

HELD_OUT_SHARE = 64
DIGEST_LENGTH = 16
BATCH = 8192
DRY_BATCHES = 200  # this many batches without a new document: the held-out side is used up


def digest(key: str) -> str:
    """Returns the first 16 hex digits of the sha256 of a key: the form that held_out.txt lists."""
    return hashlib.sha256(key.encode("ascii")).hexdigest()[:DIGEST_LENGTH]


def reserved(hexdigits: str) -> bool:
    """Returns whether a digest belongs to the share of items reserved for evaluation documents."""
    return int(hexdigits, 16) % HELD_OUT_SHARE == 0


@functools.cache
def listed() -> frozenset[str]:
    """Returns the digests in held_out.txt.

    Raises ValueError, naming the line, when one is not 16 lower-case hex digits.
    """
    text = resources.files(__package__).joinpath("held_out.txt").read_text(encoding="ascii")
    return parse(text)


def parse(text: str) -> frozenset[str]:
    """Reads the list: one digest per line; empty lines and lines that start with # are skipped.

    Raises ValueError, naming the line, when a digest is malformed.
    """
    found = set()
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        if len(word) != DIGEST_LENGTH or set(word) - set("0123456789abcdef"):
            raise ValueError(
                f"held_out.txt line {number}: a digest is {DIGEST_LENGTH} lower-case hex digits, "
                f"this is {word!r}; rewrite the file with experiments/bundled/make_held_out.py"
            )
        found.add(word)
    return frozenset(found)


def admits(key: str, *, held_out: bool) -> bool:
    """Returns whether a generated item is on the side asked for: evaluation or training.

    No key is admitted on both sides; a key of held_out.txt is never admitted for training.
    """
    hexdigits = digest(key)
    if held_out:
        return reserved(hexdigits)
    return not reserved(hexdigits) and hexdigits not in listed()


def draw(
    sample: Callable[[np.random.Generator, int], Iterable[dict]],
    key: Callable[[dict], str],
    n: int,
    seed: int,
    *,
    held_out: bool,
) -> list[dict]:
    """Returns the first n admitted documents of a task's endless seeded stream.

    sample(rng, count) yields count documents, key names one. The batch size is fixed, so a
    smaller n gives a prefix of a larger one. Held-out documents are distinct; training documents
    may repeat. Raises ValueError when n or seed is negative, or when the held-out side runs dry.
    """
    if n < 0 or seed < 0:
        raise ValueError(f"n and seed must not be negative; they are n={n}, seed={seed}")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(held_out)])))
    docs: list[dict] = []
    seen: set[str] = set()
    dry = 0
    while len(docs) < n:
        before = len(docs)
        for doc in sample(rng, BATCH):
            name = key(doc)
            if name not in seen and admits(name, held_out=held_out):
                docs.append(doc)
                if held_out:
                    seen.add(name)
        dry = dry + 1 if len(docs) == before else 0
        if dry == DRY_BATCHES:
            raise ValueError(
                f"only {len(docs)} distinct held-out documents turned up, {n} were asked for; "
                f"ask for at most {len(docs)}"
            )
    return docs[:n]
