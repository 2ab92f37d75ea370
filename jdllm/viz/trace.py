"""One request as it was denoised: what every model call looked at, how sure it was, what it wrote.

A Record is arrays alone; a Run adds the text of its ids and where it came from, and is what a file
of JSON lines holds. docs/generate.md describes the format.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdllm.runtime import files
from jdllm.viz.pieces import KINDS, Piece

FORMAT = "jdllm trace 1"
LOOKS = {
    "columns": np.int32(-1),
    "candidates": np.int32(-1),
    "confidence": np.float32(np.nan),
    "entropy": np.float32(np.nan),
}
"""What a call keeps of every column it looked at, and what stands where it looked at fewer."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The record of one request, without the padding that its canvas had in a batch.

    Call k, from 1, turns `tokens[k - 1]` into `tokens[k]`; the other arrays describe it in row
    k - 1. A column that was not looked at has no confidence.
    """

    tokens: np.ndarray
    """int32 [calls + 1, T]: the canvas before every model call, and the final one."""
    columns: np.ndarray
    """int32 [calls, N]: columns whose logits were looked at; -1 where there were fewer."""
    candidates: np.ndarray
    """int32 [calls, N]: the token that each of them would take."""
    confidence: np.ndarray
    """float32 [calls, N]: its probability."""
    entropy: np.ndarray
    """float32 [calls, N]: of the column's distribution, in nats."""
    prompt_length: int
    mask_id: int

    def __post_init__(self):
        calls, looks = len(self.tokens) - 1, [self.candidates, self.confidence, self.entropy]
        if self.tokens.ndim != 2 or calls < 0 or len(self.columns) != calls:
            raise ValueError(
                f"{len(self.columns)} calls need {len(self.columns) + 1} canvases [calls + 1, T], "
                f"got {self.tokens.shape}"
            )
        if shapes := {x.shape for x in looks} - {self.columns.shape}:
            raise ValueError(f"columns are {self.columns.shape}, but there is {shapes.pop()}")

    @property
    def calls(self) -> int:
        """Model calls."""
        return len(self.columns)

    @functools.cached_property
    def writers(self) -> np.ndarray:
        """int32 [calls + 1, T]: the call that wrote what stands there; 0 if given, -1 for masks."""
        found = np.zeros_like(self.tokens)
        for call in range(1, self.calls + 1):
            changed = self.tokens[call] != self.tokens[call - 1]
            found[call] = np.where(changed, call, found[call - 1])
        return np.where(self.tokens == self.mask_id, -1, found)

    @functools.cached_property
    def commits(self) -> np.ndarray:
        """int32 [T]: the first call after which a column is no mask; 0 if given, -1 if never.

        A token may be edited later, or masked again: `writers` tells the call that did it.
        """
        open_CT = self.tokens == self.mask_id
        return np.where(open_CT.all(0), -1, open_CT.argmin(0)).astype(np.int32)

    @functools.cached_property
    def guesses(self) -> np.ndarray:
        """int32 [calls, T]: the candidate by column, -1 where it was not looked at."""
        return self._spread(self.candidates, -1)

    @functools.cached_property
    def sureness(self) -> np.ndarray:
        """float32 [calls + 1, T]: how sure the model is of what stands there after each call.

        A token has the confidence of the call that wrote it, a mask that of the last call which
        looked at it. NaN where nobody looked, and where a token was no candidate: given, or an end
        filled in behind the text.
        """
        seen, found = self._spread(self.confidence, np.nan), np.full(self.tokens.shape, np.nan)
        for call in range(1, self.calls + 1):
            looked, now = self.guesses[call - 1] >= 0, self.tokens[call]
            changed, masked = now != self.tokens[call - 1], now == self.mask_id
            own = np.where(masked | (now == self.guesses[call - 1]), seen[call - 1], np.nan)
            found[call] = np.where(changed | (masked & looked), own, found[call - 1])
        return found.astype(np.float32)

    def changes(self, call: int) -> np.ndarray:
        """The columns that a call (from 1) changed."""
        return np.flatnonzero(self.tokens[call] != self.tokens[call - 1])

    def _spread(self, values: np.ndarray, fill: float) -> np.ndarray:
        """[calls, N] by place to [calls, T] by column."""
        spread = np.full((self.calls, self.tokens.shape[1]), fill, values.dtype)
        rows, places = np.nonzero((self.columns >= 0) & (self.columns < spread.shape[1]))
        spread[rows, self.columns[rows, places]] = values[rows, places]
        return spread


def cut(
    arrays: Mapping[str, np.ndarray], calls: int, prompt_length: int, length: int, mask_id: int
) -> Record:
    """A request's record from one row of what the loop kept for a batch.

    `arrays` are the row's `tokens`, `columns`, `candidates`, `confidence` and `entropy` as Record
    describes them, but for room for more calls and for padding behind the `length` columns of its
    canvas; columns in the padding count as not looked at.
    """
    looks = {name: np.asarray(arrays[name])[:calls] for name in LOOKS}
    looks["columns"] = np.where(looks["columns"] < length, looks["columns"], -1)
    tokens = np.asarray(arrays["tokens"])[: calls + 1, :length]
    return Record(tokens, **looks, prompt_length=prompt_length, mask_id=mask_id)


def join(stretches: Sequence[Record]) -> Record:
    """One record of consecutive stretches of calls of one request, such as its blocks."""
    width = max(stretch.columns.shape[1] for stretch in stretches)

    def stack(name: str, fill: np.generic) -> np.ndarray:
        arrays = [getattr(stretch, name) for stretch in stretches]
        rooms = [((0, 0), (0, width - x.shape[1])) for x in arrays]
        padded = [np.pad(x, r, constant_values=fill) for x, r in zip(arrays, rooms, strict=True)]
        return np.concatenate(padded)

    canvases = [stretches[0].tokens[:1], *(stretch.tokens[1:] for stretch in stretches)]
    looks = {name: stack(name, fill) for name, fill in LOOKS.items()}
    return dataclasses.replace(stretches[0], tokens=np.concatenate(canvases), **looks)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished request: its record, the text of its ids, and where it came from."""

    record: Record
    pieces: Mapping[int, Piece]
    about: Mapping[str, Any]
    """What the file's first line says: prompt, completion, model, decode, versions, ..."""

    @property
    def used(self) -> dict[int, Piece]:
        """The pieces of the ids that occur."""
        ids = np.union1d(self.record.tokens, self.record.guesses)
        return {i: self.pieces[i] for i in ids.tolist() if i >= 0}


def write(path: Path, run: Run) -> None:
    """Writes JSON lines, whole or not at all: what the run was, then a line a model call."""
    lines = [make_header(run), *(describe(run.record, i + 1) for i in range(run.record.calls))]
    files.write_json_lines(path, lines, strict=True)


def make_header(run: Run) -> dict[str, Any]:
    """The first line: what the run was, the canvas it started from, and how its ids read."""
    record = run.record
    return {
        "format": FORMAT,
        **run.about,
        "prompt_length": record.prompt_length,
        "mask_id": record.mask_id,
        "calls": record.calls,
        "tokens": record.tokens[0].tolist(),
        "commit": record.commits.tolist(),
        "pieces": {i: [piece.text, piece.kind] for i, piece in run.used.items()},
    }


def describe(record: Record, call: int) -> dict[str, Any]:
    """A call's line: parallel lists over the columns it looked at, and what it changed."""
    row = call - 1
    looked = record.columns[row] >= 0
    columns, changed = record.columns[row][looked], record.changes(call)
    return {
        "call": call,
        "columns": columns.tolist(),
        "candidates": record.candidates[row][looked].tolist(),
        "confidence": _floats(record.confidence[row][looked]),
        "entropy": _floats(record.entropy[row][looked]),
        "commit": record.commits[columns].tolist(),
        "changes": np.stack([changed, record.tokens[call][changed]], axis=1).tolist(),
    }


def read(path: Path) -> Run:
    """Reads what `write` wrote; ValueError, with the line, where it is something else."""
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    header = _parse(path, 1, lines[0], _header)
    calls = [_parse(path, i, line, json.loads) for i, line in enumerate(lines[1:], start=2)]
    if len(calls) != header["calls"]:
        raise ValueError(f"{path} is cut off: {len(calls)} of its {header['calls']} calls are left")
    stretches = [_parse(path, 1, header, _start)]
    for i, call in enumerate(calls, start=2):
        stretches.append(_parse(path, i, call, functools.partial(_stretch, stretches[-1])))
    own = {"format", "prompt_length", "mask_id", "calls", "tokens", "commit", "pieces"}
    return Run(
        join(stretches),
        {int(i): Piece(*piece) for i, piece in header["pieces"].items()},
        {name: value for name, value in header.items() if name not in own},
    )


def _parse[X, Y](path: Path, number: int, value: X, reader: Callable[[X], Y]) -> Y:
    try:
        return reader(value)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}, line {number} is no {FORMAT}: {error}") from None


def _header(line: str) -> dict[str, Any]:
    header = json.loads(line)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError("its first line names another format, or none")
    for text, kind in header["pieces"].values():
        if kind not in KINDS or not isinstance(text, str):
            raise ValueError(f"{[text, kind]} is no piece")
    return {name: header[name] for name in ("prompt_length", "mask_id", "calls", "tokens")} | header


def _start(header: dict[str, Any]) -> Record:
    """The record before any call."""
    nothing = {name: np.zeros((0, 0), fill.dtype) for name, fill in LOOKS.items()}
    tokens = np.array([header["tokens"]], np.int32)
    return Record(
        tokens, **nothing, prompt_length=header["prompt_length"], mask_id=header["mask_id"]
    )


def _stretch(before: Record, call: dict[str, Any]) -> Record:
    """The record of a single call, which follows `before`."""
    canvas = before.tokens[-1].copy()
    for column, token in call["changes"]:
        canvas[column] = token
    tokens = np.stack([before.tokens[-1], canvas])
    looks = {name: np.array([call[name]], fill.dtype) for name, fill in LOOKS.items()}
    return dataclasses.replace(before, tokens=tokens, **looks)  # a null becomes NaN


def _floats(values: np.ndarray) -> list[float | None]:
    """The shortest decimals that read back as the same float32; None for what is not finite."""
    return [float(str(x)) if np.isfinite(x) else None for x in values.astype(np.float32)]
