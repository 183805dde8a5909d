"""What a worker tells its supervisor fits the pipe, whatever an exception has put into it."""

from __future__ import annotations

import os
from select import PIPE_BUF

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtask._worker.status import Gone, StatusPipe, Totals, as_message, decode_messages

MOST = 2**63 - 1
FULL = Totals(MOST, MOST, MOST, MOST, MOST, MOST)


def through_the_pipe(text: str) -> str | None:
    """A message as the supervisor gets it; it was written at once."""
    reader, writer = os.pipe()
    try:
        StatusPipe(writer).send(Gone("notified", FULL, 1000, as_message(text), 10_000))
        line = os.read(reader, 65536)
    finally:
        os.close(reader)
        os.close(writer)
    assert len(line) <= PIPE_BUF
    assert line.count(b"\n") == 1
    (gone,) = decode_messages(bytearray(line))
    assert isinstance(gone, Gone)
    return gone.message


@pytest.mark.parametrize(
    "text",
    ["x" * 10_000, "\x01" * 10_000, "\udcff" * 10_000, "\U0001f600" * 10_000, '"' * 10_000, "\\" * 10_000],
    ids=["plain", "control", "surrogates", "wide", "quotes", "backslashes"],
)
def test_a_long_message_is_cut_until_it_fits(text: str) -> None:
    message = through_the_pipe(text)
    assert message is not None
    assert len(message) > 300


@given(st.text(max_size=20).map(lambda text: text * 200) | st.text())
def test_any_text_arrives_as_one_line(text: str) -> None:
    message = through_the_pipe(text)
    assert message is not None


def test_a_short_message_arrives_as_it_is() -> None:
    assert through_the_pipe("no such table:\n  caf\u00e9") == "no such table: caf\u00e9"
