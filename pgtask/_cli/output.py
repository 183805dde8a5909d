"""Where the commands write: what was asked for to stdout, what is said beside it to stderr.

Invariants: what cannot be written is an error of one line, never a traceback; no descriptor that was closed for us is
given to a socket, on which the output would then end.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterable, Sequence

from pgtask.errors import PgtaskError

__all__ = ["BROKEN_PIPE", "CANNOT_WRITE", "OutputError", "let_go", "open_streams", "say", "show"]

CANNOT_WRITE, BROKEN_PIPE = 74, 141
"""Exit codes: as sysexits names it, and as a shell reports a death of SIGPIPE."""


class OutputError(PgtaskError):
    """What was to be written could not be. `code` is the exit code that says so."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def open_streams(*, needs_stdout: bool) -> None:
    """Open what the caller has closed (`>&-`), for us and for whoever inherits it.

    What is written there is dropped; to a stdout that is needed it cannot be written.
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


def show(lines: Iterable[str], *, end: str = "\n") -> None:
    """Write lines to stdout, all of them at once. Raises `OutputError`."""
    try:
        for line in lines:
            sys.stdout.write(line + end)
        sys.stdout.flush()
    except OSError as error:
        code = BROKEN_PIPE if error.errno == errno.EPIPE else CANNOT_WRITE
        raise OutputError(f"cannot write to stdout: {error.strerror}", code) from error


def say(message: str, *, program: str = "pgtask") -> None:
    """A line to the person, beside the output. There may be nobody to read it."""
    with contextlib.suppress(OSError):
        print(f"{program}: {message}", file=sys.stderr, flush=True)


def let_go() -> None:
    """At the end: what a stream still holds and cannot get rid of is dropped, or Python would complain of it."""
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
