"""The reaper: a short-lived child that releases the leases of dead workers, and counts a death against their tasks.

Invariants: the parent only forks it, and reaps it like any child. It has one connection and never claims. It ends when
the orphaned leases are released, with the parent, or after a lease timeout, whichever comes first; a signal to stop
that the whole process group gets does not end it. The tokens of the dead workers fence all its writes, so a late write
is harmless; a lease that it does not reach expires.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterable, Sequence
from uuid import UUID

import msgspec

from pgtask._error_text import sanitise
from pgtask._log import EventLog
from pgtask._postgres.portions import Portions
from pgtask._postgres.store import Link
from pgtask._status import session_name
from pgtask._supervisor.death import Death
from pgtask._supervisor.fork import fork
from pgtask.config import Config
from pgtask.errors import DatabaseRefused, RowsLocked, StatementTimeout

__all__ = ["DeadWorker", "Reapers"]

log = EventLog("pgtask.reaper")

# Reapers beyond two for each worker: one that waits for a locked row must not delay those of later deaths.
MAX_EXTRA = 8
MIN_PAUSE = 0.02  # seconds until the next statement for a locked row, or for a session that still exists
MAX_PAUSE = 1.0
MAX_HIDDEN = 5.0  # seconds for which a transaction behind a pooler is taken for one of the dead worker
MAX_SHARE = 0.05  # of a lease, which is the time of the reaper, that one statement may take,
MIN_LIMIT = 0.5  # and the seconds that it may in any case
MAX_CHARGING = 10.0  # seconds for which it tries to charge a held task whose row another session has locked
MAX_NAMED = 20  # implicated tasks in the log; one crash implicates only those that were executing


class DeadWorker(msgspec.Struct, frozen=True):
    """A worker to release leases for: the first half of its tokens, the implicated tasks, and the cause of its death.

    The death counts against an implicated task only if the dead worker still held it; against one of `held`, whose row
    a transaction of it may have held, if it is still due.
    """

    worker: bytes
    pid: int
    implicated: Sequence[bytes]
    cause: str
    held: Sequence[bytes] = ()


class Reapers:
    """The parent's side: the dead workers that no reaper has yet, and the processes of the reapers."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._dead: list[DeadWorker] = []
        self._pids: set[int] = set()

    @property
    def are_running(self) -> bool:
        return bool(self._pids)

    def add(self, death: Death) -> None:
        """Note a death, if the worker may have held leases."""
        if not death.holds_leases:
            return
        cause, stacks = death.cause, death.stacks
        if death.implicates and death.was_killed:
            cause, stacks = f"its loop was silent for {self._config.stall:g} s (--stall)", death.dump
        implicated = death.executing if death.implicates else []
        held = death.held if death.implicates else []
        self._dead.append(DeadWorker(death.worker, death.pid, implicated, f"{cause}\n{stacks}".rstrip(), held))

    def start(self, parent_fd: int, *, close: Iterable[int]) -> None:
        """Fork a reaper if a dead worker waits for one; the reaper leaves when `parent_fd` reads EOF."""
        config, dead = self._config, self._dead
        if not dead or len(self._pids) >= 2 * config.procs + MAX_EXTRA or config.dsn is None:
            return
        try:
            pid = fork("pgtask reaper", lambda: _run_reaper(config, dead, parent_fd), close=close, stops=False)
        except OSError as error:  # the next death tries again; until then the leases may expire
            log.warning("reaper.not_forked", error=error)
            return
        self._pids.add(pid)
        self._dead = []

    def discard(self, pid: int) -> None:
        """Note that a process has ended, which may be a reaper."""
        self._pids.discard(pid)

    def kill_all(self) -> None:
        """Kill the reapers that still run: the leases that they have not released expire."""
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pids.clear()


def _run_reaper(config: Config, dead: Sequence[DeadWorker], parent_fd: int) -> int:
    # The loop is not closed: that would wait for a thread that resolves the address of an unavailable database.
    return asyncio.new_event_loop().run_until_complete(_release_all(config, dead, parent_fd))


async def _release_all(config: Config, dead: Sequence[DeadWorker], parent_fd: int) -> int:
    assert config.dsn is not None
    limit = {"statement_timeout": f"{1000 * max(MIN_LIMIT, config.lease_timeout * MAX_SHARE):.0f}ms"}
    link = Link(config.dsn, "pgtask reaper", pooled=not config.listen, settings=limit)
    patience = min(MAX_CHARGING, config.lease_timeout / 2)
    releases = [_Release(link, worker, pooled=not config.listen, patience=patience) for worker in dead]
    try:
        async with asyncio.timeout(config.lease_timeout) as deadline:
            _leave_with_parent(parent_fd, deadline)
            await _release_in_turn(releases)
            await link.close()
    except TimeoutError as error:
        refusal = next((release.refusal for release in releases if release.refusal), None)
        hint = f"the leases expire within {config.lease_timeout:g} s, then other workers run those tasks"
        log.warning("release.failed", error=refusal or type(error).__name__, hint=hint)
        return 1
    return 0


def _leave_with_parent(parent_fd: int, deadline: asyncio.Timeout) -> None:
    loop = asyncio.get_running_loop()

    def leave() -> None:
        loop.remove_reader(parent_fd)
        deadline.reschedule(0.0)

    loop.add_reader(parent_fd, leave)


async def _release_in_turn(releases: list[_Release]) -> None:
    """Send a statement for each, until all are complete: one that waits for a locked row does not delay the others."""
    began = time.monotonic()
    while releases := [release for release in releases if not await release.advance()]:  # noqa: ASYNC110
        await asyncio.sleep(min(max(MIN_PAUSE, (time.monotonic() - began) / 4), MAX_PAUSE))


class _Release:
    """The release of one dead worker's leases, a statement at a time: of all leases, or of portions of them once that
    was too slow. A lease that is too slow alone is left to expire."""

    def __init__(self, link: Link, dead: DeadWorker, *, pooled: bool, patience: float = MAX_CHARGING) -> None:
        self._link = link
        self._dead = dead
        self._pooled = pooled
        self._bounds = UUID(bytes=dead.worker + bytes(8)), UUID(bytes=dead.worker + b"\xff" * 8)
        self._patience = patience  # seconds for a held task whose row is locked
        self._may_park = True  # False once another session has locked a row that the parking of a run writes
        self._answered_at: float | None = None  # when the first statement was answered (monotonic seconds)
        self._session_seen = True
        self._in_portions = False
        self._portions: Portions[UUID] = Portions()
        self._slow: set[UUID] = set()
        self._released = 0
        self._implicated: list[UUID] = []
        self._parked: list[UUID] = []
        self.refusal: str | None = None
        """The reason why the database has refused the last statement. That may pass, as it may for a worker."""

    async def advance(self) -> bool:
        """Release all leases that can be released now, or a portion of them; return True when none is left and none
        can follow."""
        try:
            is_over = await (self._release_portion() if self._in_portions else self._release(None))
        except RowsLocked:  # that of the parent of a run: release the others, and let this run have one more try
            self._may_park = False
            return False
        except StatementTimeout as error:
            log.warning("database.slow", statement="release_orphaned", pid=self._dead.pid, error=str(error))
            self._in_portions = True
            return False
        except DatabaseRefused as error:
            self.refusal = str(error)
            return False
        self.refusal = None
        if is_over:
            self._log_release()
        return is_over

    async def _release_portion(self) -> bool:
        """Release the next portion of the leases, or find out which are left; as `advance`."""
        if not self._portions:
            rows = await self._link.run("find_orphaned", *self._bounds, raises=(StatementTimeout,))
            self._portions = Portions([row[0] for row in rows if row[0] not in self._slow])
            if not self._portions:
                return await self._release([])

        async def release(portion: Sequence[UUID]) -> None:
            await self._release(portion)

        if (slow := await self._portions.send_next(release)) is not None:
            self._slow.add(slow)
            log.warning("database.slow", statement="release_orphaned", task=slow)
        return False

    async def _release(self, tasks: Sequence[UUID] | None) -> bool:
        """Send the statement for these tasks (None: for all); as `advance`."""
        dead = self._dead
        age = 0.0 if self._answered_at is None else time.monotonic() - self._answered_at
        ((left, session_seen, released, implicated, parked, _),) = await self._link.run(
            "release_orphaned",
            *self._bounds,
            [UUID(bytes=task) for task in dead.implicated],
            len(dead.implicated) == 1 and self._may_park,
            sanitise(dead.cause),
            session_name(dead.pid, dead.worker),
            age if self._pooled and age < MAX_HIDDEN else None,
            tasks,
            raises=(RowsLocked, StatementTimeout),
        )
        if self._answered_at is None:
            self._answered_at = time.monotonic()
        self._released += released
        self._implicated += implicated
        self._parked += parked
        was_seen, self._session_seen = self._session_seen, session_seen
        if left or was_seen:  # a statement from before the session's end does not see its last commit
            return False
        return not dead.held or await self._charge_held()

    async def _charge_held(self) -> bool:
        """Count the death against the tasks that were held. Return whether that is all: a task whose row is locked may
        be under way in another worker, which it may kill as well."""
        tasks = [UUID(bytes=task) for task in self._dead.held]
        ((charged, locked),) = await self._link.run("charge_held", tasks, raises=(RowsLocked, StatementTimeout))
        self._implicated += charged
        assert self._answered_at is not None
        return not locked or time.monotonic() - self._answered_at > self._patience

    def _log_release(self) -> None:
        """Log the implicated tasks, and then the sum."""
        cause = self._dead.cause.partition("\n")[0]
        for task in self._implicated[:MAX_NAMED]:
            log.warning("task.suspect", task=task, cause=cause)
        for task in self._parked:
            log.warning("task.parked", task=task, cause=cause)
        executing = len(self._implicated) + len(self._parked)
        tasks = self._released + executing
        log.info("leases.released", pid=self._dead.pid, tasks=tasks, executing=executing)
