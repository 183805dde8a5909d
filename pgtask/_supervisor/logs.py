"""Where log records go and how they look: to stderr, as text for people or as JSON lines for programs.

Invariants: one record is one line, except a traceback in text; lines of several processes do not mix, since
each is one write. Called once, before the fork: children inherit the handler. Loggers of the user's code show
as well. What is said of each task is limited here, for every format; what that leaves out is counted.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from pgtask._events import Event, log_event

__all__ = ["JSONFormatter", "TextFormatter", "configure"]

log = logging.getLogger("pgtask.log")

LIMITED = ("task.parked",)  # these events show at most so many lines of each step in so many seconds
LIMIT, LIMIT_OVER = 5, 1.0
_LEVELS = {"WARNING": "WARN", "CRITICAL": "FATAL"}  # as wide as the others


class TextFormatter(logging.Formatter):
    """`2026-11-21T10:00:00.123Z INFO  pgtask.claim lease.lost task=... attempt=3`, then any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVELS.get(record.levelname, record.levelname)
        line = f"{_timestamp(record)} {level:<5} {record.name} {record.getMessage()}"
        trace = _traceback(self, record)
        return f"{line}\n{trace}" if trace else line


class JSONFormatter(logging.Formatter):
    """An object of `ts`, `level`, `logger`, `event`, `fields`, `pid`, and `exception` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        event: Event | None = record.msg if isinstance(record.msg, Event) else None
        entry = {
            "ts": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": event.name if event else record.getMessage(),
            "fields": event.fields if event else {},
            "pid": record.process,
        }
        trace = _traceback(self, record)
        if trace:
            entry["exception"] = trace
        return json.dumps(entry, default=str)


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Ours among the root's handlers, so that configuring twice does not write each line twice.

    Of the events in `LIMITED`, the count of those left out comes before the first record after the time is over,
    or at the end of the process.
    """

    def __init__(self, stream: TextIO, *, limited: bool) -> None:
        super().__init__(stream)
        self._limited = LIMITED if limited else ()
        self._since: dict[tuple[str, str], float] = {}
        self._lines: dict[tuple[str, str], int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self._say_left_out(record.created - LIMIT_OVER)
        if isinstance(record.msg, Event) and record.msg.name in self._limited:
            kind = (record.msg.name, str(record.msg.fields.get("step")))
            self._since.setdefault(kind, record.created)
            self._lines[kind] = self._lines.get(kind, 0) + 1
            if self._lines[kind] > LIMIT:
                return
        super().emit(record)

    def close(self) -> None:
        self._say_left_out(float("inf"))
        super().close()

    def _say_left_out(self, since: float) -> None:
        """Forget the times that began at `since` or before."""
        over = [kind for kind, began in self._since.items() if began <= since]
        counts = [self._lines.pop(kind) for kind in over]
        for kind in over:
            del self._since[kind]
        for (name, step), lines in zip(over, counts, strict=True):  # each comes back here as a record
            if lines > LIMIT:
                log_event(log, logging.WARNING, "log.suppressed", event=name, step=step, suppressed=lines - LIMIT)


def configure(style: str, level: str) -> None:
    """Send what is `level` or worse to stderr, as "text" or "json"; at "debug" nothing is left out."""
    handler = _Handler(sys.stderr, limited=level.lower() != "debug")
    handler.setFormatter(JSONFormatter() if style == "json" else TextFormatter())
    root = logging.getLogger()
    for known in [known for known in root.handlers if isinstance(known, _Handler)]:
        root.removeHandler(known)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.getLogger("pgtask").setLevel(level.upper())
    # Its one line at DEBUG, "Using selector", tells nobody anything.
    logging.getLogger("asyncio").setLevel(max(logging.INFO, root.level))


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)
