"""The thread with a loop of its own, and the placeholders of statements."""

from __future__ import annotations

import asyncio
import threading

import pytest

from pgtask import EnqueueError
from pgtask._loop_thread import LoopThread
from pgtask._placeholders import translate


async def answer() -> int:
    return threading.get_ident()


def test_it_runs_coroutines_in_its_thread() -> None:
    thread = LoopThread("test")
    assert thread.run(answer()) != threading.get_ident()
    assert thread.begin(answer()).result(10) == thread.run(answer())
    assert not thread.is_here()
    thread.stop()


def test_after_its_end_a_call_is_refused() -> None:
    thread = LoopThread("test")
    thread.stop()
    for _ in range(2):
        with pytest.raises(EnqueueError, match="the client was closed during the call"):
            thread.run(answer())


def test_its_end_cancels_what_runs() -> None:
    thread = LoopThread("test")
    ended: list[str] = []
    calls = [thread.begin(forever(ended)) for _ in range(3)]
    thread.run(answer())
    thread.stop()
    for call in calls:
        with pytest.raises(EnqueueError, match="the client was closed during the call"):
            call.result(10)
    assert ended == ["cancelled"] * 3


def test_a_call_can_be_cancelled() -> None:
    thread = LoopThread("test")
    ended: list[str] = []
    call = thread.begin(forever(ended))
    thread.cancel(call)
    with pytest.raises(EnqueueError):
        call.result(10)
    assert ended == ["cancelled"]
    thread.cancel(call)
    assert thread.run(answer())
    thread.stop()


async def forever(ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        ended.append("cancelled")
        raise


STATEMENT = """
-- Divide $1 by $2; a value here, $3, would end the comment.
SELECT $2 % $1, 'it''s 100% $1', "a % $1" -- and $4
FROM somewhere
"""


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("numeric", """SELECT $2 % $1, 'it''s 100% $1', "a % $1" \nFROM somewhere"""),
        ("format", """SELECT %s %% %s, 'it''s 100%% $1', "a %% $1" \nFROM somewhere"""),
        ("pyformat", """SELECT %(p2)s %% %(p1)s, 'it''s 100%% $1', "a %% $1" \nFROM somewhere"""),
    ],
)
def test_placeholders_are_translated_outside_of_quotes(style: str, text: str) -> None:
    assert translate(STATEMENT, style) == (text, [2, 1])
