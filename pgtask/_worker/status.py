"""What a worker tells its supervisor: one JSON line per message, over a pipe.

Invariants: totals count from the start of this process and only grow; `Ready` comes once; the last
message is `Gone`, unless the process was killed. The stacks that faulthandler writes on demand come the same way, as
they are: it needs a descriptor that is open already, and writes from the thread that sends the messages.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from typing import Literal

import msgspec

__all__ = [
    *(
        "MOST_PARKED",
        "Gone",
        "Message",
        "Notified",
        "Ready",
        "Reason",
        "Sources",
        "Stack",
        "StatusPipe",
        "Tick",
        "Totals",
        "as_message",
        "decode_messages",
        "session_name",
    ),
]

MOST_MESSAGE = 800  # characters
MOST_BYTES = 3072  # of it as JSON, where a control character takes six: leaves room in PIPE_BUF for the rest
Reason = Literal["drained", "notified", "burst"]
"""Why a worker leaves in order: it was told to, by a signal or the end of its parent; `stop_worker` came; nothing is
left to do."""
MOST_PARKED = 1000
"""No more parked tasks are counted at the end of a burst."""


class Totals(msgspec.Struct, frozen=True):
    """Tasks finished, steps run, failed tries (rows that cannot be decoded among them), tasks parked, leases lost, and
    how often a task was put back because the app lacks its step."""

    done: int = 0
    steps: int = 0
    errors: int = 0
    parked: int = 0
    lost: int = 0
    put_back: int = 0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The app is loaded, the schema is right, the connections are open: the worker takes tasks."""


class Tick(msgspec.Struct, frozen=True, tag="tick"):
    """Sent from the worker's loop about twice a second, every two seconds while nothing changes: it also says that the
    loop is alive.

    `waiting` is how many tasks were due when a burst began; only one worker counts it, and only when asked to.
    """

    totals: Totals
    waiting: int | None = None


class Notified(msgspec.Struct, frozen=True, tag="notified"):
    """`stop_worker` came: the worker drains, and all of its supervisor are to."""


class Gone(msgspec.Struct, frozen=True, tag="gone"):
    """The worker leaves by itself, and why. `message` is the one line for a person when it failed.

    failed: with the exit code of the process. One that leaves in order, but whose lifespan then fails, says the reason
    for which it leaves, with the message, and exits with the code of a worker that could not start.

    `parked_left`: how many tasks with an error a burst has left in the table, 1,000 for so many or more. `held`: leases
    that it could not give back, of steps that did not end when they were told to.
    """

    reason: Reason | Literal["failed"]
    totals: Totals = Totals()
    parked_left: int = 0
    message: str | None = None
    held: int = 0


class Sources(msgspec.Struct, frozen=True, tag="sources"):
    """A directory that code of the app was loaded from, or was to be."""

    directory: str


class Stack(msgspec.Struct, frozen=True):
    """Lines of what every thread is doing. Not sent as JSON: faulthandler writes it while the process cannot."""

    text: str


Message = Ready | Tick | Notified | Gone | Sources
_decoder = msgspec.json.Decoder(Message)
_STACK_LINE = re.compile(rb"(?:Current thread|Thread) 0x|  |\.\.\.$")  # the last, where there are too many threads


def session_name(pid: int, worker: bytes) -> str:
    """The `application_name` of the connection that claims. No other has it, not even a worker with the same pid on
    another host: so its end can be waited for."""
    return f"pgtask worker {pid} {worker.hex()}"


def as_message(text: str) -> str:
    """One line that fits the pipe whole, and that JSON can say, whatever an exception has put into it."""
    line = " ".join(text.split())[:MOST_MESSAGE].encode("utf-8", "backslashreplace").decode()
    while len(msgspec.json.encode(line)) > MOST_BYTES:
        line = line[: len(line) * 3 // 4]
    return line


class StatusPipe:
    """The worker's end of the pipe. Never blocks and never fails: a message that does not fit is dropped, since the
    totals of a later one include it, and a parent that is gone needs none."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd

    def send(self, message: Message) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, msgspec.json.encode(message) + b"\n")


def decode_messages(buffer: bytearray, garbled: Callable[[msgspec.DecodeError], None]) -> list[Message | Stack]:
    """Take the complete lines out of `buffer` and return them decoded; a begun line stays. Stacks are joined to one,
    which comes first. A line that is none of ours is skipped, after a call of `garbled`."""
    *lines, rest = bytes(buffer).split(b"\n")
    buffer[:] = rest
    stack: list[str] = []
    messages: list[Message | Stack] = []
    for line in filter(None, lines):
        if _STACK_LINE.match(line):
            stack.append(line.decode(errors="replace"))
            continue
        try:
            messages.append(_decoder.decode(line))
        except msgspec.DecodeError as error:
            garbled(error)
    return [Stack(_oldest_first(stack)), *messages] if stack else messages


def _oldest_first(lines: list[str]) -> str:
    """The thread that has the loop before the others: faulthandler begins with the youngest, and calls that the current
    one which took the signal."""
    threads: list[list[str]] = []
    for line in lines:
        if not threads or not line.startswith("  "):
            threads.append([])
        threads[-1].append(line)
    threads.reverse()
    threads.sort(key=lambda thread: thread[0] == "...")
    return "\n".join(line for thread in threads for line in thread)
