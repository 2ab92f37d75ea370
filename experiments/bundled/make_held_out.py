"""Writes jdllm/tasks/puzzles/held_out.txt: hashes of published test items, never trained on.

    python experiments/bundled/make_held_out.py data=FOLDER

FOLDER holds sudoku4x4/d1_test.jsonl, countdown/d1_cd3_test.jsonl and dream_cd4_test.jsonl.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from jdllm.tasks.puzzles import countdown, countdown4, held_out, sudoku

OUTPUT = Path(held_out.__file__).with_name("held_out.txt")

HEADER = """\
# Items of d1's sudoku 4x4 and countdown test files and of Dream's countdown with four numbers; the
# training generators drop them.
# A line is the first 16 hex digits of the sha256 of an item's key: a sudoku's puzzle string, or a
# countdown's numbers from small to large and its target, as in "1,2,3=6".
# Written by experiments/bundled/make_held_out.py.
"""


def render(keys: Iterable[str]) -> str:
    """The file's text for a set of item keys: the header, then one sorted digest a line."""
    digests = sorted({held_out.digest(key) for key in keys})
    return HEADER + "".join(f"{line}\n" for line in digests)


def main(words: list[str]) -> None:
    """Read the folder that data= names and rewrite the list beside held_out.py."""
    options = dict(word.split("=", 1) for word in words if "=" in word)
    if len(words) != 1 or set(options) != {"data"}:
        raise SystemExit("usage: python experiments/bundled/make_held_out.py data=FOLDER")
    folder = Path(options["data"])
    keys = [sudoku.key(doc) for doc in sudoku.read(folder)]
    keys += [countdown.key(doc) for doc in countdown.read(folder)]
    keys += [countdown.key(doc) for doc in countdown4.read(folder)]
    OUTPUT.write_text(render(keys), encoding="ascii", newline="\n")
    print(f"wrote {OUTPUT}: {len(set(keys))} digests of {len(keys)} items")


if __name__ == "__main__":
    main(sys.argv[1:])
