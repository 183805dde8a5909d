"""The forms and limits of log lines."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from pgtask._cli.log_lines import JSONFormatter, TextFormatter
from pgtask._cli.logging import MAX_LINES, configure
from pgtask._log import EventLog, LogEvent

log = EventLog("pgtask.claim")


def record(message: object, *, level: int = logging.INFO, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("pgtask.claim", level, __file__, 1, message, (), more.get("exc_info"))
    made.created = 1795255200.1239
    return made


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Yield the root logger, and restore it afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("pgtask")
    before = root.handlers[:], root.level, ours.level
    yield root
    root.handlers[:], root.level, ours.level = before
    for logger in (root, ours):
        logger.setLevel(logger.level)  # clears the cache of isEnabledFor


def test_text_form_of_event() -> None:
    line = TextFormatter().format(record(LogEvent("lease.lost", {"task": UUID(int=1), "attempt": 3})))
    assert line == (
        "2026-11-21T10:00:00.123Z INFO  pgtask.claim lease.lost task=00000000-0000-0000-0000-000000000001 attempt=3"
    )


@pytest.mark.parametrize(
    ("level", "name"),
    [(logging.DEBUG, "DEBUG"), (logging.WARNING, "WARN "), (logging.ERROR, "ERROR"), (logging.CRITICAL, "FATAL")],
)
def test_levels_are_of_one_width(level: int, name: str) -> None:
    assert f"Z {name} pgtask.claim x" in TextFormatter().format(record(LogEvent("x", {}), level=level))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("word", "word"),
        ("two words", '"two words"'),
        ('a"b', r'"a\"b"'),
        ("a=b", '"a=b"'),
        ("", '""'),
        ("grüße, wörld", '"grüße, wörld"'),
        ("grüße", "grüße"),
        ("a\nb", r'"a\nb"'),
        ("\x1b[2J", r'"\u001b[2J"'),
        ("\x9b", r'"\u009b"'),
        ("\ud800", r'"\ud800"'),
        (0.30000000000000004, "0.3"),
        (1234567.8, "1.23457e+06"),
        (7, "7"),
        (True, "true"),
        (None, "none"),
        (("a", "b"), "\"('a', 'b')\""),
    ],
)
def test_field_is_one_word_or_quoted(value: object, text: str) -> None:
    assert str(LogEvent("e", {"field": value})) == f"e field={text}"


def test_json_form_of_event() -> None:
    event = LogEvent("lease.lost", {"task": UUID(int=1), "attempt": 3, "text": 'a "b"\n\ud800'})
    assert json.loads(JSONFormatter().format(record(event, level=logging.WARNING))) == {
        "ts": "2026-11-21T10:00:00.123Z",
        "level": "warning",
        "logger": "pgtask.claim",
        "event": "lease.lost",
        "fields": {"task": str(UUID(int=1)), "attempt": 3, "text": 'a "b"\n\ud800'},
        "pid": record("").process,
    }


def failure() -> Any:
    try:
        raise ValueError("wrong")
    except ValueError:
        return sys.exc_info()


def test_exception_follows_line_in_text_and_is_key_in_json() -> None:
    broken = record(LogEvent("x", {}), exc_info=failure())
    first, *below = TextFormatter().format(broken).split("\n")
    assert first.endswith("pgtask.claim x")
    assert below[0].startswith("Traceback")
    assert below[-1] == "ValueError: wrong"
    entry = json.loads(JSONFormatter().format(broken))
    assert entry["exception"].endswith("ValueError: wrong")
    assert "exception" not in json.loads(JSONFormatter().format(record("x")))


def test_records_of_user_code_look_alike() -> None:
    plain = logging.LogRecord("shop.orders", logging.INFO, __file__, 1, "sent %d of %s", (3, "7"), None)
    assert TextFormatter().format(plain).endswith(" INFO  shop.orders sent 3 of 7")
    entry = json.loads(JSONFormatter().format(plain))
    assert (entry["event"], entry["fields"]) == ("sent 3 of 7", {})


def test_extra_of_call_is_shown() -> None:
    plain = logging.makeLogRecord({"name": "shop", "msg": "sent", "text": "a b", "number": 7, "at": Path("/x")})
    assert TextFormatter().format(plain).endswith(' shop sent text="a b" number=7 at=/x')
    assert json.loads(JSONFormatter().format(plain))["fields"] == {"text": "a b", "number": 7, "at": "/x"}


def test_extra_that_json_cannot_encode_is_shown_as_text() -> None:
    circle: list[Any] = []
    circle.append(circle)
    for value in (circle, {(1, 2): 3}):
        entry = json.loads(JSONFormatter().format(logging.makeLogRecord({"msg": "sent", "odd": value, "more": 1})))
        assert entry["fields"] == {"odd": str(value), "more": "1"}


def test_filtered_event_is_not_rendered(caplog: pytest.LogCaptureFixture) -> None:
    class Bomb:
        def __str__(self) -> str:
            raise AssertionError

    with caplog.at_level(logging.INFO, "pgtask.claim"):
        log.debug("quiet", bomb=Bomb())
        log.info("loud", message="fields may have any name", level=1, event=2)
    assert caplog.messages == ['loud message="fields may have any name" level=1 event=2']
    assert caplog.records[0].funcName == "test_filtered_event_is_not_rendered"


def test_user_logging_shows_from_the_same_level(root: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure("text", "warning")
    configure("text", "info")
    log.info("ours")
    logging.getLogger("shop").info("theirs")
    logging.getLogger("shop").debug("too much")
    lines = [re.sub(r"^\S+ ", "", line) for line in stderr.getvalue().splitlines()]
    assert lines == ["INFO  pgtask.claim ours", "INFO  shop theirs"]
    assert root.level == logging.INFO


@pytest.fixture
def shown(root: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Capture stderr of a handler that was configured with "info"."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure("text", "info")
    return stderr


def ours(root: logging.Logger) -> logging.Handler:
    (handler,) = [handler for handler in root.handlers if type(handler).__module__ == configure.__module__]
    return handler


def parked(step: str, at: float) -> logging.LogRecord:
    made = record(LogEvent("task.parked", {"task": UUID(int=1), "step": step}), level=logging.WARNING)
    made.created = at
    return made


def test_task_events_are_limited_for_each_step(root: logging.Logger, shown: io.StringIO) -> None:
    for number in range(10_000):
        ours(root).handle(parked("Greeter.SayHello", 1000 + number / 20_000))
    for _ in range(MAX_LINES + 3):
        ours(root).handle(parked("Greeter.SayBye", 1000.5))
    assert shown.getvalue().count(" task.parked ") == 2 * MAX_LINES
    assert "log.suppressed" not in shown.getvalue()
    ours(root).handle(parked("Greeter.SayHello", 1001.6))
    *_, hello, bye, again = shown.getvalue().splitlines()
    said = "WARN  pgtask.log log.suppressed event=task.parked"
    assert hello.endswith(f"{said} step=Greeter.SayHello suppressed={10_000 - MAX_LINES}")
    assert bye.endswith(f"{said} step=Greeter.SayBye suppressed=3")
    assert "task.parked" in again
    assert shown.getvalue().count("log.suppressed") == 2


def test_suppressed_lines_are_counted_at_end_of_process(root: logging.Logger, shown: io.StringIO) -> None:
    for _ in range(MAX_LINES + 2):
        ours(root).handle(parked("Greeter.SayHello", 1000.0))
    ours(root).close()
    assert shown.getvalue().splitlines()[-1].endswith("step=Greeter.SayHello suppressed=2")
    ours(root).close()
    assert shown.getvalue().count("log.suppressed") == 1


def test_other_events_are_not_limited(root: logging.Logger, shown: io.StringIO) -> None:
    for _ in range(100):
        ours(root).handle(record(LogEvent("lease.lost", {"step": "Greeter.SayHello"})))
    assert shown.getvalue().count("lease.lost") == 100


def test_debug_level_suppresses_no_line(root: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure("json", "debug")
    for _ in range(100):
        ours(root).handle(parked("Greeter.SayHello", 1000.0))
    assert stderr.getvalue().count("task.parked") == 100
