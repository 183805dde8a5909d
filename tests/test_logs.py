"""The lines that people and programs read."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from pgtask._events import Event, log_event
from pgtask._supervisor.logs import JSONFormatter, TextFormatter, configure

log = logging.getLogger("pgtask.claim")


def record(message: object, *, level: int = logging.INFO, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("pgtask.claim", level, __file__, 1, message, (), more.get("exc_info"))
    made.created = 1795255200.1239
    return made


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    root, ours = logging.getLogger(), logging.getLogger("pgtask")
    before = root.handlers[:], root.level, ours.level
    yield root
    root.handlers[:], root.level, ours.level = before
    for logger in (root, ours):
        logger.setLevel(logger.level)  # forgets what isEnabledFor has cached


def test_text() -> None:
    line = TextFormatter().format(record(Event("lease.lost", {"task": UUID(int=1), "attempt": 3})))
    assert line == (
        "2026-11-21T10:00:00.123Z INFO  pgtask.claim lease.lost task=00000000-0000-0000-0000-000000000001 attempt=3"
    )


@pytest.mark.parametrize(
    ("level", "name"),
    [(logging.DEBUG, "DEBUG"), (logging.WARNING, "WARN "), (logging.ERROR, "ERROR"), (logging.CRITICAL, "FATAL")],
)
def test_levels_are_of_one_width(level: int, name: str) -> None:
    assert f"Z {name} pgtask.claim x" in TextFormatter().format(record(Event("x", {}), level=level))


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
def test_fields_read_as_one_word_or_are_quoted(value: object, text: str) -> None:
    assert str(Event("e", {"field": value})) == f"e field={text}"


def test_json() -> None:
    event = Event("lease.lost", {"task": UUID(int=1), "attempt": 3, "text": 'a "b"\n\ud800'})
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


def test_an_exception_is_below_the_line_in_text_and_a_key_in_json() -> None:
    broken = record(Event("x", {}), exc_info=failure())
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


def test_a_progress_line_is_erased_first() -> None:
    assert TextFormatter(erase=True).format(record("x")).startswith("\r\x1b[K2026-")


def test_an_event_that_is_filtered_out_is_not_rendered(caplog: pytest.LogCaptureFixture) -> None:
    class Bomb:
        def __str__(self) -> str:
            raise AssertionError

    with caplog.at_level(logging.INFO, "pgtask.claim"):
        log_event(log, logging.DEBUG, "quiet", bomb=Bomb())
        log_event(log, logging.INFO, "loud", message="fields may have any name", level=1, event=2)
    assert caplog.messages == ['loud message="fields may have any name" level=1 event=2']
    assert caplog.records[0].funcName == "test_an_event_that_is_filtered_out_is_not_rendered"


def test_user_logging_shows_from_the_same_level(root: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure("text", "warning")
    configure("text", "info")
    log_event(log, logging.INFO, "ours")
    logging.getLogger("shop").info("theirs")
    logging.getLogger("shop").debug("too much")
    lines = [re.sub(r"^\S+ ", "", line) for line in stderr.getvalue().splitlines()]
    assert lines == ["INFO  pgtask.claim ours", "INFO  shop theirs"]
    assert root.level == logging.INFO
