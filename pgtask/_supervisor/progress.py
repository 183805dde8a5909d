"""What a burst shows a person while it runs, and says at its end.

Invariants: the line never scrolls and never wraps; whatever Python code of ours or of a worker writes to the
terminal erases it first, in the same write. Programs that a step starts know nothing of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections import deque
from typing import TextIO

from pgtask._worker.status import Totals

__all__ = ["Progress", "burst_summary", "ended", "share_terminal"]

ERASE_LINE = "\x1b[G\x1b[K"  # with a carriage return it would be written before the line that follows it
REDRAW_AFTER = 0.2
RATE_OVER = 5.0  # seconds that the shown rate looks back


class Progress:
    """The updating line on a terminal. `show` may be called as often as one likes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn_at = float("-inf")
        self._history: deque[tuple[float, Totals]] = deque()

    def show(self, totals: Totals, expected: int | None) -> None:
        now = time.monotonic()
        if now - self._drawn_at < REDRAW_AFTER:
            return
        self._drawn_at = now
        self._history.append((now, totals))
        while now - self._history[0][0] > RATE_OVER:
            self._history.popleft()
        since, before = self._history[0]
        line = progress_line(totals, before, max(now - since, 1e-9), expected)
        self._write(ERASE_LINE + line[: self._width() - 1])

    def erase(self) -> None:
        self._write(ERASE_LINE)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal has been closed
            self._stream.write(text)
            self._stream.flush()

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            return 80


class _Shared(io.TextIOWrapper):
    """A standard stream of the terminal that shows the progress."""

    _at_start = True

    def write(self, text: str) -> int:
        if text:
            super().write(ERASE_LINE + text if self._at_start else text)
            self._at_start = text.endswith("\n")
        return len(text)


def share_terminal() -> Progress:
    """The progress on stderr. From now on, lines that are written to the terminal, also after a fork, erase it."""
    progress = Progress(sys.stderr)
    sys.stdout, sys.stderr = _shared(sys.stdout), _shared(sys.stderr)
    return progress


def _shared(stream: TextIO) -> TextIO:
    if not stream.isatty():
        return stream
    through = isinstance(stream, io.TextIOWrapper) and stream.write_through  # as `python -u` asks for
    return _Shared(stream.buffer, stream.encoding, stream.errors, line_buffering=True, write_through=through)


def ended(totals: Totals) -> int:
    """How many tasks a burst need not care about any more."""
    return totals.done + totals.parked


def progress_line(totals: Totals, before: Totals, seconds: float, expected: int | None) -> str:
    """`12,000 of 100,000 tasks done  36,000 steps  24,390 steps/s  0 errors  at most 1:02 left`

    At most, since others may work on the same tasks.
    """
    of = f" of {expected:,}" if expected is not None and expected >= ended(totals) else ""
    parts = [
        f"{totals.done:,}{of} tasks done",
        *([f"{totals.parked:,} parked"] if totals.parked else []),
        f"{totals.steps:,} steps",
        f"{(totals.steps - before.steps) / seconds:,.0f} steps/s",
        _count(totals.errors, "error"),
    ]
    lately = ended(totals) - ended(before)
    if of and lately and expected is not None:
        left = round((expected - ended(totals)) * seconds / lately)
        parts.append(f"at most {left // 60}:{left % 60:02d} left")
    return "  ".join(parts)


def burst_summary(totals: Totals, seconds: float, *, finished: bool, style: str) -> str:
    """The last line of a burst: for people, or with style "json" for programs."""
    rate = round(totals.steps / seconds) if seconds else 0
    ending = "finished" if finished else "stopped"
    if style == "json":
        return json.dumps(
            {
                "event": f"burst.{ending}",
                "tasks": totals.done,
                "steps": totals.steps,
                "errors": totals.errors,
                "parked": totals.parked,
                "seconds": round(seconds, 3),
                "steps_per_second": rate,
            }
        )
    parked = f", {totals.parked:,} parked" if totals.parked else ""
    return (
        f"burst {ending}: {_count(totals.done, 'task')} done{parked}, {_count(totals.steps, 'step')}, "
        f"{_count(totals.errors, 'error')} in {seconds:.1f} s ({rate:,} steps/s)"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
