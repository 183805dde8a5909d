"""A file of all that waits, for a check without the database.

Theory of operation. The file is a line that names its format, and parts: a letter, a length and bytes. `A`: what was
asked for. `R`: some of the rows, in the binary format of COPY, as a check reads them. `H`: a run with its history.
`E`: the end, without which the file is not complete. So a check of a file decodes and replays the very bytes that a
check of the table does.

Invariant: the memory is bounded, in writing and in reading.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import msgspec

from pgtask._fastpath import RowReader, scan_envelope
from pgtask._postgres.waiting import WaitingRun, copy_rows
from pgtask._workflow.values import History
from pgtask.errors import ConfigError, DecodeError

__all__ = ["DumpedRun", "Header", "read_dump", "write_dump"]

MAGIC = b"pgtask check dump 1\n"
_PART = struct.Struct("!cQ")
IDS_IN_MEMORY = 16 << 20  # bytes

Histories = Callable[[Any, IO[bytes]], AsyncIterator[tuple[WaitingRun, History]]]
"""Yields the runs whose ids a file has, with their histories."""


class Header(msgspec.Struct, frozen=True):
    """What a dump has: steps up to so many bytes, of these queues (None: of all), of a sample of so many tasks."""

    max_bytes: int
    queues: list[str] | None = None
    sample: int | None = None


class DumpedRun(msgspec.Struct, frozen=True, array_like=True):
    """A run in a dump."""

    task: WaitingRun
    history: History


# A time that Python cannot hold is a FarTime, and becomes the last or first time of Python.
_encoder = msgspec.msgpack.Encoder(enc_hook=datetime.isoformat)
_run_decoder = msgspec.msgpack.Decoder(DumpedRun)
_header_decoder = msgspec.msgpack.Decoder(Header)


async def write_dump(connection: Any, path: Path, header: Header, histories: Histories) -> int:
    """Write what waits to a file that only its owner reads, and return the number of tasks. The file is there once it
    is complete. Raises `OSError`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _open_draft(draft) as file:
            file.write(MAGIC)
            _write(file, b"A", _encoder.encode(header))
            tasks = await _write_tasks(connection, file, header, histories)
            _write(file, b"E", b"")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return tasks


def _open_draft(draft: Path) -> IO[bytes]:
    return open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


async def _write_tasks(connection: Any, file: IO[bytes], header: Header, histories: Histories) -> int:
    reader = RowReader([])  # which knows no step, so it returns each row
    with tempfile.SpooledTemporaryFile(max_size=IDS_IN_MEMORY) as runs:

        def take(chunk: bytes) -> None:
            _write(file, b"R", chunk)
            for raw, text, _ in reader.feed(chunk):
                if _may_be_run(text):
                    runs.write(raw)

        await copy_rows(connection, take, max_bytes=header.max_bytes, queues=header.queues, sample=header.sample)
        async for task, history in histories(connection, runs):
            _write(file, b"H", _encoder.encode(DumpedRun(task, history)))
    return int(reader.rows)


def _may_be_run(text: str | None) -> bool:
    try:
        return text is not None and scan_envelope(text)[1] == "Run"
    except DecodeError:
        return False


def _write(file: IO[bytes], kind: bytes, payload: bytes) -> None:
    file.write(_PART.pack(kind, len(payload)))
    file.write(payload)


def read_dump(path: Path) -> tuple[Header, Iterator[bytes | DumpedRun]]:
    """Return what a dump has, and its parts: rows in the format of COPY, then runs. Raises `ConfigError`."""
    parts = _read_parts(path)
    return next(parts), parts  # type: ignore[return-value]


def _read_parts(path: Path) -> Iterator[Header | bytes | DumpedRun]:
    """Yield the header first."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ConfigError(f"--from {path}: is no dump of this pgtask; make one by pgtask check --dump FILE")
            while True:
                kind, payload = _read_part(path, file)
                match kind:
                    case b"A":
                        yield _header_decoder.decode(payload)
                    case b"R":
                        yield payload
                    case b"H":
                        yield _run_decoder.decode(payload)
                    case _:
                        return
    except OSError as error:
        raise ConfigError(f"--from {path}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--from {path}: is damaged ({error}); make it again by pgtask check --dump FILE") from None


def _read_part(path: Path, file: IO[bytes]) -> tuple[bytes, bytes]:
    head = file.read(_PART.size)
    if len(head) == _PART.size:
        kind, size = _PART.unpack(head)
        payload = file.read(size)
        if len(payload) == size:
            return kind, payload
    raise ConfigError(f"--from {path}: is not complete; make it again by pgtask check --dump FILE")
