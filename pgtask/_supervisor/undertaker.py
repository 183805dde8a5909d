"""The undertaker: a short-lived child that gives back the leases of dead workers at once, and charges what they ran.

Invariants: the parent only forks it, and reaps it like any child; it has one connection, never claims, and ends with
the leases it is after, with the parent, or when a lease timeout has passed, whichever comes first, but not by an order
to stop that a whole group is sent. All it writes is fenced by the tokens of the dead, so that it is harmless however
late it comes; what it does not get to, runs out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterable, Sequence
from uuid import UUID

import msgspec

from pgtask._events import log_event
from pgtask._postgres.store import Link
from pgtask._supervisor.child import Process
from pgtask._supervisor.fork import fork
from pgtask._worker.error_text import sanitise
from pgtask._worker.status import session_name
from pgtask.config import Config
from pgtask.errors import DatabaseRefused

__all__ = ["Estate", "Undertakers"]

log = logging.getLogger("pgtask.handover")

SPARE = 8  # undertakers at work beyond two for each worker: who waits for a row that is locked stops no later handover
AGAIN = 0.02  # seconds until a row that is locked, or a session that is still there, is looked at again
LONGEST_PAUSE = 1.0
MOST_NAMED = 20  # suspects in the log; one crash makes no more than were executing


class Estate(msgspec.Struct, frozen=True):
    """What a dead worker leaves: the first half of its tokens, the tasks that shall be charged with its death, if it
    still held them, and of what it died."""

    worker: bytes
    pid: int
    charged: Sequence[bytes]
    cause: str


class Undertakers:
    """The parent's side: the estates that nobody sees to yet, and the processes that see to the others."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._estates: list[Estate] = []
        self._pids: set[int] = set()

    @property
    def at_work(self) -> bool:
        return bool(self._pids)

    def inherit(self, process: Process, cause: str, *, charged: bool) -> None:
        """Remember what a dead process held, and the `cause` of its death. Unless it is `charged`, no task is guilty:
        it was our kill, since a stop took too long."""
        charges = process.marks.charged() if charged else []
        self._estates.append(Estate(process.worker, process.pid, charges, cause))

    def send(self, parent_fd: int, *, close: Iterable[int]) -> None:
        """Fork an undertaker if there is something for it to do; it leaves when `parent_fd` reads EOF."""
        config, estates = self._config, self._estates
        if not estates or len(self._pids) >= 2 * config.procs + SPARE or config.dsn is None:
            return
        try:
            pid = fork("pgtask buries", lambda: _bury(config, estates, parent_fd), close=close, stops=False)
        except OSError as error:  # again after the next death; else the leases run out
            log_event(log, logging.WARNING, "undertaker.not_forked", error=error)
            return
        self._pids.add(pid)
        self._estates = []

    def reaped(self, pid: int) -> None:
        self._pids.discard(pid)

    def kill(self) -> None:
        """Those that are still at work: what they have not given back runs out."""
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pids.clear()


def _bury(config: Config, estates: Sequence[Estate], parent_fd: int) -> int:
    # The loop is not closed: that would wait for a thread which looks up the address of a database that is away.
    return asyncio.new_event_loop().run_until_complete(_hand_over_all(config, estates, parent_fd))


async def _hand_over_all(config: Config, estates: Sequence[Estate], parent_fd: int) -> int:
    assert config.dsn is not None
    link = Link(config.dsn, "pgtask undertaker", pooled=not config.listen)
    try:
        async with asyncio.timeout(config.lease_timeout) as patience:
            _leave_with_parent(parent_fd, patience)
            await _in_turn([_Handover(link, estate) for estate in estates])
            await link.close()
    except (TimeoutError, DatabaseRefused) as error:
        hint = f"the leases end within {config.lease_timeout:g} s, then others run those tasks"
        log_event(log, logging.WARNING, "handover.failed", error=str(error) or type(error).__name__, hint=hint)
        return 1
    return 0


def _leave_with_parent(parent_fd: int, patience: asyncio.Timeout) -> None:
    loop = asyncio.get_running_loop()

    def leave() -> None:
        loop.remove_reader(parent_fd)
        patience.reschedule(0.0)

    loop.add_reader(parent_fd, leave)


async def _in_turn(handovers: list[_Handover]) -> None:
    """A statement for each, until all are over: one that has to wait for a row does not hold up the others."""
    began = time.monotonic()
    while handovers := [handover for handover in handovers if not await handover.is_over()]:  # noqa: ASYNC110
        await asyncio.sleep(min(max(AGAIN, (time.monotonic() - began) / 4), LONGEST_PAUSE))


class _Handover:
    """The handover of one estate, a statement at a time."""

    def __init__(self, link: Link, estate: Estate) -> None:
        self._link = link
        self._estate = estate
        self._session_seen = True
        self._released = 0
        self._suspects: list[UUID] = []
        self._parked: list[UUID] = []

    async def is_over(self) -> bool:
        """Give back what can be given back now; whether nothing is left or can come."""
        estate = self._estate
        ((left, session_seen, released, suspects, parked, _),) = await self._link.run(
            "handover",
            *(UUID(bytes=estate.worker + bytes(8)), UUID(bytes=estate.worker + b"\xff" * 8)),
            [UUID(bytes=task) for task in estate.charged],
            len(estate.charged) == 1,
            sanitise(estate.cause),
            session_name(estate.pid, estate.worker),
        )
        self._released += released
        self._suspects += suspects
        self._parked += parked
        was_seen, self._session_seen = self._session_seen, session_seen
        if left or was_seen:  # what it had committed before it went, a statement from before its end does not see
            return False
        self._say()
        return True

    def _say(self) -> None:
        """Who is charged, and then that it is over."""
        cause = self._estate.cause.partition("\n")[0]
        for task in self._suspects[:MOST_NAMED]:
            log_event(log, logging.WARNING, "task.suspect", task=task, cause=cause)
        for task in self._parked:
            log_event(log, logging.WARNING, "task.parked", task=task, cause=cause)
        executing = len(self._suspects) + len(self._parked)
        tasks = self._released + executing
        log_event(log, logging.INFO, "leases.released", pid=self._estate.pid, tasks=tasks, executing=executing)
