"""The canvas in the terminal while it denoises: coloured by confidence, redrawn a call at a time.

Where the output is no terminal, every call becomes a line of plain text.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.style import Style
from rich.text import Text

from jdllm.pieces import Piece, spell, visible
from jdllm.trace import Trace, join

MASK, END, BREAK = "·", "∎", "⏎"
# Unsure to sure: vermilion, dark gold, bluish green. They keep apart for colour-blind eyes and are
# readable on black and on white.
RAMP = np.array([(213, 94, 0), (184, 134, 11), (0, 158, 115)], float)


def make_console() -> Console:
    """A console on standard output, a terminal only where that is one."""
    return Console(force_terminal=sys.stdout.isatty(), highlight=False)


def colour(confidence: float) -> Style:
    """The style of a confidence in [0, 1]; the terminal's own for NaN."""
    if np.isnan(confidence):
        return Style()
    red, green, blue = (np.interp(confidence, [0, 0.5, 1], channel) for channel in RAMP.T)
    return Style(color=f"rgb({red:.0f},{green:.0f},{blue:.0f})")


def first_column(trace: Trace) -> int:
    """Where the view begins: behind the prompt, or at the first mask within it."""
    masks = np.flatnonzero(trace.tokens[0] == trace.mask_id)
    return min(trace.prompt_length, *masks[:1].tolist())


def canvas(trace: Trace, call: int, pieces: Mapping[int, Piece], marks: bool = True) -> Text:
    """The generated columns after `call` calls; what that call wrote is bold.

    With `marks` masks and ends are drawn, one sign each; without, the text stops at its first end.
    """
    start, text = first_column(trace), Text()
    row = [pieces[i] for i in trace.tokens[call][start:].tolist()]
    fresh = trace.writers[call][start:] == max(call, 1)
    for piece, word, sure, new in zip(
        row, spell(row), trace.sureness[call][start:], fresh, strict=True
    ):
        style = colour(sure)
        if piece.kind in ("mask", "end"):
            if not marks and piece.kind == "end":
                break
            word, style = MASK if piece.kind == "mask" else END, style + Style(dim=True)
        elif piece.kind == "special":
            style += Style(dim=True)
        text.append(visible(word).expandtabs(4), style + Style(bold=True) if new else style)
    return text


def plain(trace: Trace, call: int, pieces: Mapping[int, Piece]) -> str:
    """A call in one line."""
    text = canvas(trace, call, pieces).plain.replace("\n", BREAK)
    return f"call {call:3}  {text}"


def status(trace: Trace, call: int, fps: float) -> Text:
    """The line below the canvas: how far it is, and what the colours mean."""
    start = first_column(trace)
    masked = trace.tokens[call][start:] == trace.mask_id
    text = Text(f"call {call}, {np.sum(~masked)} of {len(masked)} columns, confidence ")
    for step in np.linspace(0, 1, 5):
        text.append(f"{step:.2g} ", colour(step))
    text.append(f" {MASK} mask {END} end  {fps:g} calls/s, Ctrl-C skips")
    text.stylize(Style(dim=True))
    text.truncate(10_000)
    return text


def around(text: Text, console: Console, height: int, column: int) -> Text:
    """The lines of a wrapped canvas that fit into `height`, the character `column` among them."""
    lines = text.wrap(console, console.width)
    if len(lines) <= height:
        return Text("\n").join(lines)
    ends = np.cumsum([len(line) for line in lines])
    row = int(np.searchsorted(ends, column))
    first = min(max(row - height // 2, 0), len(lines) - height)
    return Text("\n").join(lines[first : first + height])


@dataclasses.dataclass
class Player:
    """Shows a request's calls as stretches of them come in, `fps` calls a second and never slower.

    Use it as a context and call it with every stretch. A call whose time has passed before it
    could be drawn is left out. Ctrl-C while it plays ends the animation, not the run.
    """

    pieces: Mapping[int, Piece]
    fps: float = 10
    console: Console = dataclasses.field(default_factory=make_console)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self):
        self.seen: list[Trace] = []
        self.skipped = False
        self.animated = self.console.is_terminal and not self.console.is_dumb_terminal
        self._due = 0.0
        self._live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self.animated:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def __call__(self, stretch: Trace) -> None:
        """Shows the calls of a stretch, one after the other."""
        first = sum(part.calls for part in self.seen)
        self.seen.append(stretch)
        if self.skipped:
            return
        trace = join(self.seen)
        calls = range(first + bool(first), trace.calls + 1)
        if not self.animated:
            for call in calls:
                print(plain(trace, call, self.pieces), file=self.console.file)
            return
        try:
            self._play(trace, calls)
        except KeyboardInterrupt:
            self.skipped = True
            self._live.update("", refresh=True)

    def _play(self, trace: Trace, calls: range) -> None:
        start = max(self._due, self.clock())
        self._due = start + len(calls) / self.fps
        for i, call in enumerate(calls):
            now = self.clock()
            if now > start + (i + 1) / self.fps and call != calls[-1]:
                continue
            self.sleep(max(0.0, start + i / self.fps - now))
            self._live.update(self.frame(trace, call), refresh=True)

    def frame(self, trace: Trace, call: int) -> RenderableType:
        """What the terminal shows after `call` calls."""
        text = canvas(trace, call, self.pieces)
        bold = [span.start for span in text.spans if Style.parse(str(span.style)).bold]
        room = max(self.console.height - 2, 1)
        view = around(text, self.console, room, bold[-1] if bold else 0)
        return Group(view, status(trace, call, self.fps))

    def finish(self) -> None:
        """Prints the completion, coloured; where there is no terminal there is nothing to add."""
        if self.animated and self.seen:
            trace = join(self.seen)
            self.console.print(canvas(trace, trace.calls, self.pieces, marks=False))
