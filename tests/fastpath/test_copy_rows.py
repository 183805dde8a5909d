"""Rows for COPY, read as the manual of Postgres describes the format."""

from __future__ import annotations

import io
import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from step_kit import STEPS, codec

from pgtask import Task
from pgtask._fastpath import CopyRows


def rows_of(data: bytes, columns: int) -> list[tuple[Any, ...]]:
    """Read COPY's binary format as the manual of Postgres describes it."""
    stream = io.BytesIO(data)
    assert stream.read(19) == b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)
    rows = []
    while (count := struct.unpack("!h", stream.read(2))[0]) != -1:
        assert count == columns
        values = []
        for _ in range(columns):
            (length,) = struct.unpack("!i", stream.read(4))
            values.append(stream.read(length))
            assert len(values[-1]) == length
        assert len(values[0]) == 16
        rows.append(
            (
                int.from_bytes(values[0], "big"),
                values[1].decode(),
                values[2].decode(),
                struct.unpack("!h", values[3])[0],
                *(value.decode() for value in values[4:]),
            )
        )
    assert stream.read() == b""
    return rows


@given(
    st.lists(st.tuples(STEPS, st.text(max_size=3), st.integers(-32768, 32767), st.text(), st.booleans()), max_size=6),
    st.integers(0, 2**128 - 10),
    st.booleans(),
)
def test_copy_rows_are_in_postgres_binary_format(
    steps: list[tuple[Task, str, int, str, bool]], first: int, has_keys: bool
) -> None:
    rows = CopyRows(first, has_keys=has_keys)
    data = b""
    for step, queue, priority, key, take in steps:
        keys = [key] if has_keys else []
        size = rows.add(codec(type(step)), codec(type(step)).payload(step), queue, priority, *keys)
        if take:
            taken = rows.take()
            assert len(taken) == size
            data += taken
    data += rows.take() + CopyRows.TRAILER
    assert rows.count == len(steps)
    assert rows.take() == b""
    assert rows_of(data, 5 if has_keys else 4) == [
        (first + number, codec(type(step)).encode(step), queue, priority, *([key] if has_keys else []))
        for number, (step, queue, priority, key, _) in enumerate(steps)
    ]
