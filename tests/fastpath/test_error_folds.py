"""Errors without what differs from task to task."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgtask._fastpath import CauseReader, fold_error


@pytest.mark.parametrize(
    ("error", "text", "place"),
    [
        ("boom", "boom", ""),
        ("KeyError: 'a b' (at /x.py:3 in run)\ncaused by OSError: 7", "KeyError: #", "/x.py:3 in run"),
        ("OSError: bob7 isn't 0x7f3a, but 1,234.5 ms (at /a (b).py:3 in f)", "OSError: bob# isn't #, but # ms", ""),
        ("E: 4706f1ca-0000-4000-8000-00000000000a", "E: #", ""),
        ('E: é deadbeef1 deadbeef added "it\'s" 12.', "E: é # deadbeef added # #.", ""),
        ("E: an 'open quote and user's", "E: an 'open quote and user's", ""),
        ("E: the 'user's' end", "E: the # end", ""),
        ("E (at x.py:1)", "E", "x.py:1"),
    ],
)
def test_folds(error: str, text: str, place: str) -> None:
    folded, where = fold_error(error.encode())
    assert folded.decode() == text
    assert where.decode() == place or (not place and where == b"/a (b).py:3 in f")


@given(st.text(), st.integers(0), st.uuids())
@example(")", 1, None)
@example(" (at )", 1, None)
@example("x" * 5000, 1, None)
def test_numbers_and_ids_do_not_matter(text: str, number: int, task: object) -> None:
    line = text.replace("\n", " ").replace("'", " ").replace('"', " ")
    assert fold_error(f"{line} {number} '{task}'".encode()) == fold_error(f"{line} 0 'x'".encode())


def test_causes_have_a_bound() -> None:
    reader = CauseReader(2)
    header = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
    times = [0, 5, -(2**40), 2**40, -1]
    for number, error in enumerate([b"a", b"b", b"c", b"d", b"a"]):
        time = times[number].to_bytes(8, "big", signed=True)
        fields = (bytes(15) + bytes([number]), time, b'{"T":{"S":1}}', error)
        row = b"\x00\x04" + b"".join(len(field).to_bytes(4, "big") + field for field in fields)
        for at in range(len(row)):  # byte by byte
            reader.feed((header if number == at == 0 else b"") + row[at : at + 1])
    found = [(step, text, count, first[-1], last[-1]) for step, text, _, count, first, last in reader.found()]
    assert found == [("T.S", "a", 2, 4, 0), ("T.S", "b", 1, 1, 1), ("", "", 2, 2, 3)]
    assert reader.rows == 5
