"""Shows the canvas in the terminal while it denoises, coloured by confidence, call by call.

Where the output is not a terminal, every call becomes a line of plain text.
"""

import dataclasses
import functools
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from rich.cells import cell_len, chop_cells
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.style import Style
from rich.text import Text

from jdllm.viz.pieces import Kind, Piece, spell, visible
from jdllm.viz.trace import Record, join

SIGNS = {"mask": "·", "end": "∎"}
POLL = 0.1  # seconds between checks for Ctrl-C
LINE_END, BREAK = "\n", "⏎"
# Unsure to sure: vermilion, dark gold, bluish green. They keep apart for colour-blind eyes and are
# readable on black and on white.
RAMP = np.array([(213, 94, 0), (184, 134, 11), (0, 158, 115)], float)


def make_console() -> Console:
    """Returns a console on standard output, which acts as a terminal only where it is one."""
    return Console(force_terminal=sys.stdout.isatty(), highlight=False)


def colour(confidence: float) -> Style:
    """Returns the style of a confidence in [0, 1]; NaN gets the terminal's own."""
    return Style() if np.isnan(confidence) else _shade(round(100 * float(confidence)))


@functools.cache
def _shade(percent: int) -> Style:
    red, green, blue = (np.interp(percent, [0, 50, 100], channel) for channel in RAMP.T)
    return Style(color=f"rgb({red:.0f},{green:.0f},{blue:.0f})")


@functools.cache
def _weight(bold: bool, dim: bool) -> Style:
    return Style(bold=bold, dim=dim)


def first_column(record: Record) -> int:
    """Returns the first column to show: after the prompt, or the first mask inside it."""
    masks = np.flatnonzero(record.tokens[0] == record.mask_id)
    return min(record.prompt_length, *masks[:1].tolist())


class Cell(NamedTuple):
    """One column as it is drawn."""

    text: str
    style: Style
    kind: Kind
    fresh: bool
    """Whether the latest call wrote it."""


def cells(record: Record, call: int, pieces: Mapping[int, Piece]) -> list[Cell]:
    """Returns the generated columns after `call` calls; masks and ends are one sign each."""
    start = first_column(record)
    row = [pieces[i] for i in record.tokens[call][start:].tolist()]
    fresh = record.writers[call][start:] == max(call, 1)
    found = []
    for piece, word, sure, new in zip(
        row, spell(row), record.sureness[call][start:], fresh.tolist(), strict=True
    ):
        text = SIGNS.get(piece.kind, visible(word).expandtabs(4))
        style = colour(sure) + _weight(new, dim=piece.kind not in ("text", "bytes"))
        found.append(Cell(text, style, piece.kind, new))
    return found


def completed(record: Record, pieces: Mapping[int, Piece]) -> list[Cell]:
    """Returns the final cells up to the first end, none of them fresh."""
    row = cells(record, record.calls, pieces)
    text = itertools.takewhile(lambda cell: cell.kind != "end", row)
    return [cell._replace(style=cell.style + _weight(False, dim=False)) for cell in text]


def plain(record: Record, call: int, pieces: Mapping[int, Piece]) -> str:
    """Returns the canvas after a call in one line of text."""
    text = "".join(cell.text for cell in cells(record, call, pieces))
    return f"call {call:3}  {text.replace(LINE_END, BREAK)}"


def status(record: Record, call: int) -> Text:
    """Returns the line above the canvas: the progress, and what the colours mean."""
    masked = record.tokens[call][first_column(record) :] == record.mask_id
    done = f"{np.sum(~masked)} of {len(masked)} columns"
    text = Text(f"call {call}, {done}, Ctrl-C skips, confidence", "dim")
    for step in np.linspace(0, 1, 5):
        text.append(f" {step:.2g}", colour(step))
    text.append(f", {SIGNS['mask']} mask, {SIGNS['end']} end")
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def layout(row: Iterable[Cell], width: int) -> tuple[list[Text], int]:
    """Returns lines of at most `width` terminal columns, and the line of the last fresh cell.

    A token is never split between lines, so that masks and words break alike, and the text around
    a mask keeps its place when the mask becomes a word.
    """
    lines, used, focus = [Text()], 0, 0
    for cell in row:
        for i, part in enumerate(cell.text.split(LINE_END)):
            if i:
                lines.append(Text())
                used = 0
            for chunk in chop_cells(part, width):
                if used + cell_len(chunk) > width:
                    chunk = chunk.lstrip(" ")
                    lines += [Text()] if chunk else []
                    used = 0 if chunk else used
                lines[-1].append(chunk, cell.style)
                used += cell_len(chunk)
        if cell.fresh:
            focus = len(lines) - 1
    return lines, focus


def crop(lines: Sequence[Text], focus: int, height: int) -> Text:
    """Returns at most `height` of the lines, with the line `focus` among them."""
    first = max(min(focus - height // 2, len(lines) - height), 0)
    return Text(LINE_END).join(lines[first : first + height])


@dataclasses.dataclass
class Player:
    """Keeps a request's record and shows its calls, `fps` per second, as parts of it arrive.

    Use it as a context manager, and call it with every part. A call that is overdue is not drawn.
    The first Ctrl-C after the first part ends the animation but not the run; the next one is an
    ordinary KeyboardInterrupt.
    """

    pieces: Mapping[int, Piece]
    fps: float = 10
    shown: bool = True
    console: Console = dataclasses.field(default_factory=make_console)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self):
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        self.animated = self.shown and terminal
        self._stretches: list[Record] = []
        self._skipped = False
        self._due = 0.0
        self._before: Any = None
        self._live = Live(console=self.console, auto_refresh=False, transient=True)

    @property
    def record(self) -> Record:
        """Returns the record of all calls so far."""
        return join(self._stretches)

    def __enter__(self) -> Self:
        if self.animated:
            self._live.start()
            self._live.update(Text("waiting for the first calls", "dim"), refresh=True)
            if threading.current_thread() is threading.main_thread():
                self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        self._live.stop()

    def __call__(self, stretch: Record) -> None:
        """Shows the calls of the next part of the record, one after the other."""
        self._stretches.append(stretch)
        if not self.shown or self._skipped:
            return
        record = self.record
        start = record.calls - stretch.calls + (len(self._stretches) > 1)
        calls = range(start, record.calls + 1)
        if not self.animated:
            for call in calls:
                print(plain(record, call, self.pieces), file=self.console.file, flush=True)
            return
        self._play(record, calls)

    def finish(self, completion: str) -> None:
        """Prints the completion, in colour where it was animated."""
        if self.animated:
            lines, _ = layout(completed(self.record, self.pieces), self.console.width)
            self.console.print(Text(LINE_END).join(lines))
        else:
            print(LINE_END * self.shown + completion, file=self.console.file)

    def frame(self, record: Record, call: int) -> RenderableType:
        """Returns what the terminal shows after `call` calls."""
        lines, focus = layout(cells(record, call, self.pieces), self.console.width)
        view = crop(lines, focus, max(self.console.height - 2, 1))
        return Group(status(record, call), view)

    def _interrupted(self, *_) -> None:
        """Ends the animation at the first Ctrl-C, and the run at the second."""
        if self._skipped or not self._stretches:
            raise KeyboardInterrupt
        self._skipped = True
        self._live.update(Text("the run goes on; Ctrl-C again ends it", "dim"), refresh=True)

    def _play(self, record: Record, calls: range) -> None:
        start = max(self._due, self.clock())
        self._due = start + len(calls) / self.fps
        for i, call in enumerate(calls):
            due, last = start + i / self.fps, call == calls[-1]
            if self.clock() > due + 1 / self.fps and not last:
                continue
            while (left := due - self.clock()) > 0 and not self._skipped:
                self.sleep(min(left, POLL))
            if self._skipped:
                return
            self._live.update(self.frame(record, call), refresh=True)
