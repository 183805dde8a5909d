"""A forked worker as its parent holds it: from the fork to `waitpid`, its pipe and its messages.

Invariants: a child holds no descriptor of the parent or of a sibling, so all children see the end of the parent.
Each failure of a child leaves as one line in `ExitNotice` and an exit code.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec

from pgtask._fastpath import CounterPage, Marks
from pgtask._log import EventLog
from pgtask._status import ExitNotice, Message, Ready, Stack, Tick, Totals, WorkerSpec, decode_messages
from pgtask._supervisor.death import Death
from pgtask._supervisor.fork import fork, plain_handlers
from pgtask._supervisor.states import Slot, classify_exit
from pgtask.config import Config

__all__ = ["ChildProcess", "StartWorker", "combine_totals", "fork_child"]

log = EventLog("pgtask.supervisor")

# The signals that faulthandler writes stacks for.
CRASHES = (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)
MAX_STACK = 4096  # characters of the stacks of a crash
MAX_STACKS = 64 * 1024
DUMP_WAIT, MAX_DUMP_WAITS = 20, 100  # milliseconds for the next line of a dump, and the number of such waits
NO_EXEC = 0x8  # MFD_NOEXEC_SEAL of Linux 6.3: without it a hardened kernel refuses the file


BATCHED = 40_000  # steps in batches that one worker runs at once: a megabyte, of which only what is used takes memory


class StartWorker(Protocol):
    """A worker's program: runs in the child, and returns the exit code of the process.

    `plain` maps signals to the handlers of a plain Python program, for processes that user code forks.
    """

    def __call__(self, config: Config, spec: WorkerSpec, plain: Mapping[signal.Signals, Any]) -> int: ...


class ChildProcess:
    """One process of a worker, from the fork to `collect`.

    `worker`, `marks` and the crash file exist before the fork, so that they are known of a process that sends nothing.
    `ended`: the pipe is at its end. `was_ready`: the process may hold leases. `notice` is its last message.
    """

    def __init__(self, concurrency: int) -> None:
        self.pid = 0
        self.started = time.monotonic()
        self.worker = os.urandom(8)
        self.marks = Marks(mmap.mmap(-1, Marks.size(2 * concurrency + BATCHED)))
        self.crash = _open_crash_file()
        try:
            self.pipe, self.writer = os.pipe()
        except OSError:
            self.crash.close()
            raise
        self.ended = False
        self.was_ready = False
        self.was_killed = False
        """By us, since it did not stop in time."""
        self.notice: ExitNotice | None = None
        self.dump = ""
        """The last stacks that it wrote on demand."""
        self.totals = Totals()
        self._buffer = bytearray()

    def read_messages(self) -> list[Message | Stack]:
        """Return the messages that have arrived. Waits for nothing but the rest of stacks that are being written."""
        self._fill_buffer()
        more = select.poll()
        more.register(self.pipe, select.POLLIN)
        for _ in range(MAX_DUMP_WAITS):
            if self.ended or b" 0x" not in self._buffer or not more.poll(DUMP_WAIT):
                break
            self._fill_buffer()
        messages = decode_messages(self._buffer, self._report_bad_message)
        for message in messages:
            if isinstance(message, Stack):
                self.dump = message.text[:MAX_STACK]
            if isinstance(message, Tick | ExitNotice):
                self.totals = combine_totals(max, self.totals, message.totals)
            if isinstance(message, ExitNotice):
                self.notice = message
            self.was_ready |= isinstance(message, Ready)
        return messages

    def kill(self) -> None:
        self.was_killed = True
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        """Cannot hit a stranger: the kernel does not reuse the pid of a child before we reap it."""
        os.kill(self.pid, number)

    def collect(self, status: int, slot: Slot) -> Death:
        """Return the end of this process, after `waitpid` gave its status, and close what we hold of it."""
        code = os.waitstatus_to_exitcode(status)
        death = Death(
            pid=self.pid,
            worker=self.worker,
            slot=slot,
            event=classify_exit(slot.state, code, self.notice.reason if self.notice else None),
            code=code,
            notice=self.notice,
            stacks=self._crash_stacks() if -code in CRASHES else "",
            dump=self.dump,
            was_ready=self.was_ready,
            was_killed=self.was_killed,
            totals=self.totals,
            executing=self.marks.implicated(),
            held=self.marks.held(),
        )
        self.close()
        return death

    def close(self) -> None:
        os.close(self.pipe)
        self.crash.close()

    def _crash_stacks(self) -> str:
        """Return the text of faulthandler with the thread that crashed first; it begins with the youngest."""
        self.crash.seek(0)
        parts = self.crash.read(MAX_STACKS).decode(errors="replace").split("\n\n")
        parts[1:] = sorted(parts[1:], key=lambda part: not part.startswith("Current thread"))
        return "\n\n".join(parts)[:MAX_STACK]

    def _report_bad_message(self, error: msgspec.DecodeError) -> None:
        """User code wrote to a descriptor that is not its own."""
        log.warning("worker.bad_message", pid=self.pid, error=error)

    def _fill_buffer(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.pipe, 65536):
                self._buffer += chunk
            self.ended = True


def _open_crash_file() -> Any:
    """Open a file in memory where the system can, since a read-only file system has no place for one."""
    for flags in (NO_EXEC, 0):
        with contextlib.suppress(OSError, AttributeError):
            return open(os.memfd_create("pgtask crash", os.MFD_CLOEXEC | flags), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def combine_totals(combine: Callable[[int, int], int], one: Totals, other: Totals) -> Totals:
    """Combine field by field: by `max` two reports of one process, by addition two processes."""
    return Totals(*(combine(getattr(one, name), getattr(other, name)) for name in Totals.__struct_fields__))


def fork_child(
    config: Config,
    start: StartWorker,
    number: int,
    *,
    parent_fd: int,
    counts_waiting: bool,
    embedded: bool,
    cpu: int | None,
    page: CounterPage | None = None,
    close: Iterable[int],
) -> ChildProcess:
    """Fork a worker. The child closes the descriptors in `close`; the parent owns the process and its pipe.

    See `WorkerSpec` for the others. Raises OSError if the system has no process, pipe or file to spare.
    """
    process = ChildProcess(config.concurrency)
    spec = WorkerSpec(
        number=number,
        worker=process.worker,
        marks=process.marks,
        parent_fd=parent_fd,
        status_fd=process.writer,
        crash_fd=process.crash.fileno(),
        counts_waiting=counts_waiting,
        embedded=embedded,
        cpu=cpu,
        page=page,
    )
    try:
        process.pid = fork(
            f"pgtask w{number}", lambda: start(config, spec, plain_handlers()), close=[*close, process.pipe]
        )
    except OSError:
        process.close()
        raise
    finally:
        os.close(process.writer)
    os.set_blocking(process.pipe, False)
    return process
