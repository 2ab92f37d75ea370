"""One request as it was denoised: what every model call looked at, how sure it was, what it wrote.

A Trace is arrays alone; a Run adds the text of its ids and where it came from, and is what a file
of JSON lines holds. docs/generate.md describes the format.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdllm import files
from jdllm.pieces import KINDS, Piece

FORMAT = "jdllm trace 1"


@dataclasses.dataclass(frozen=True)
class Trace:
    """The record of one request, without the padding that its canvas had in a batch.

    Call k, from 1, turns `tokens[k - 1]` into `tokens[k]`; the other arrays describe it in row
    k - 1. A column that was not looked at has no confidence.
    """

    tokens: np.ndarray
    """int32 [calls + 1, T]: the canvas before every model call, and the final one."""
    columns: np.ndarray
    """int32 [calls, N]: columns whose logits were looked at; -1 where there were fewer."""
    ids: np.ndarray
    """int32 [calls, N]: the best token of those columns."""
    confidence: np.ndarray
    """float32 [calls, N]: its probability."""
    entropy: np.ndarray
    """float32 [calls, N]: of the column's distribution, in nats."""
    prompt_length: int
    mask_id: int

    def __post_init__(self):
        calls, looks = len(self.tokens) - 1, [self.ids, self.confidence, self.entropy]
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
    def best(self) -> np.ndarray:
        """int32 [calls, T]: the best token by column, -1 where it was not looked at."""
        return self._spread(self.ids, -1)

    @functools.cached_property
    def sureness(self) -> np.ndarray:
        """float32 [calls + 1, T]: how sure the model is of what stands there after each call.

        A token has the confidence of the call that wrote it, a mask that of the last call which
        looked at it. NaN where nobody looked, and where a token is not the model's best: given, an
        end filled in behind the text, or a draw at temperature > 0.
        """
        seen, found = self._spread(self.confidence, np.nan), np.full(self.tokens.shape, np.nan)
        for call in range(1, self.calls + 1):
            looked, now = self.best[call - 1] >= 0, self.tokens[call]
            changed, masked = now != self.tokens[call - 1], now == self.mask_id
            own = np.where(masked | (now == self.best[call - 1]), seen[call - 1], np.nan)
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


def join(stretches: Sequence[Trace]) -> Trace:
    """One trace of consecutive stretches of calls of one request, such as its blocks."""
    width = max(stretch.columns.shape[1] for stretch in stretches)

    def stack(name: str, fill: float) -> np.ndarray:
        arrays = [getattr(stretch, name) for stretch in stretches]
        room = [((0, 0), (0, width - x.shape[1])) for x in arrays]
        return np.concatenate(
            [np.pad(x, r, constant_values=fill) for x, r in zip(arrays, room, strict=True)]
        )

    canvases = [stretches[0].tokens[:1], *(stretch.tokens[1:] for stretch in stretches)]
    return Trace(
        np.concatenate(canvases),
        stack("columns", -1),
        stack("ids", -1),
        stack("confidence", np.nan),
        stack("entropy", np.nan),
        stretches[0].prompt_length,
        stretches[0].mask_id,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished request: its record, the text of its ids, and where it came from."""

    trace: Trace
    pieces: Mapping[int, Piece]
    about: Mapping[str, Any]
    """What the file's first line says: prompt, completion, model, decode, versions, ..."""

    @property
    def used(self) -> dict[int, Piece]:
        """The pieces of the ids that occur."""
        ids = np.union1d(self.trace.tokens, self.trace.best)
        return {i: self.pieces[i] for i in ids.tolist() if i >= 0}


def write(path: Path, run: Run) -> None:
    """Writes JSON lines, whole or not at all: what the run was, then a line a model call."""
    trace = run.trace
    header = {
        "format": FORMAT,
        **run.about,
        "prompt_length": trace.prompt_length,
        "mask_id": trace.mask_id,
        "calls": trace.calls,
        "tokens": trace.tokens[0].tolist(),
        "commit": trace.commits.tolist(),
        "pieces": {i: [piece.text, piece.kind] for i, piece in run.used.items()},
    }
    with files.atomic_file(path) as file:
        for line in [header, *map(functools.partial(describe, trace), range(1, trace.calls + 1))]:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def describe(trace: Trace, call: int) -> dict[str, Any]:
    """A call's line: parallel lists over the columns it looked at, and what it changed."""
    row = call - 1
    looked = trace.columns[row] >= 0
    columns, changed = trace.columns[row][looked], trace.changes(call)
    return {
        "call": call,
        "columns": columns.tolist(),
        "ids": trace.ids[row][looked].tolist(),
        "confidence": _floats(trace.confidence[row][looked]),
        "entropy": _floats(trace.entropy[row][looked]),
        "commit": trace.commits[columns].tolist(),
        "changes": np.stack([changed, trace.tokens[call][changed]], axis=1).tolist(),
    }


def read(path: Path) -> Run:
    """Reads what `write` wrote; ValueError, with the line, where it is something else."""
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    header = _parse(path, 1, lines[0], _header)
    calls = [_parse(path, i, line, json.loads) for i, line in enumerate(lines[1:], start=2)]
    if len(calls) != header["calls"]:
        raise ValueError(f"{path} is cut off: {len(calls)} of its {header['calls']} calls are left")
    canvases = [np.array(header["tokens"], np.int32)]
    stretches = []
    for i, call in enumerate(calls, start=2):
        stretch = _parse(path, i, call, functools.partial(_stretch, header, canvases[-1]))
        canvases.append(stretch.tokens[1])
        stretches.append(stretch)
    own = {"format", "prompt_length", "mask_id", "calls", "tokens", "commit", "pieces"}
    return Run(
        join([_empty(header, canvases[0]), *stretches]),
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


def _stretch(header: dict[str, Any], before: np.ndarray, call: dict[str, Any]) -> Trace:
    """The trace of a single call."""
    after = before.copy()
    for column, token in call["changes"]:
        after[column] = token
    return Trace(
        np.stack([before, after]),
        np.array([call["columns"]], np.int32),
        np.array([call["ids"]], np.int32),
        np.array([call["confidence"]], np.float32),  # null becomes NaN
        np.array([call["entropy"]], np.float32),
        header["prompt_length"],
        header["mask_id"],
    )


def _empty(header: dict[str, Any], canvas: np.ndarray) -> Trace:
    ids, floats = np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32)
    return Trace(canvas[None], ids, ids, floats, floats, header["prompt_length"], header["mask_id"])


def _floats(values: np.ndarray) -> list[float | None]:
    """The shortest decimals that read back as the same float32; None for NaN."""
    return [None if np.isnan(x) else float(str(x)) for x in values.astype(np.float32)]
