"""Where log records go and how they look: to stderr, as text for people or as JSON lines for programs.

Invariants: one record is one line, except a traceback in text; lines of several processes do not mix, since
each is one write. Called once, before the fork: children inherit the handler. Loggers of the user's code show
as well.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from pgtask._events import Event

__all__ = ["ERASE_LINE", "JSONFormatter", "TextFormatter", "configure"]

ERASE_LINE = "\r\x1b[K"
_LEVELS = {"WARNING": "WARN", "CRITICAL": "FATAL"}  # as wide as the others


class TextFormatter(logging.Formatter):
    """`2026-11-21T10:00:00.123Z INFO  pgtask.claim lease.lost task=... attempt=3`, then any traceback."""

    def __init__(self, *, erase: bool = False) -> None:
        super().__init__()
        self._before = ERASE_LINE if erase else ""

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVELS.get(record.levelname, record.levelname)
        line = f"{self._before}{_timestamp(record)} {level:<5} {record.name} {record.getMessage()}"
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
    """Ours among the root's handlers, so that configuring twice does not write each line twice."""


def configure(style: str, level: str, *, erase: bool = False) -> None:
    """Send what is `level` or worse to stderr, as "text" or "json"; `erase` clears a progress line first."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(JSONFormatter() if style == "json" else TextFormatter(erase=erase))
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
