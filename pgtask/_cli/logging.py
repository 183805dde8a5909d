"""The log on stderr, in one of the forms of `log_lines`.

Invariants: one record is one line, except a traceback in text; lines of several processes do not mix, since each is one
write. `configure` runs before the fork: children inherit the handler. Loggers of user code show as well. The handler
limits the events about single tasks, in every form, and logs the count of the suppressed ones.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from pgtask import _log
from pgtask._cli.log_lines import JSONFormatter, TerminalFormatter, TextFormatter, is_terminal
from pgtask._log import EventLog, LogEvent, LogHooks

__all__ = ["HOOKS", "configure", "restore"]

log = EventLog("pgtask.log")

LIMITED = ("task.parked",)  # events that are limited, for each step
MAX_LINES, LIMIT_PERIOD = 5, 1.0  # in seconds

_handler: _LimitingHandler | None = None
"""The handler that `configure` has made."""

_settled: tuple[list[logging.Handler], list[logging.Handler]] = ([], [])
"""The handlers of the root and of `pgtask` as `restore` has left them."""


class _LimitingHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Our handler on the root logger, recognisable, so that configuring twice does not write each line twice.

    It logs the count of suppressed `LIMITED` events before the first record after their period, or at the end of the
    process.
    """

    def __init__(self, stream: TextIO, *, limited: bool) -> None:
        super().__init__(stream)
        self.limited = limited
        self.is_closed = False
        """User code that configures logging has closed it: it still writes, but the end of the process skips it."""
        self._limited = LIMITED if limited else ()
        self._since: dict[tuple[str, str], float] = {}
        self._lines: dict[tuple[str, str], int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self._log_suppressed(record.created - LIMIT_PERIOD)
        if isinstance(record.msg, LogEvent) and record.msg.name in self._limited:
            kind = (record.msg.name, str(record.msg.fields.get("step")))
            self._since.setdefault(kind, record.created)
            self._lines[kind] = self._lines.get(kind, 0) + 1
            if self._lines[kind] > MAX_LINES:
                return
        super().emit(record)

    def close(self) -> None:
        self._log_suppressed(float("inf"))
        self.is_closed = True
        super().close()

    def forget_counts(self) -> None:
        self._since.clear()
        self._lines.clear()

    def _log_suppressed(self, since: float) -> None:
        """End the periods that began at `since` or before, and log their counts."""
        over = [kind for kind, began in self._since.items() if began <= since]
        counts = [self._lines.pop(kind) for kind in over]
        for kind in over:
            del self._since[kind]
        for (name, step), lines in zip(over, counts, strict=True):  # each line passes through this handler
            if lines > MAX_LINES:
                log.warning("log.suppressed", event=name, step=step, suppressed=lines - MAX_LINES)


def configure(style: str, level: str) -> None:
    """Send records of `level` and above to stderr, as "text" or "json"; "debug" suppresses none.

    Text has the form for people if stderr is a terminal.
    """
    root = logging.getLogger()
    for known in [known for known in root.handlers if isinstance(known, _LimitingHandler)]:
        root.removeHandler(known)
    root.addHandler(_new_handler(_formatter(style), limited=level.lower() != "debug"))
    root.setLevel(level.upper())
    logging.getLogger("pgtask").setLevel(level.upper())
    # Its one line at DEBUG, "Using selector", is noise.
    logging.getLogger("asyncio").setLevel(max(logging.INFO, root.level))


def forget_counts() -> None:
    """Forget the counts in a process that was just forked: the other process logs them."""
    if _handler is not None:
        _handler.forget_counts()


def _new_handler(formatter: logging.Formatter | None, *, limited: bool) -> _LimitingHandler:
    global _handler
    _handler = _LimitingHandler(sys.stderr, limited=limited)
    _handler.setFormatter(formatter)
    return _handler


def _formatter(style: str) -> logging.Formatter:
    if style == "json":
        return JSONFormatter()
    return TerminalFormatter() if is_terminal(sys.stderr) else TextFormatter()


def restore() -> None:
    """Restore the log of pgtask, after user code that may have configured logging.

    User code may have disabled our loggers, replaced our handler on the root logger, or added another one for the same
    terminal, which would show our lines twice. Its own lines stay its own affair, and so does a handler that it has
    given to the logger `pgtask`.
    """
    global _settled
    if _handler is None:
        return
    root, top = logging.getLogger(), logging.getLogger("pgtask")
    ours = _handler
    if ours.is_closed:
        ours = _new_handler(_handler.formatter, limited=_handler.limited)
        for where in (root, top):
            where.handlers[:] = [ours if isinstance(old, _LimitingHandler) else old for old in where.handlers]
    for name, logger in list(root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and (name + ".").startswith("pgtask."):
            logger.disabled = False
    if ours not in root.handlers and not top.handlers:
        top.addHandler(ours)
    for other in root.handlers:
        if other is not ours and _shares_stream(other) and _is_of_others not in other.filters:
            other.addFilter(_is_of_others)
    _settled = (root.handlers[:], top.handlers[:])


def restore_always() -> None:
    """Restore now, and from now on before each event of pgtask if the handlers have changed: a step may do that."""
    restore()
    _log.before_event = _restore_if_changed


def _restore_if_changed(logger: logging.Logger) -> None:
    root, top = logging.getLogger(), logging.getLogger("pgtask")
    is_lost = logger.disabled or _handler is None or _handler.is_closed
    if is_lost or root.handlers != _settled[0] or top.handlers != _settled[1]:
        restore()


def _shares_stream(handler: logging.Handler) -> bool:
    """Tell if a handler writes to the stream of ours."""
    console = getattr(handler, "console", None)  # of rich
    stream = getattr(handler, "stream", None) or getattr(console, "file", None)
    return stream is not None and stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


def _is_of_others(record: logging.LogRecord) -> bool:
    return not (record.name + ".").startswith("pgtask.")


HOOKS = LogHooks(forget_counts, restore, restore_always)
"""The callbacks for workers."""
