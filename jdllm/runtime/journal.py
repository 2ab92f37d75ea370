"""Journal: finished work in a file, one JSON object per line, found again by its key.

A line counts once its line break is written. A half-written last line, left by a killed process, is
cut off when the file is opened. Damage anywhere else is an error, because no kill can cause it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
FINISHED = "finished.jsonl"  # in an output folder: every sample, as soon as it was finished


def digest(facts: Any) -> str:
    """Returns a key for JSON-like facts: equal facts give equal keys, in any order of names."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def going_on(folder: Path | None) -> str:
    """Returns a sentence that says how an interrupted run with a journal in `folder` goes on."""
    if folder is None:
        return "nothing was kept; with output=FOLDER the same command would go on"
    return f"the same command goes on; what is finished is in {folder}"


class Journal:
    """Entries by key, in the order of the file; the caller makes sure that nobody else writes."""

    def __init__(self, path: Path, writes: bool = True):
        """Opens the file, or makes it. Raises ValueError, naming the line, where it is damaged.

        Of several processes with the same journal one `writes`; the others keep it in memory.
        """
        self.path, self.writes = path, writes
        self.records: dict[str, Entry] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        self._size = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._size].split(b"\n")[:-1], 1):
            record = self._read(line, number)
            self.records[record["key"]] = record
        if self._size < len(data) and writes:
            os.truncate(path, self._size)

    def _read(self, line: bytes, number: int) -> Entry:
        try:
            record = json.loads(line)
            body = {name: value for name, value in record.items() if name != "sum"}
            good = record["sum"] == digest(body)[:8] and body["key"] not in self.records
        except (ValueError, KeyError, TypeError, AttributeError):
            good, body = False, {}
        if not good:
            raise ValueError(
                f"{self.path}: line {number} is damaged, or there twice; remove that line (it is "
                "made again) or the whole file, and start again"
            )
        return body

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __getitem__(self, key: str) -> Entry:
        return self.records[key]

    def append(self, records: Iterable[Entry]) -> None:
        """Appends entries, each with a `key` that is not there yet, and waits for the disk.

        Raises OSError where they do not fit; the file is then as it was before.
        """
        records = list(records)
        keys = [record["key"] for record in records]
        if len(set(keys)) < len(keys) or any(key in self for key in keys):
            raise ValueError(f"{self.path} has one of these records already: {', '.join(keys)}")
        lines = [
            json.dumps(record | {"sum": digest(record)[:8]}, ensure_ascii=False) + "\n"
            for record in records
        ]
        data = "".join(lines).encode() if self.writes else b""
        try:
            if self.writes:
                with self.path.open("ab") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, self._size)
            raise OSError(
                f"{self.path} cannot be written ({error.strerror or error}): make room and start "
                "again; what was finished before is kept"
            ) from error
        self._size += len(data)
        self.records |= {record["key"]: record for record in records}


def number_repeats(keys: Sequence[str]) -> tuple[list[str], list[int]]:
    """Returns keys that are unique even where `keys` repeat, and how often each came before."""
    seen: Counter[str] = Counter()
    numbers = []
    for key in keys:
        numbers.append(seen[key])
        seen[key] += 1
    return [digest([key, n]) for key, n in zip(keys, numbers, strict=True)], numbers
