"""Reading documents from JSON-lines files, plain or compressed, in the folder that data= names."""

import functools
import gzip
import json
from collections.abc import Iterator
from pathlib import Path


def find(folder: Path, name: str | Path) -> Path | None:
    """Returns the file of a name in a folder, as it is or with .gz."""
    paths = (Path(folder) / name, Path(folder) / f"{name}.gz")
    return next((path for path in paths if path.is_file()), None)


def read(path: Path) -> list[tuple[str, dict]]:
    """Yields (where, row) for every non-empty line of a file; where is "path:line".

    Raises ValueError for a line that is not a JSON object.
    """
    facts = path.stat()
    return _read(path, facts.st_mtime_ns, facts.st_size)


@functools.lru_cache(maxsize=8)  # 57 subjects of MMLU share one file
def _read(path: Path, *_changes: int) -> list[tuple[str, dict]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    numbered = enumerate(text.split("\n"), start=1)
    return [
        (f"{path}:{number}", _parse(line, f"{path}:{number}"))
        for number, line in numbered
        if line.strip()
    ]


def rows(folder: Path | None, file: Path, task: str) -> Iterator[tuple[str, dict]]:
    """Returns the rows of folder/file, for a task whose documents are nowhere else.

    Raises FileNotFoundError when no folder is given or the file is not there, ValueError for a
    line that is not a JSON object.
    """
    if folder is None:
        raise FileNotFoundError(
            f"task {task} reads its documents from {file} and no data folder is given; "
            f"pass data=FOLDER with FOLDER/{file} in it"
        )
    path = find(folder, file)
    if path is None:
        raise FileNotFoundError(
            f"task {task} reads its documents from {Path(folder) / file}, which is not there; "
            f"point data= at the folder that holds {file}"
        )
    yield from read(path)


def _parse(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: every line must be a JSON object; {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: every line must be a JSON object; this is {line.strip()!r}")
    return row
