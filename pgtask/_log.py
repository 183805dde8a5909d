"""Log events: a name and its fields, through the stdlib logger of each stage.

Invariants: imports nothing of ours, so any layer may use it; a field never holds a payload or a password; the
record reads well under any formatter, also under a user's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["EventLog", "LogEvent", "LogHooks", "before_event", "render_fields"]

before_event: Callable[[logging.Logger], Any] = lambda logger: None  # noqa: E731 - a worker puts its own here
"""Called with the logger before each event that its level admits, or that a disabled logger would drop."""


def _do_nothing() -> None:
    """Ignore user code that configures logging."""


class LogHooks(NamedTuple):
    """Callbacks of a program that writes the log, for its workers: user code in them may configure logging.

    `forget_counts`: the process was forked, and the counts of suppressed lines belong to the other one. `restore`: user
    code has run. `restore_always`: from now on, restore before each event if user code has changed the handlers.
    """

    forget_counts: Callable[[], Any] = _do_nothing
    restore: Callable[[], Any] = _do_nothing
    restore_always: Callable[[], Any] = _do_nothing


class LogEvent:
    """The message of a record; reads as `lease.lost task=... attempt=3`, rendered only if a handler prints it."""

    __slots__ = ("fields", "name", "trimmed")

    def __init__(self, name: str, fields: Mapping[str, Any], *, trimmed: bool = False) -> None:
        self.name = name
        self.fields = fields
        self.trimmed = trimmed
        """Its traceback leaves out the frames of pgtask."""

    def __str__(self) -> str:
        return " ".join([self.name, *render_fields(self.fields)])


def render_fields(fields: Mapping[str, Any]) -> list[str]:
    """Return `key=value` for each field."""
    return [f"{key}={_render_value(value)}" for key, value in fields.items()]


class EventLog:
    """A logger of events: `log.warning("lease.lost", task=..., step=...)`, by the stdlib logger of that name.

    Each method takes the event and its fields. `exc_info`: an exception whose traceback is logged. `trimmed`: the
    exception is the user's, so its traceback leaves out the frames of pgtask. `stack`: the text of a stack dump.
    """

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def is_enabled_for(self, level: int) -> bool:
        return self._logger.isEnabledFor(level)

    def debug(self, event: str, /, **fields: Any) -> None:
        self._emit(logging.DEBUG, event, **fields)

    def info(self, event: str, /, **fields: Any) -> None:
        self._emit(logging.INFO, event, **fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        self._emit(logging.WARNING, event, **fields)

    def error(self, event: str, /, **fields: Any) -> None:
        self._emit(logging.ERROR, event, **fields)

    def log(self, level: int, event: str, /, **fields: Any) -> None:
        """Log at a level that the caller computes."""
        self._emit(level, event, **fields)

    def _emit(
        self,
        level: int,
        event: str,
        /,
        *,
        exc_info: BaseException | None = None,
        trimmed: bool = False,
        stack: str | None = None,
        **fields: Any,
    ) -> None:
        logger = self._logger
        if logger.disabled or logger.isEnabledFor(level):
            before_event(logger)
        if not logger.isEnabledFor(level):
            return
        message = LogEvent(event, fields, trimmed=trimmed)
        if stack is None:
            logger.log(level, message, exc_info=exc_info, stacklevel=3)
        else:
            logger.handle(logger.makeRecord(logger.name, level, __file__, 0, message, (), None, sinfo=stack))


def _render_value(value: Any) -> str:
    """Return a field's value as one word, quoted as JSON if necessary."""
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
