"""The messages of a worker fit the pipe, with any text of an exception in them."""

from __future__ import annotations

import os
from select import PIPE_BUF

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtask._status import ExitNotice, Ready, Stack, StatusPipe, Totals, decode_messages, fit_message

MOST = 2**63 - 1
FULL = Totals(MOST, MOST, MOST, MOST, MOST, MOST)


def through_the_pipe(text: str) -> str | None:
    """Return a message as the supervisor gets it, from one write."""
    reader, writer = os.pipe()
    try:
        StatusPipe(writer).send(ExitNotice("notified", FULL, 1000, fit_message(text), 10_000))
        line = os.read(reader, 65536)
    finally:
        os.close(reader)
        os.close(writer)
    assert len(line) <= PIPE_BUF
    assert line.count(b"\n") == 1
    (gone,) = decode_messages(bytearray(line), lambda error: pytest.fail(str(error)))
    assert isinstance(gone, ExitNotice)
    return gone.message


@pytest.mark.parametrize(
    "text",
    ["x" * 10_000, "\x01" * 10_000, "\udcff" * 10_000, "\U0001f600" * 10_000, '"' * 10_000, "\\" * 10_000],
    ids=["plain", "control", "surrogates", "wide", "quotes", "backslashes"],
)
def test_long_message_is_cut_until_it_fits(text: str) -> None:
    message = through_the_pipe(text)
    assert message is not None
    assert len(message) > 300


@given(st.text(max_size=20).map(lambda text: text * 200) | st.text())
def test_any_text_arrives_as_one_line(text: str) -> None:
    message = through_the_pipe(text)
    assert message is not None


def test_stacks_and_foreign_lines_hide_no_message() -> None:
    """faulthandler writes a hundred threads, and then three dots for the rest."""
    threads = [line for number in range(3) for line in (f"Thread 0x{number} (most recent call first):", '  File "a"')]
    lines = [*threads, "Current thread 0x9 (most recent call first):", '  File "b"', "...", "hello", '{"type":"ready"}']
    garbled: list[Exception] = []
    stack, message = decode_messages(bytearray("\n".join([*lines, ""]).encode()), garbled.append)
    assert isinstance(stack, Stack)
    assert stack.text.splitlines()[:3] == [*lines[6:8], lines[4]]
    assert stack.text.endswith("...")
    assert message == Ready()
    assert len(garbled) == 1


def test_short_message_arrives_unchanged() -> None:
    assert through_the_pipe("no such table:\n  caf\u00e9") == "no such table: caf\u00e9"
