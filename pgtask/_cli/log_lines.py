"""The forms of a log record: text, JSON, and text for a person at a terminal.

Invariants: one record is one line, except a traceback in text. Only the form for a terminal depends on the environment;
the forms for programs are fixed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from datetime import UTC, datetime
from typing import Any, TextIO
from uuid import UUID

from pgtask._current import current_step
from pgtask._log import LogEvent, render_fields
from pgtask._traceback import traceback_of

__all__ = ["JSONFormatter", "TerminalFormatter", "TextFormatter", "is_terminal"]

_LEVELS = {"WARNING": "WARN", "CRITICAL": "FATAL"}  # as wide as the others
# The attributes of every record; the others come from `extra` of the call.
_STANDARD = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}
_COLOURS = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}
SHORT_ID = 8  # last digits of an id on a terminal, as in the tables; commands accept them


class TextFormatter(logging.Formatter):
    """`2026-11-21T10:00:00.123Z INFO  pgtask.claim lease.lost task=... attempt=3`, then any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVELS.get(record.levelname, record.levelname)
        words = [record.getMessage(), *render_fields(_fields_of(record))]
        line = f"{_timestamp(record)} {level:<5} {record.name} {' '.join(words)}"
        trace = _format_trace(self, record)
        return f"{line}\n{trace}" if trace else line


class JSONFormatter(logging.Formatter):
    """An object of `ts`, `level`, `logger`, `event`, `fields`, `pid`, and `exception` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        event: LogEvent | None = record.msg if isinstance(record.msg, LogEvent) else None
        entry: dict[str, Any] = {
            "ts": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": event.name if event else record.getMessage(),
            "fields": {**(event.fields if event else {}), **_fields_of(record)},
            "pid": record.process,
        }
        trace = _format_trace(self, record)
        if trace:
            entry["exception"] = trace
        try:
            return json.dumps(entry, default=str)
        except (TypeError, ValueError, RecursionError):  # `extra` of user code: a key that is no text, a cycle
            return json.dumps({**entry, "fields": {str(key): f"{value}" for key, value in entry["fields"].items()}})


class TerminalFormatter(logging.Formatter):
    """`10:00:00.123 INFO  lease.lost task=2e174e0a attempt=3`: the local time of day, a coloured level, the last digits
    of ids, paths from the working directory. Records of other loggers begin with the logger's name."""

    def __init__(self) -> None:
        super().__init__()
        self._coloured = not os.environ.get("NO_COLOR")  # see https://no-color.org
        self._here: re.Pattern[str] | None = None
        with contextlib.suppress(OSError):  # it was removed
            self._here = re.compile(rf"(?<![\w.\-/]){re.escape(os.getcwd().rstrip(os.sep) + os.sep)}(?=[^\s/])")

    def format(self, record: logging.LogRecord) -> str:
        event = record.msg if isinstance(record.msg, LogEvent) else None
        fields = {**(event.fields if event else {}), **_fields_of(record)}
        words = [event.name if event else f"{record.name} {record.getMessage()}", *render_fields(_shorten_ids(fields))]
        moment = datetime.fromtimestamp(record.created)
        level = f"{_LEVELS.get(record.levelname, record.levelname):<5}"
        trace = _format_trace(self, record)
        text = " ".join(words) + (f"\n{trace}" if trace else "")
        if self._here is not None:
            text = self._here.sub("", text)
        time = self._paint("2", f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}")
        return f"{time} {self._paint(_COLOURS.get(record.levelname, ''), level)} {text}"

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._coloured and code else text


def _shorten_ids(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value.hex[-SHORT_ID:] if isinstance(value, UUID) else value for name, value in fields.items()}


def is_terminal(stream: TextIO) -> bool:
    """Tell if a person may be reading the stream."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields beside the message: the `extra` of the call, and the current step."""
    extra = {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
    if isinstance(record.msg, LogEvent) and "task" in record.msg.fields:
        return extra
    step = current_step()
    return {**{f"extra.{name}" if name in step else name: value for name, value in extra.items()}, **step}


def _format_trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """Return the traceback and the stack of a record; empty without them."""
    parts = []
    if record.exc_info and record.exc_info[1] is not None:
        if isinstance(record.msg, LogEvent) and record.msg.trimmed:
            parts.append(traceback_of(record.exc_info[1]))
        else:
            parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(filter(None, parts))
