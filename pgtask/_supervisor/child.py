"""A forked worker as the parent holds it, and what the child does before and after its work.

Invariants: the child holds no descriptor of the parent or of a sibling, so the end of the parent is seen by all.
Whatever went wrong leaves as one line in `Gone` and an exit code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import mmap
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from pgtask._events import log_event
from pgtask._fastpath import Marks
from pgtask._supervisor.fork import fork
from pgtask._supervisor.source import directories, import_app
from pgtask._supervisor.states import ExitCode
from pgtask._worker.orphan import end_with_parent
from pgtask._worker.status import (
    Gone,
    Message,
    Ready,
    Sources,
    Stack,
    StatusPipe,
    Tick,
    Totals,
    as_message,
    decode_messages,
)
from pgtask._worker.suspects import MOST_HELD
from pgtask.app import App
from pgtask.config import Config
from pgtask.errors import AppLoadError, DatabaseRefused, PgtaskError

__all__ = ["DUMP", "Order", "Process", "RunWorker", "combine", "fork_child"]

log = logging.getLogger("pgtask.supervisor")

CRASHES = (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)  # of which faulthandler tells
MOST_STACK = 4096  # characters of the stacks of a crash
MOST_STACKS = 64 * 1024

DUMP = signal.SIGUSR2
"""Makes a worker write what its threads are doing, however busy it is."""
DUMP_TAKES, DUMP_LINES = 20, 100  # milliseconds between two of its lines, and how often those are waited for


class RunWorker(Protocol):
    """The worker: works until it has a reason to leave, and returns the exit code of its process."""

    def __call__(
        self,
        config: Config,
        app: App,
        *,
        status: StatusPipe,
        parent_fd: int,
        counts_waiting: bool,
        embedded: bool,
        worker: bytes,
        marks: Marks,
    ) -> int: ...


class Order(msgspec.Struct, frozen=True):
    """What a new child is to be. `parent_fd` is the end of a pipe that reads EOF when the parent is gone."""

    number: int
    parent_fd: int
    counts_waiting: bool
    embedded: bool
    cpu: int | None = None
    """The one CPU to run on."""


class Process:
    """One process in the eyes of its parent, from the fork to `waitpid`: its pipe, and what it said on it.

    `ended` says that nothing more can come; `was_ready` that it may hold leases; `gone` is its last message. The rest
    is drawn before the fork, so that it can be known of a process that says nothing: its `worker`, with which all
    tokens of its leases begin; its `marks`, in shared memory; and the file in which a crash leaves its stacks.
    """

    def __init__(self, concurrency: int) -> None:
        self.pid = 0
        self.started = time.monotonic()
        self.worker = os.urandom(8)
        self.marks = Marks(mmap.mmap(-1, Marks.size(concurrency + MOST_HELD)))
        self.crash = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - `close` closes it
        try:
            self.pipe, self.writer = os.pipe()
        except OSError:
            self.crash.close()
            raise
        self.ended = False
        self.was_ready = False
        self.gone: Gone | None = None
        self.stack = ""
        """The last stacks that it wrote on demand."""
        self.totals = Totals()
        self._buffer = bytearray()

    def last_stacks(self, code: int) -> str:
        """What faulthandler wrote when the process ended with `code`; empty if that was no crash. The thread that
        caused it comes first; faulthandler begins with the youngest."""
        if -code not in CRASHES:
            return ""
        self.crash.seek(0)
        parts = self.crash.read(MOST_STACKS).decode(errors="replace").split("\n\n")
        parts[1:] = sorted(parts[1:], key=lambda part: not part.startswith("Current thread"))
        return "\n\n".join(parts)[:MOST_STACK]

    def close(self) -> None:
        os.close(self.pipe)
        self.crash.close()

    def read(self) -> list[Message | Stack]:
        """Take the messages that have come; waits for nothing but the rest of a stack that is being written."""
        self._take()
        more = select.poll()
        more.register(self.pipe, select.POLLIN)
        for _ in range(DUMP_LINES):
            if self.ended or b" 0x" not in self._buffer or not more.poll(DUMP_TAKES):
                break
            self._take()
        messages = decode_messages(self._buffer, self._say_garbled)
        for message in messages:
            if isinstance(message, Stack):
                self.stack = message.text[:MOST_STACK]
            if isinstance(message, Tick | Gone):
                self.totals = combine(max, self.totals, message.totals)
            if isinstance(message, Gone):
                self.gone = message
            self.was_ready |= isinstance(message, Ready)
        return messages

    def _say_garbled(self, error: msgspec.DecodeError) -> None:
        """User code wrote to a descriptor that is not its own."""
        log_event(log, logging.WARNING, "worker.garbled", pid=self.pid, error=error)

    def _take(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.pipe, 65536):
                self._buffer += chunk
            self.ended = True


def combine(how: Callable[[int, int], int], one: Totals, other: Totals) -> Totals:
    """Field by field: the `max` of two reports of one process, the sum of two processes."""
    return Totals(*(how(getattr(one, name), getattr(other, name)) for name in Totals.__struct_fields__))


def fork_child(config: Config, work: RunWorker, order: Order, *, close: Iterable[int]) -> Process:
    """Fork a worker. The child closes the descriptors in `close`; the parent owns the process and its pipe.

    Raises OSError when there is no room for a process, a pipe or a file.
    """
    process = Process(config.concurrency)

    def main() -> int:
        faulthandler.enable(process.crash.fileno())
        faulthandler.register(DUMP, process.writer, chain=False)
        os.register_at_fork(after_in_child=_be_no_worker)
        end_with_parent(order.parent_fd)
        _pin(order)
        return _boot_and_work(config, work, order, process)

    try:
        process.pid = fork(f"pgtask w{order.number}", main, close=[*close, process.pipe])
    except OSError:
        process.close()
        raise
    finally:
        os.close(process.writer)
    os.set_blocking(process.pipe, False)
    return process


def _be_no_worker() -> None:
    """In a process that user code has forked: its stacks are not those of the worker."""
    faulthandler.disable()
    faulthandler.unregister(DUMP)


def _pin(order: Order) -> None:
    if order.cpu is not None:
        try:
            os.sched_setaffinity(0, {order.cpu})
        except OSError as error:  # it was taken from us since the start
            log_event(log, logging.WARNING, "worker.not_pinned", worker=order.number, cpu=order.cpu, error=error)


def _boot_and_work(config: Config, work: RunWorker, order: Order, process: Process) -> int:
    status = _Status(process.writer)
    try:
        app = _import(config, status)
        return work(
            config,
            app,
            status=status,
            parent_fd=order.parent_fd,
            counts_waiting=order.counts_waiting,
            embedded=order.embedded,
            worker=process.worker,
            marks=process.marks,
        )
    except AppLoadError as error:
        return _fail(status, ExitCode.APP, str(error), error)
    except DatabaseRefused as error:
        return _fail(status, ExitCode.DATABASE, str(error), error)
    except PgtaskError as error:
        return _fail(status, ExitCode.BOOT, str(error), error)
    except BaseException as error:
        return _fail(status, ExitCode.BOOT, f"{type(error).__name__}: {error}", error, expected=False)


def _import(config: Config, status: _Status) -> App:
    """With `--reload`, say where the code is, also if it cannot be loaded: the next try may come soon."""
    if not config.reload:
        return import_app(config.app)
    sys.dont_write_bytecode = True  # it is found stale by a time in seconds: too coarse for a quick second change
    try:
        return import_app(config.app)
    finally:
        for directory in directories():
            status.send(Sources(directory))


class _Status(StatusPipe):
    """Remembers whether the worker was ever ready, since what goes wrong later is no boot failure; and whether it has
    said why it leaves."""

    was_ready = False
    was_gone = False

    def send(self, message: Message) -> None:
        self.was_ready = self.was_ready or isinstance(message, Ready)
        super().send(message)
        self.was_gone = self.was_gone or isinstance(message, Gone)


def _fail(status: _Status, code: ExitCode, text: str, error: BaseException, *, expected: bool = True) -> int:
    """Tell the parent, which prints the line once for all children. The traceback is for whoever debugs."""
    surprise = status.was_ready and not expected
    log_event(log, logging.ERROR if surprise else logging.DEBUG, "worker.failed", exc_info=error)
    if not status.was_gone:
        status.send(Gone(reason="failed", message=as_message(text)))
    return code
