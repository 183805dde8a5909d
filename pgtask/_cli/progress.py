"""The progress line and the summary of a burst, for a person.

Invariants: the line never scrolls and never wraps; a write of Python code to the terminal, in any of our processes,
first erases it, in the same write, and keeps an incomplete line of another stream. Programs that a step starts do not
erase it.
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
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from pgtask._status import MAX_PARKED, Totals

__all__ = [
    "DRAW_INTERVAL",
    "ERASE_LINE",
    "BurstProgress",
    "burst_notes",
    "burst_summary",
    "fit_fields",
    "share_done",
    "share_terminal",
]

ERASE_LINE = "\x1b[G\x1b[K"  # with a carriage return it would be written before the line that follows it
RED, PLAIN = "\x1b[31m", "\x1b[m"
DRAW_INTERVAL = 0.2  # seconds
RATE_PERIOD = 5.0  # seconds that the rate is the mean of
NONE_OPEN = 0  # no stream has an incomplete line


class BurstProgress:
    """The updating line on a terminal. `draw` limits its own rate."""

    def __init__(self, stream: TextIO, begun: memoryview) -> None:
        self._stream = stream
        self._begun = begun
        self._color = not os.environ.get("NO_COLOR")
        self._drawn_at = float("-inf")
        self._history: deque[tuple[float, Totals]] = deque()

    def draw(self, totals: Totals, expected: int | None) -> None:
        now = time.monotonic()
        if now - self._drawn_at < DRAW_INTERVAL:
            return
        self._drawn_at = now
        self._history.append((now, totals))
        while now - self._history[0][0] > RATE_PERIOD:
            self._history.popleft()
        since, before = self._history[0]
        seconds = max(now - since, 1e-9)
        line = progress_line(totals, before, seconds, expected, width=self._width() - 1, color=self._color)
        begun, self._begun[0] = self._begun[0], NONE_OPEN
        self._write(("\n" if begun else "") + ERASE_LINE + line)

    def erase(self) -> None:
        if self._begun[0] == NONE_OPEN:
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


class _SharedTerminal(io.FileIO):
    """The terminal with the progress line, below the buffers of a standard stream: each write is one write there.

    All streams of all processes share one number: the stream with an incomplete last line.
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
        before = b"" if begun == us else ERASE_LINE.encode() if begun == NONE_OPEN else b"\n"
        # Before the write: the progress may be drawn right after it.
        self._begun[0] = NONE_OPEN if text.endswith(b"\n") else us
        return max(0, (super().write(before + text) or 0) - len(before))


def share_terminal() -> BurstProgress:
    """Return the progress on stderr. From now on, writes to the terminal erase it, also after a fork."""
    begun = memoryview(mmap.mmap(-1, 8)).cast("Q")
    progress = BurstProgress(sys.stderr, begun)
    sys.stdout, sys.stderr = _share_stream(sys.stdout, begun), _share_stream(sys.stderr, begun)
    return progress


def _share_stream(stream: TextIO, begun: memoryview) -> TextIO:
    if not stream.isatty():
        return stream
    stream.flush()
    # Line buffered, also with `python -u`: print() writes a line in pieces, and other processes would write in between.
    buffer = io.BufferedWriter(_SharedTerminal(stream.fileno(), begun))
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)


def progress_line(
    totals: Totals, before: Totals, seconds: float, expected: int | None, *, width: int = 1000, color: bool = False
) -> str:
    """Return `34%  ~1:02 left  12,000 of 36,000 tasks done  2 errors  1 parked  24,390 steps/s  36,000 steps`.

    The most useful field comes first; fields that do not fit into `width` columns are left out whole. Errors are red
    with `color`. `before` are the totals `seconds` earlier.
    """
    over = totals.settled
    goal = expected if expected and expected >= over else None
    done = f"{totals.done:,}" if goal is None else f"{totals.done:,} of {goal:,}"
    fields = [
        *share_done(over, over - before.settled, seconds, goal),
        f"{done} tasks done",
        *([_count(totals.errors, "error")] if totals.errors else []),
        *([f"{totals.parked:,} parked"] if totals.parked else []),
        f"{(totals.steps - before.steps) / seconds:,.0f} steps/s",
        f"{totals.steps:,} steps",
    ]
    line = fit_fields(fields, width)
    if color and totals.errors:
        errors = _count(totals.errors, "error")
        line = line.replace(f"  {errors}", f"  {RED}{errors}{PLAIN}", 1)
    return line


def share_done(over: int, recent: int, seconds: float, goal: int | None) -> list[str]:
    """Return the share that is done, and an estimate for the rest; other supervisors may shorten it."""
    if goal is None:
        return []
    share = f"{100 * over // goal}%"
    if recent / seconds < 0.5:  # while all tasks wait, the rate predicts nothing
        return [share]
    left = round((goal - over) * seconds / recent)
    hours, minutes = divmod(left // 60, 60)
    clock = f"{hours}:{minutes:02d}:{left % 60:02d}" if hours else f"{minutes}:{left % 60:02d}"
    return [share, f"~{clock} left"]


def fit_fields(fields: list[str], width: int) -> str:
    """Join fields, without those at the end that do not fit into `width` columns."""
    line = fields[0][:width]
    for field in fields[1:]:
        if len(line) + 2 + len(field) > width:
            break
        line += "  " + field
    return line


def burst_summary(
    totals: Totals,
    seconds: float,
    *,
    finished: bool,
    parked_left: int,
    parked_others: int = 0,
    paused: Sequence[str] = (),
    style: str,
) -> str:
    """Return the last line of a burst: for people, or with style "json" for programs."""
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
                "parked_others": parked_others,
                "put_back": totals.put_back,
                "paused": paused,
                "seconds": round(seconds, 3),
                "steps_per_second": rate,
            }
        )
    parked = f", {totals.parked:,} parked" if totals.parked else ""
    return (
        f"burst {ending}: {_count(totals.done, 'task')} done{parked}, {_count(totals.steps, 'step')}, "
        f"{_count(totals.errors, 'error')} in {seconds:.1f} s ({rate:,} steps/s)"
    )


def burst_notes(
    totals: Totals, *, parked_left: int, parked_others: int = 0, paused: Sequence[str] = ()
) -> Iterator[str]:
    """Yield lines about tasks that a burst has left in the table, each with a command that lists them."""
    if parked_left:
        before = parked_left - totals.parked
        since = ""
        if before > 0 and parked_left < MAX_PARKED:
            of_them = f"{before:,} of them " if totals.parked else ""
            since = f", {of_them}since before this burst"
        yield f"{_count_tasks(parked_left)} parked with an error{since}: pgtask list --state parked"
    if parked_others:
        others = _count_tasks(parked_others, " of other apps")
        yield f"{others} parked too, which is not counted: pgtask list --state parked"
    if paused:
        yield f"{', '.join(paused)}: paused, so tasks of these may be left; to let workers go on: pgtask resume --all"
    if totals.put_back:
        times = _count(totals.put_back, "time")
        yield f"{times} a worker put a task back, since this app lacks its step: pgtask list --state scheduled"


def _count_tasks(tasks: int, whose: str = "") -> str:
    if tasks >= MAX_PARKED:
        return f"{tasks:,} or more tasks{whose} are"
    return f"{_count(tasks, 'task')}{whose} {'is' if tasks == 1 else 'are'}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
