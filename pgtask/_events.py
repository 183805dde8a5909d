"""What every stage logs: an event and its fields, through a stdlib logger of its own.

Invariants: imports nothing of ours, so any layer may use it; a field never holds a payload or a password; the
record reads well under any formatter, also one that a user brought.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

__all__ = ["Event", "log_event"]


class Event:
    """The message of a record; reads as `lease.lost task=... attempt=3`, rendered only if it is printed."""

    __slots__ = ("fields", "name")

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.name = name
        self.fields = fields

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={_text(value)}" for key, value in self.fields.items())])


def log_event(
    logger: logging.Logger,
    level: int,
    event: str,
    /,
    *,
    exc_info: BaseException | None = None,
    stack: str | None = None,
    **fields: Any,
) -> None:
    """Log `event` with its fields, and with the traceback of `exc_info` or the text of the `stack` of a process."""
    if not logger.isEnabledFor(level):
        return
    message = Event(event, fields)
    if stack is None:
        logger.log(level, message, exc_info=exc_info, stacklevel=2)
    else:
        logger.handle(logger.makeRecord(logger.name, level, __file__, 0, message, (), None, sinfo=stack))


def _text(value: Any) -> str:
    """One field's value, quoted as JSON where it would not read as one word."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if not text.isprintable():
        return json.dumps(text)
    if not text or any(mark in text for mark in ' "='):
        return json.dumps(text, ensure_ascii=False)
    return text
