"""The progress of a change of many tasks, on stderr: a line that is redrawn on a terminal, a few elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time

from pgtask._cli.output import note
from pgtask._cli.progress import DRAW_INTERVAL, ERASE_LINE, fit_fields, share_done

__all__ = ["BulkProgress"]

NOTE_INTERVAL = 5.0  # seconds


class BulkProgress:
    """The progress line. `total` is known on a terminal only; `done` says what is done to tasks."""

    def __init__(self, total: int | None, done: str) -> None:
        self._total = total
        self._done = done
        self._begun_at = self._shown_at = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def show(self, tasks: int) -> None:
        """Show how many tasks are done, unless that was shown a moment ago."""
        now = time.monotonic()
        if now - self._shown_at < (DRAW_INTERVAL if self._is_terminal else NOTE_INTERVAL):
            return
        self._shown_at = now
        if self._is_terminal:
            self._draw(tasks, now - self._begun_at)
        else:
            note(f"{tasks:,} tasks {self._done} so far")

    def _draw(self, tasks: int, seconds: float) -> None:
        total = self._total if self._total is not None and self._total >= tasks else None
        counted = f"{tasks:,}" if total is None else f"{tasks:,} of {total:,}"
        fields = [
            *share_done(tasks, tasks, seconds, total),
            f"{counted} tasks {self._done}",
            f"{tasks / seconds:,.0f} tasks/s",
        ]
        self._write(ERASE_LINE + fit_fields(fields, _width() - 1))

    def erase(self) -> None:
        if self._is_terminal:
            self._write(ERASE_LINE)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


def _width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80
