"""The exporter as its supervisor holds it: the pages of the counters, and the child that serves them.

Invariants: the parent only forks it, and never waits for it; one that dies is replaced, over the same socket, after a
pause; it ends with the supervisor.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterable
from typing import Protocol

from pgtask._backoff import Backoff
from pgtask._log import EventLog
from pgtask._observe.pages import Pages, PageWriter
from pgtask._supervisor.fork import fork
from pgtask.config import Config

__all__ = ["Exporter", "RunExporter"]

log = EventLog("pgtask.supervisor")

INTERVAL = 1.0  # seconds between two signs of life of the supervisor, at most
MIN_PAUSE, MAX_PAUSE = 0.1, 30.0  # seconds until an exporter that has died is replaced
STEADY = 60.0  # seconds after which the next pause is a short one again


class RunExporter(Protocol):
    """The program of the exporter: serves at a socket what the file of the pages holds, until `parent_fd` reads EOF."""

    def __call__(self, config: Config, server: socket.socket, pages_fd: int, parent_fd: int) -> int: ...


class Exporter:
    """The exporter of one supervisor, which `run` is the program of. It serves at `server`, a socket that listens."""

    def __init__(self, config: Config, run: RunExporter, server: socket.socket) -> None:
        self._config = config
        self._run = run
        self._server = server
        self._pages = Pages(config.procs)
        self._pid: int | None = None
        self._fork_at, self._forked_at = 0.0, 0.0  # monotonic seconds
        self._pauses = Backoff(MIN_PAUSE, MAX_PAUSE)
        self._heard_at = 0.0

    @property
    def descriptors(self) -> list[int]:
        """The descriptors that no other child may hold."""
        return [self._server.fileno()]

    @property
    def next_at(self) -> float:
        """The time of the next `advance` (monotonic seconds)."""
        heard = self._heard_at + INTERVAL
        return min(heard, self._fork_at) if self._pid is None else heard

    def take_page(self) -> PageWriter:
        """Take a page for a worker that is about to be forked."""
        return self._pages.take()

    def advance(self, now: float, parent_fd: int, close: Callable[[], Iterable[int]], is_stopping: bool) -> None:
        """If it is time, show that the supervisor makes progress, and fork the exporter if there is none. The child
        closes the descriptors that `close` returns."""
        if now < self.next_at:
            return
        self._pages.hear(is_stopping=is_stopping)
        self._heard_at = now
        if self._pid is None and now >= self._fork_at:
            self._fork(now, parent_fd, close())

    def _fork(self, now: float, parent_fd: int, close: Iterable[int]) -> None:
        config, run, server, pages = self._config, self._run, self._server, self._pages.fd
        if now - self._forked_at > STEADY:
            self._pauses.reset()
        self._forked_at, self._fork_at = now, now + self._pauses.next()
        try:
            main = lambda: run(config, server, pages, parent_fd)  # noqa: E731
            kept = set(self.descriptors)
            self._pid = fork("pgtask exporter", main, close=[fd for fd in close if fd not in kept], stops=False)
        except OSError as error:
            log.warning("exporter.not_forked", error=error)

    def give_back(self, page: PageWriter) -> None:
        """Give back the page of a worker that has ended."""
        self._pages.give_back(page)

    def discard(self, pid: int, status: int) -> None:
        """Note that a process has ended, which may be the exporter."""
        if pid == self._pid:
            self._pid = None
            log.warning("exporter.died", pid=pid, exit=os.waitstatus_to_exitcode(status))

    def kill(self) -> None:
        """End the exporter."""
        if self._pid is not None:
            with contextlib.suppress(OSError):
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
            self._pid = None
        self._server.close()
