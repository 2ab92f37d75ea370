"""Reading a task's documents from a JSON-lines file in the folder that data= names."""

import json
from collections.abc import Iterator
from pathlib import Path


def rows(folder: Path | None, file: Path, task: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for every non-empty line of folder/file; where is "path:line".

    Raises FileNotFoundError when no folder is given or the file is not there, ValueError for a
    line that is not a JSON object.
    """
    if folder is None:
        raise FileNotFoundError(
            f"task {task} reads its documents from {file} and no data folder is given; "
            f"pass data=FOLDER with FOLDER/{file} in it"
        )
    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(
            f"task {task} reads its documents from {path}, which is not there; "
            f"point data= at the folder that holds {file}"
        )
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: every line must be a JSON object; {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: every line must be a JSON object; this is {line.strip()!r}")
    return row
