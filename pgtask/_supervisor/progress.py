"""What a burst shows a person while it runs, and says at its end.

Invariants: the line never scrolls and never wraps; whatever Python code of ours or of a worker writes to the
terminal erases it first, in the same write, and a line that somebody has begun there stays. Programs that a step
starts know nothing of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, TextIO

from pgtask._worker.status import MOST_PARKED, Totals

__all__ = ["Progress", "burst_notes", "burst_summary", "ended", "share_terminal"]

ERASE_LINE = "\x1b[G\x1b[K"  # with a carriage return it would be written before the line that follows it
REDRAW_AFTER = 0.2
RATE_OVER = 5.0  # seconds that the shown rate looks back
NOBODY = 0  # has begun a line and not ended it


class Progress:
    """The updating line on a terminal. `show` may be called as often as one likes."""

    def __init__(self, stream: TextIO, begun: memoryview) -> None:
        self._stream = stream
        self._begun = begun
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
        begun, self._begun[0] = self._begun[0], NOBODY
        self._write(("\n" if begun else "") + ERASE_LINE + line[: self._width() - 1])

    def erase(self) -> None:
        if self._begun[0] == NOBODY:
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


class _Shared(io.FileIO):
    """The terminal that shows the progress, below the buffers of a standard stream: each write here is one to it.

    All streams of all processes share one number: which of them has begun the last line there and not ended it.
    """

    def __init__(self, fd: int, begun: memoryview) -> None:
        super().__init__(fd, "w", closefd=False)
        self._begun = begun

    def write(self, data: Any) -> int:
        text = bytes(data)
        if not text:
            return 0
        us = os.getpid() << 2 | self.fileno()
        begun = self._begun[0]
        before = b"" if begun == us else ERASE_LINE.encode() if begun == NOBODY else b"\n"
        self._begun[0] = NOBODY if text.endswith(b"\n") else us  # first: the progress may be drawn right after
        return max(0, (super().write(before + text) or 0) - len(before))


def share_terminal() -> Progress:
    """The progress on stderr. From now on, lines that are written to the terminal, also after a fork, erase it."""
    begun = memoryview(mmap.mmap(-1, 8)).cast("Q")
    progress = Progress(sys.stderr, begun)
    sys.stdout, sys.stderr = _shared(sys.stdout, begun), _shared(sys.stderr, begun)
    return progress


def _shared(stream: TextIO, begun: memoryview) -> TextIO:
    if not stream.isatty():
        return stream
    stream.flush()
    # By lines also with `python -u`: print() writes a line in pieces, and others would write between them.
    buffer = io.BufferedWriter(_Shared(stream.fileno(), begun))
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)


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
    if of and expected is not None and lately / seconds >= 0.5:  # while everything waits there is nothing to go by
        left = round((expected - ended(totals)) * seconds / lately)
        parts.append(f"at most {left // 60}:{left % 60:02d} left")
    return "  ".join(parts)


def burst_summary(totals: Totals, seconds: float, *, finished: bool, parked_left: int, style: str) -> str:
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
                "parked_left": parked_left,
                "put_back": totals.put_back,
                "seconds": round(seconds, 3),
                "steps_per_second": rate,
            }
        )
    parked = f", {totals.parked:,} parked" if totals.parked else ""
    return (
        f"burst {ending}: {_count(totals.done, 'task')} done{parked}, {_count(totals.steps, 'step')}, "
        f"{_count(totals.errors, 'error')} in {seconds:.1f} s ({rate:,} steps/s)"
    )


def burst_notes(totals: Totals, *, parked_left: int) -> Iterator[str]:
    """Lines about what a burst has left in the table, each with where to look."""
    if parked_left:
        tasks = f"{parked_left:,} or more tasks are" if parked_left >= MOST_PARKED else _are(parked_left)
        yield f"{tasks} parked with an error: pgtask list --state parked"
    if totals.put_back:
        times = _count(totals.put_back, "time")
        yield f"{times} a task was put back, since this app lacks its step: pgtask list --state scheduled"


def _are(tasks: int) -> str:
    return f"{_count(tasks, 'task')} {'is' if tasks == 1 else 'are'}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
