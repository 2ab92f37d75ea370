"""The record of a request: what every model call saw, how sure it was, and what it wrote.

A Record holds only arrays. A Run adds the text of the ids and where the request came from. A file
of JSON lines holds one Run; docs/generate.md describes the format.
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
"""What a call records per column in view, and the fill value where fewer columns are in view."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The record of one request, without the padding that its canvas had in a batch.

    Call k, from 1, turns `tokens[k - 1]` into `tokens[k]`; index k - 1 of the other arrays
    describes it. A column that was not in view has no confidence.
    """

    tokens: np.ndarray
    """int32 [calls + 1, T]: the canvas before every model call, and the final one."""
    columns: np.ndarray
    """int32 [calls, N]: the columns in view; -1 where there were fewer."""
    candidates: np.ndarray
    """int32 [calls, N]: the token that each of them would take."""
    confidence: np.ndarray
    """float32 [calls, N]: the probability of that token."""
    entropy: np.ndarray
    """float32 [calls, N]: the entropy of the column's distribution, in nats."""
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
        """Returns the number of model calls."""
        return len(self.columns)

    @functools.cached_property
    def writers(self) -> np.ndarray:
        """Returns int32 [calls + 1, T]: the call that wrote each token; 0: given, -1: a mask."""
        found = np.zeros_like(self.tokens)
        for call in range(1, self.calls + 1):
            changed = self.tokens[call] != self.tokens[call - 1]
            found[call] = np.where(changed, call, found[call - 1])
        return np.where(self.tokens == self.mask_id, -1, found)

    @functools.cached_property
    def commits(self) -> np.ndarray:
        """Returns int32 [T]: the first call that filled each column; 0 if given, -1 if none did.

        A token may be edited later, or masked again: `writers` has the call that did it.
        """
        open_CT = self.tokens == self.mask_id
        return np.where(open_CT.all(0), -1, open_CT.argmin(0)).astype(np.int32)

    @functools.cached_property
    def guesses(self) -> np.ndarray:
        """Returns int32 [calls, T]: the candidate per column, -1 where it was not in view."""
        return self._spread(self.candidates, -1)

    @functools.cached_property
    def sureness(self) -> np.ndarray:
        """Returns float32 [calls + 1, T]: how sure the model is of each column after each call.

        A token has the confidence of the call that wrote it, a mask that of the last call which
        had it in view. It is NaN where no call had, and where the token was not a candidate:
        tokens of the prompt, and ends that fill the rest after the text.
        """
        seen, found = self._spread(self.confidence, np.nan), np.full(self.tokens.shape, np.nan)
        for call in range(1, self.calls + 1):
            looked, now = self.guesses[call - 1] >= 0, self.tokens[call]
            changed, masked = now != self.tokens[call - 1], now == self.mask_id
            own = np.where(masked | (now == self.guesses[call - 1]), seen[call - 1], np.nan)
            found[call] = np.where(changed | (masked & looked), own, found[call - 1])
        return found.astype(np.float32)

    def changes(self, call: int) -> np.ndarray:
        """Returns the columns that a call (from 1) changed."""
        return np.flatnonzero(self.tokens[call] != self.tokens[call - 1])

    def _spread(self, values: np.ndarray, fill: float) -> np.ndarray:
        """Returns values [calls, T] per column from values [calls, N] per place in view."""
        spread = np.full((self.calls, self.tokens.shape[1]), fill, values.dtype)
        rows, places = np.nonzero((self.columns >= 0) & (self.columns < spread.shape[1]))
        spread[rows, self.columns[rows, places]] = values[rows, places]
        return spread


def cut(
    arrays: Mapping[str, np.ndarray], calls: int, prompt_length: int, length: int, mask_id: int
) -> Record:
    """Returns a request's record from its row of what the loop recorded for a batch.

    `arrays` are the row's `tokens`, `columns`, `candidates`, `confidence` and `entropy` as in
    Record, but with room for more calls, and with padding after the `length` columns of its canvas.
    Columns in the padding count as not in view.
    """
    looks = {name: np.asarray(arrays[name])[:calls] for name in LOOKS}
    looks["columns"] = np.where(looks["columns"] < length, looks["columns"], -1)
    tokens = np.asarray(arrays["tokens"])[: calls + 1, :length]
    return Record(tokens, **looks, prompt_length=prompt_length, mask_id=mask_id)


def join(stretches: Sequence[Record]) -> Record:
    """Returns one record made of consecutive parts of a request's record, such as its blocks."""
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
    """Facts for the file's first line: prompt, completion, model, decode, versions, ..."""

    @property
    def used(self) -> dict[int, Piece]:
        """Returns the pieces of the ids that occur."""
        ids = np.union1d(self.record.tokens, self.record.guesses)
        return {i: self.pieces[i] for i in ids.tolist() if i >= 0}


def write(path: Path, run: Run) -> None:
    """Writes a file of JSON lines, whole or not at all: facts, then one line per model call."""
    lines = [make_header(run), *(describe(run.record, i + 1) for i in range(run.record.calls))]
    files.write_json_lines(path, lines, strict=True)


def make_header(run: Run) -> dict[str, Any]:
    """Returns the first line: facts about the run, its first canvas, and the text of its ids."""
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
    """Returns a call's line: parallel lists over the columns in view, and what it changed."""
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
    """Returns the Run that `write` wrote. Raises ValueError, naming the line, for other files."""
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
    """Returns the record before any call."""
    nothing = {name: np.zeros((0, 0), fill.dtype) for name, fill in LOOKS.items()}
    tokens = np.array([header["tokens"]], np.int32)
    return Record(
        tokens, **nothing, prompt_length=header["prompt_length"], mask_id=header["mask_id"]
    )


def _stretch(before: Record, call: dict[str, Any]) -> Record:
    """Returns the record of a single call, which follows `before`."""
    canvas = before.tokens[-1].copy()
    for column, token in call["changes"]:
        canvas[column] = token
    tokens = np.stack([before.tokens[-1], canvas])
    looks = {name: np.array([call[name]], fill.dtype) for name, fill in LOOKS.items()}
    return dataclasses.replace(before, tokens=tokens, **looks)  # a null becomes NaN


def _floats(values: np.ndarray) -> list[float | None]:
    """Returns the shortest decimals that give the same float32 again; None where not finite."""
    return [float(str(x)) if np.isfinite(x) else None for x in values.astype(np.float32)]
