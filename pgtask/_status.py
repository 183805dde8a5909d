"""The wire between a worker and its supervisor: what a worker starts with, the lines it sends, and its exit code.

A message is one line of JSON on a pipe. The supervisor asks for stacks by the signal `DUMP`; faulthandler writes them
to the same pipe as plain lines, because it needs a descriptor that is open already.

Invariants: totals count from the start of this process and only grow; `Ready` comes once; the last message is
`ExitNotice`, unless the process was killed. Imports nothing of the worker or the supervisor.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import signal
from collections.abc import Callable
from typing import Literal

import msgspec

from pgtask._fastpath import CounterPage, Marks

__all__ = [
    "DUMP",
    "MAX_PARKED",
    "ExitCode",
    "ExitNotice",
    "LoadedTasks",
    "Message",
    "Ready",
    "Reason",
    "SourceDirectory",
    "Stack",
    "StatusPipe",
    "StopNotice",
    "Tick",
    "Totals",
    "WorkerSpec",
    "decode_messages",
    "fit_message",
    "session_name",
]

MAX_MESSAGE = 800  # characters
MAX_BYTES = 3072  # of a message as JSON, where a control character takes six: leaves space in PIPE_BUF for the rest
MAX_PARKED = 100_000
"""The end of a burst counts at most so many parked tasks."""

DUMP = signal.SIGUSR2
"""Makes a worker write the stacks of its threads, also while its loop is blocked."""

Reason = Literal["drained", "notified", "burst"]
"""Why a worker leaves in order: a signal or the end of its parent told it to; `stop_worker` arrived; a burst has no
more work."""


class ExitCode(enum.IntEnum):
    """The exit codes of a worker, which its supervisor reads, and of the supervisor, which its caller reads."""

    OK = 0
    PARKED = 1  # a burst finished, but some task is parked with an error
    USAGE = 2
    BOOT = 3
    APP = 4
    DATABASE = 5
    # A burst that was stopped before its end, as a shell reports it: 128 and the number of the signal. Ctrl-C before
    # the first worker is INTERRUPTED as well.
    HUNG_UP = 129
    INTERRUPTED = 130
    QUIT = 131
    TERMINATED = 143


class WorkerSpec(msgspec.Struct, frozen=True):
    """All that a new worker starts with, beside its `Config`. The parent draws it before the fork.

    All tokens of the worker's leases begin with the eight bytes `worker`; `marks`, in shared memory, hold the tasks
    that it executes. `parent_fd` reads EOF when the parent is gone. The worker sends its messages to `status_fd`, and
    a crash leaves its stacks in `crash_fd`. `cpu` is the one CPU to run on, if any. `page` is for its counters, if
    there are metrics.
    """

    number: int
    worker: bytes
    marks: Marks
    parent_fd: int
    status_fd: int
    crash_fd: int
    counts_waiting: bool
    embedded: bool
    cpu: int | None = None
    page: CounterPage | None = None


class Totals(msgspec.Struct, frozen=True):
    """Counts of one worker: tasks finished, steps run, failed tries (undecodable rows included), tasks parked, leases
    lost, and times that a task was put back because the app lacks its step."""

    done: int = 0
    steps: int = 0
    errors: int = 0
    parked: int = 0
    lost: int = 0
    put_back: int = 0

    @property
    def settled(self) -> int:
        """The tasks that a burst need not run any more."""
        return self.done + self.parked


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The app is loaded, the schema is right, the connections are open: the worker takes tasks."""


class Tick(msgspec.Struct, frozen=True, tag="tick"):
    """A sign of life from the worker's loop: about twice a second, every two seconds while nothing changes.

    `waiting` is the number of tasks that were due when a burst began; one worker counts it, if told to. `unavailable`
    is the error of a database that this worker waits for.
    """

    totals: Totals
    waiting: int | None = None
    unavailable: str | None = None


class StopNotice(msgspec.Struct, frozen=True, tag="notified"):
    """`stop_worker` arrived: the worker drains, and so must all others of its supervisor."""


class ExitNotice(msgspec.Struct, frozen=True, tag="gone"):
    """The worker leaves by itself, for `reason`. `message` is the one line for a person when it failed.

    "failed" comes with the exit code of the process. A worker that leaves in order, but whose lifespan then fails,
    sends its reason to leave with the message, and exits with the code of a worker that could not start.

    `parked_left`: the tasks of this app that a burst has left parked, `MAX_PARKED` for so many or more;
    `parked_others`: the same of other apps. `paused`: what people have paused, as "queue reports". `held`: leases that
    it could not release, of steps that ignored their cancellation.
    """

    reason: Reason | Literal["failed"]
    totals: Totals = Totals()
    parked_left: int = 0
    message: str | None = None
    held: int = 0
    parked_others: int = 0
    paused: tuple[str, ...] = ()


class SourceDirectory(msgspec.Struct, frozen=True, tag="sources"):
    """A directory of the app's code, also if the code could not be loaded."""

    directory: str


class LoadedTasks(msgspec.Struct, frozen=True, tag="loaded"):
    """The app was imported; the names of its tasks and workflows, separated by commas."""

    tasks: str


class Stack(msgspec.Struct, frozen=True):
    """The stacks of all threads. Not sent as JSON: faulthandler writes them while the process cannot."""

    text: str


Message = Ready | Tick | StopNotice | ExitNotice | SourceDirectory | LoadedTasks
_decoder = msgspec.json.Decoder(Message)
# The last alternative is faulthandler's mark for too many threads.
_STACK_LINE = re.compile(rb"(?:Current thread|Thread) 0x|  |\.\.\.$")


def session_name(pid: int, worker: bytes) -> str:
    """Return the `application_name` of the connection that claims.

    It is unique, also among workers with the same pid on other hosts, so that a reaper can wait for the session's end.
    """
    return f"pgtask worker {pid} {worker.hex()}"


def fit_message(text: str) -> str:
    """Return `text` as one line that fits the pipe in one write, and that JSON can encode."""
    line = " ".join(text.split())[:MAX_MESSAGE].encode("utf-8", "backslashreplace").decode()
    while len(msgspec.json.encode(line)) > MAX_BYTES:
        line = line[: len(line) * 3 // 4]
    return line


class StatusPipe:
    """The worker's end of the pipe. Never blocks and never fails.

    It drops a message that does not fit, since the totals of a later one include it, and any message to a parent that
    is gone.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd

    def send(self, message: Message) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, msgspec.json.encode(message) + b"\n")


def decode_messages(buffer: bytearray, report: Callable[[msgspec.DecodeError], None]) -> list[Message | Stack]:
    """Take the complete lines out of `buffer` and return them decoded; an incomplete line stays.

    Lines of stacks become one `Stack`, which comes first. `report` receives the error of each line that is no message.
    """
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
            report(error)
    return [Stack(_oldest_first(stack)), *messages] if stack else messages


def _oldest_first(lines: list[str]) -> str:
    """Put the thread of the loop first: faulthandler begins with the youngest thread, and marks as current the one
    that took the signal."""
    threads: list[list[str]] = []
    for line in lines:
        if not threads or not line.startswith("  "):
            threads.append([])
        threads[-1].append(line)
    threads.reverse()
    threads.sort(key=lambda thread: thread[0] == "...")
    return "\n".join(line for thread in threads for line in thread)
