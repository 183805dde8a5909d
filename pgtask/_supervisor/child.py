"""A forked worker as the parent holds it, and what the child does before and after its work.

Invariants: `fork_child` returns in the parent only; the child never goes back into its caller's stack, and it
ends by `os._exit` with its logs flushed. It holds no descriptor of the parent or of a sibling, so the end of
the parent is seen by all. Whatever went wrong leaves as one line in `Gone` and an exit code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from select import PIPE_BUF
from typing import NoReturn, Protocol

import msgspec

from pgtask._events import log_event
from pgtask._supervisor.states import ExitCode
from pgtask._worker.status import Gone, Message, Ready, StatusPipe, Totals, decode_messages
from pgtask.app import App, load_app
from pgtask.config import Config
from pgtask.errors import AppLoadError, ConfigError, DatabaseRefused, PgtaskError

__all__ = ["Order", "Process", "RunWorker", "check_app", "combine", "fork_child"]

log = logging.getLogger("pgtask.supervisor")

# The parent's handlers end here. Until the worker has handlers of its own, an order to stop just kills it.
_RESET = (
    *(signal.SIGTERM, signal.SIGQUIT, signal.SIGCHLD),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU),
)
# A terminal sends these to the whole process group. What they mean is for the parent to decide.
_IGNORED = (signal.SIGINT, signal.SIGHUP)


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
    ) -> int: ...


class Order(msgspec.Struct, frozen=True):
    """What a new child is to be. `parent_fd` is the end of a pipe that reads EOF when the parent is gone."""

    number: int
    parent_fd: int
    counts_waiting: bool
    embedded: bool


class Process:
    """One process in the eyes of its parent, from the fork to `waitpid`: its pipe, and what it said on it.

    `ended` says that nothing more can come; `gone` is its last message.
    """

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid = pid
        self.pipe = pipe
        self.ended = False
        self.gone: Gone | None = None
        self.totals = Totals()
        self._buffer = bytearray()

    def read(self) -> list[Message]:
        """Take the messages that have come; never waits."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.pipe, 65536):
                self._buffer += chunk
            self.ended = True
        try:
            messages = decode_messages(self._buffer)
        except msgspec.DecodeError as error:  # user code wrote to a descriptor that is not its own
            log_event(log, logging.WARNING, "worker.garbled", pid=self.pid, error=error)
            return []
        for message in messages:
            if not isinstance(message, Ready):
                self.totals = combine(max, self.totals, message.totals)
            if isinstance(message, Gone):
                self.gone = message
        return messages


def combine(how: Callable[[int, int], int], one: Totals, other: Totals) -> Totals:
    """Field by field: the `max` of two reports of one process, the sum of two processes."""
    return Totals(*(how(getattr(one, name), getattr(other, name)) for name in Totals.__struct_fields__))


def fork_child(config: Config, work: RunWorker, order: Order, *, close: Iterable[int]) -> Process:
    """Fork a worker. The child closes the descriptors in `close`; the parent owns the process and its pipe.

    All signals are blocked across the fork: one that came between it and the child's own handlers would run
    the parent's in the child, or be lost. Raises OSError when there is no room for a process or a pipe.
    """
    reader, writer = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        _flush()  # or the child would write it a second time
        pid = os.fork()
        if pid == 0:
            _be_the_child(config, work, order, writer, mask, [*close, reader])
    except OSError:
        os.close(reader)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(writer)
    os.set_blocking(reader, False)
    return Process(pid, reader)


def check_app(reference: str) -> None:
    """Load the app in a process of its own, since the parent runs no user code. Raises `AppLoadError`."""
    reader, writer = os.pipe()
    _flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            _load(reference)
        except AppLoadError as error:
            os.write(writer, str(error).encode("utf-8", "replace")[:PIPE_BUF])
        finally:
            _exit(0)
    os.close(writer)
    with open(reader, "rb") as said:
        complaint = said.read().decode("utf-8", "replace")
    os.waitpid(pid, 0)
    if complaint:
        raise AppLoadError(complaint)


def _load(reference: str) -> App:
    directory = os.getcwd()
    if sys.path[:1] != [directory]:
        sys.path.insert(0, directory)
    return load_app(reference)


def _be_the_child(
    config: Config, work: RunWorker, order: Order, writer: int, mask: set[int], close: list[int]
) -> NoReturn:
    code: int = ExitCode.BOOT
    try:
        _leave_the_parent(order.number, mask, close)
        code = _boot_and_work(config, work, order, _Status(writer))
    except BaseException as error:
        log_event(log, logging.ERROR, "worker.failed", exc_info=error)
    finally:
        _exit(code)


def _leave_the_parent(number: int, mask: set[int], close: list[int]) -> None:
    """Undo what the fork copied. `random` has reseeded itself, and `logging` has made its locks anew."""
    signal.set_wakeup_fd(-1)
    for default in _RESET:
        signal.signal(default, signal.SIG_DFL)
    for ignored in _IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    for fd in close:
        os.close(fd)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask - set(_RESET))
    faulthandler.enable(2)
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as name:  # Linux: for ps and top
        name.write(f"pgtask w{number}")


def _boot_and_work(config: Config, work: RunWorker, order: Order, status: _Status) -> int:
    try:
        if config.app is None:
            raise ConfigError("no app was given")
        app = _load(config.app)
        return work(
            config,
            app,
            status=status,
            parent_fd=order.parent_fd,
            counts_waiting=order.counts_waiting,
            embedded=order.embedded,
        )
    except AppLoadError as error:
        return _fail(status, ExitCode.APP, str(error), error)
    except DatabaseRefused as error:
        return _fail(status, ExitCode.DATABASE, str(error), error)
    except PgtaskError as error:
        return _fail(status, ExitCode.BOOT, str(error), error)
    except BaseException as error:
        return _fail(status, ExitCode.BOOT, f"{type(error).__name__}: {error}", error, expected=False)


class _Status(StatusPipe):
    """Remembers whether the worker was ever ready, since what goes wrong later is no boot failure; and whether it has
    said why it leaves."""

    was_ready = False
    was_gone = False

    def send(self, message: Message) -> None:
        self.was_ready = self.was_ready or isinstance(message, Ready)
        self.was_gone = self.was_gone or isinstance(message, Gone)
        super().send(message)


def _fail(status: _Status, code: ExitCode, text: str, error: BaseException, *, expected: bool = True) -> int:
    """Tell the parent, which prints the line once for all children. The traceback is for whoever debugs."""
    surprise = status.was_ready and not expected
    log_event(log, logging.ERROR if surprise else logging.DEBUG, "worker.failed", exc_info=error)
    if not status.was_gone:
        status.send(Gone(reason="failed", message=" ".join(text.split())))
    return code


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _exit(code: int) -> NoReturn:
    """End the process, but not the interpreter: that would wait for threads and run the parent's atexit."""
    try:
        logging.shutdown()
        _flush()
    finally:
        os._exit(code)
