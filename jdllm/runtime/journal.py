"""Journal: finished work, one JSON object a line, appended as it comes and found again by its key.

A line counts once its end is written. What a killed process left of a line is cut off when the file
is opened; damage anywhere else is an error, because it cannot come from a kill.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
FINISHED = "finished.jsonl"  # in an output folder: every sample, as soon as it was finished


def digest(facts: Any) -> str:
    """A key for JSON-like facts: equal facts, equal key, whatever the order of their names."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def going_on(folder: Path | None) -> str:
    """How a run with a journal in `folder` goes on after an interrupt."""
    if folder is None:
        return "nothing was kept; with output=FOLDER the same command would go on"
    return f"the same command goes on; what is finished is in {folder}"


class Journal:
    """Records by key, in the order of the file. The caller sees to it that it writes alone."""

    def __init__(self, path: Path, writes: bool = True):
        """Opens or makes the file; ValueError, naming the line, where it is damaged.

        Where several processes keep the same journal, one `writes` it; the others follow in memory.
        """
        self.path, self.writes = path, writes
        self.records: dict[str, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        self._size = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._size].split(b"\n")[:-1], 1):
            record = self._read(line, number)
            self.records[record["key"]] = record
        if self._size < len(data) and writes:
            os.truncate(path, self._size)

    def _read(self, line: bytes, number: int) -> Record:
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

    def __getitem__(self, key: str) -> Record:
        return self.records[key]

    def append(self, records: Iterable[Record]) -> None:
        """Writes records, each with a `key` that is not there yet, and waits for the disk.

        OSError, with the file as it was before, where they do not fit.
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
    """Keys that tell repeats of a key apart, and how often each key came before."""
    seen: Counter[str] = Counter()
    numbers = []
    for key in keys:
        numbers.append(seen[key])
        seen[key] += 1
    return [digest([key, n]) for key, n in zip(keys, numbers, strict=True)], numbers
