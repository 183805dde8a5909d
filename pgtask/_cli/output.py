"""The output of the commands: results go to stdout, notes about them to stderr.

Invariants: a failure to write is an error of one line, never a traceback; a descriptor that the caller has closed is
never given to a socket, which would then receive the output.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from pgtask._postgres.times import FarTime
from pgtask.errors import PgtaskError

__all__ = [
    "BROKEN_PIPE",
    "CANNOT_WRITE",
    "SOME_FAILED",
    "OutputError",
    "flush_streams",
    "json_line",
    "note",
    "note_failures",
    "open_streams",
    "write_lines",
]

CANNOT_WRITE, BROKEN_PIPE = 74, 141
"""Exit codes: EX_IOERR of sysexits, and the code by which a shell reports a death of SIGPIPE."""

SOME_FAILED = 1
"""The exit code for "some of the tasks could not be found or changed"."""


class OutputError(PgtaskError):
    """A failure to write to stdout. `code` is the exit code of the program."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def open_streams(*, needs_stdout: bool) -> None:
    """Open the standard streams that the caller has closed (`>&-`), for this process and for those that inherit them.

    Output to such a stream is dropped; a stdout that is needed fails when it is written to.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        mode = os.O_RDONLY if fd == 1 and needs_stdout else os.O_RDWR
        opened = os.open(os.devnull, mode)
        if opened != fd:
            os.dup2(opened, fd)
            os.close(opened)
        os.set_inheritable(fd, True)
        raw = io.FileIO(fd, "w" if fd else "r", closefd=False)
        buffered = io.BufferedWriter(raw) if fd else io.BufferedReader(raw)
        setattr(sys, name, io.TextIOWrapper(buffered, encoding="utf-8", errors="backslashreplace"))


def write_lines(lines: Iterable[str], *, end: str = "\n") -> None:
    """Write lines to stdout, all of them at once. Raises `OutputError`."""
    try:
        for line in lines:
            sys.stdout.write(line + end)
        sys.stdout.flush()
    except OSError as error:
        code = BROKEN_PIPE if error.errno == errno.EPIPE else CANNOT_WRITE
        raise OutputError(f"cannot write to stdout: {error.strerror}", code) from error


def json_line(fields: dict[str, Any]) -> str:
    """Return an object of JSON. A time that no datetime can hold is written as Postgres shows it."""
    return msgspec.json.encode(_encodable(fields)).decode()


def _encodable(value: Any) -> Any:
    if isinstance(value, FarTime):
        return str(value)
    if isinstance(value, dict):
        return {name: _encodable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_encodable(inner) for inner in value]
    return value


def note(message: str, *, program: str = "pgtask") -> None:
    """Write a line to stderr. A stderr that cannot be written to is no error."""
    with contextlib.suppress(OSError):
        print(f"{program}: {message}", file=sys.stderr, flush=True)


def note_failures(lines: Iterable[str]) -> int:
    """Write a note for each task or run that was not found or changed; return the exit code that says so."""
    for line in lines:
        note(line)
    return SOME_FAILED


def flush_streams() -> None:
    """Flush stdout and stderr at the end. Output that cannot be written is dropped, or Python would report it."""
    for stream in _streams():
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _streams() -> Sequence[io.TextIOBase]:
    return [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOBase)]
