"""What `pgtask top` shows of one moment: rows of queues, steps and workers, from samples of the last seconds.

Invariant: a number that was not measured is None, never zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import msgspec

from pgtask._observe.fleet_database import DatabaseSample, LeasedTask, Session
from pgtask._observe.local_fleets import LocalSample, Usage
from pgtask._observe.pages import Histogram, Snapshot, StepCounts, WorkerState

__all__ = ["QueueRow", "StepRates", "TopFrame", "TopHistory", "WorkerRow"]

MAX_HOLDER = 8  # digits that name a worker which is not of this host
PERIOD = 5.0  # seconds that rates, shares of CPU and percentiles are of


class QueueRow(msgspec.Struct, frozen=True, kw_only=True):
    """A queue, as the database counts it. `estimated` names the numbers that are estimates; `growth` is by how much its
    due and leased tasks grow in a second."""

    queue: str
    due: int = 0
    scheduled: int = 0
    leased: int = 0
    parked: int = 0
    oldest_due: float | None = None
    growth: float | None = None
    estimated: tuple[str, ...] = ()


class StepRates(msgspec.Struct, frozen=True, kw_only=True):
    """A step in the fleets of this host: what happens in a second, percentiles in seconds, and totals."""

    step: str
    runs: float | None
    errors: float | None
    run_p50: float | None
    run_p95: float | None
    wait_p50: float | None
    wait_p95: float | None
    done: int
    parked: int


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """A worker. Of one on another host, only its address, its pid and its leases are known; of a holder of leases
    without a connection of ours, only its part of tokens. `leases` counts those in the table."""

    worker: str
    host: str
    pid: int | None = None
    state: str = ""
    leases: int = 0
    executing: int | None = None
    waiting: int | None = None
    unwritten: int | None = None
    runs: float | None = None
    errors: float | None = None
    lag: float | None = None
    cpu: float | None = None
    rss: int | None = None
    uptime: float | None = None


class TopFrame(msgspec.Struct, frozen=True, kw_only=True):
    """All that is shown. `database` is the reason why the database does not answer; then its part is the last known
    one, of `answered_at`. `supervisors` are those of this host whose counters are read; `added` and `removed` are
    rows in a second."""

    seen_at: float
    database: str | None = None
    answered_at: float | None = None
    supervisors: tuple[int, ...] = ()
    added: float | None = None
    removed: float | None = None
    queues: tuple[QueueRow, ...] = ()
    steps: tuple[StepRates, ...] = ()
    workers: tuple[WorkerRow, ...] = ()
    longest: tuple[LeasedTask, ...] = ()


class _Moment(msgspec.Struct, frozen=True):
    database: DatabaseSample
    local: LocalSample


class TopHistory:
    """The samples of the last seconds."""

    def __init__(self) -> None:
        self._moments: deque[_Moment] = deque()
        self._answered: deque[tuple[float, DatabaseSample]] = deque()

    def frame(self, database: DatabaseSample, local: LocalSample, wall_time: float) -> TopFrame:
        """Add a sample, and return the frame up to it."""
        now = local.seen_at
        if database.error is None:
            self._answered.append((now, database))
        local = LocalSample(now, tuple(_ours(local.fleets, self._last.sessions)), local.usage)
        self._moments.append(_Moment(database, local))
        while len(self._moments) > 2 and self._moments[1].local.seen_at <= now - PERIOD:
            self._moments.popleft()
        while len(self._answered) > 2 and self._answered[1][0] <= now - PERIOD:
            self._answered.popleft()
        earlier = self._moments[0].local
        rates = self._traffic() if database.error is None else (None, None)
        return TopFrame(
            seen_at=wall_time,
            database=database.error,
            answered_at=self._answered[-1][0] - now + wall_time if self._answered else None,
            supervisors=tuple(fleet.pid for fleet in local.fleets),
            added=rates[0],
            removed=rates[1],
            queues=tuple(self._queues()),
            steps=tuple(_step_rates(earlier, local)),
            workers=tuple(_worker_rows(self._last, earlier, local)),
            longest=tuple(_find_longest(self._last, local)),
        )

    @property
    def _last(self) -> DatabaseSample:
        """The last answer of the database."""
        return self._answered[-1][1] if self._answered else DatabaseSample()

    def _traffic(self) -> tuple[float | None, float | None]:
        before, after = self._answered[0][1].traffic, self._last.traffic
        seconds = after.seen_at - before.seen_at
        if seconds <= 0 or after.inserted < before.inserted:
            return None, None
        return (after.inserted - before.inserted) / seconds, (after.deleted - before.deleted) / seconds

    def _queues(self) -> Iterator[QueueRow]:
        earlier_at, before = self._answered[0] if self._answered else (0.0, DatabaseSample())
        seconds = (self._answered[-1][0] - earlier_at) if self._answered else 0.0
        earlier = {row.queue: row for row in _count_queues(before)}
        for row in _count_queues(self._last):
            old = earlier.get(row.queue, QueueRow(queue=row.queue))
            is_exact = not {"due", "leased"} & {*row.estimated, *old.estimated}
            grown = row.due + row.leased - old.due - old.leased
            growth = grown / seconds if seconds and is_exact else None
            yield msgspec.structs.replace(row, growth=growth)


def _ours(fleets: Iterable[Snapshot], sessions: tuple[Session, ...] | None) -> Iterator[Snapshot]:
    """Yield the fleets of this database: all but those whose workers have connections, and none of them is here."""
    known = {session.pid for session in sessions or ()}
    for fleet in fleets:
        connected = {worker.pid for worker in fleet.workers if worker.is_connected}
        if sessions is None or not connected or connected & known:
            yield fleet


def _count_queues(sample: DatabaseSample) -> list[QueueRow]:
    found: dict[str, dict[str, object]] = {}
    for depth in sample.depth:
        row = found.setdefault(depth.queue, {"estimated": ()})
        row[depth.state] = depth.tasks
        if depth.is_estimate:
            row["estimated"] = (*row["estimated"], depth.state)  # type: ignore[misc]
        if depth.oldest_due is not None:
            row["oldest_due"] = depth.oldest_due
    return [QueueRow(queue=queue, **row) for queue, row in sorted(found.items())]  # type: ignore[arg-type]


# --- steps --------------------------------------------------------------------------------------------------


def _step_rates(earlier: LocalSample, now: LocalSample) -> Iterator[StepRates]:
    seconds = now.seen_at - earlier.seen_at
    before, after = _sum_steps(earlier.fleets), _sum_steps(now.fleets)
    for name, counts in sorted(after.items()):
        old = before.get(name, StepCounts(task=counts.task, step=counts.step))
        run, wait = _difference(counts.run, old.run), _difference(counts.wait, old.wait)
        yield StepRates(
            step=f"{counts.task}.{counts.step}" if counts.task else "(unknown)",
            runs=run.count / seconds if seconds else None,
            errors=max(0, _errors(counts) - _errors(old)) / seconds if seconds else None,
            run_p50=run.quantile(0.5),
            run_p95=run.quantile(0.95),
            wait_p50=wait.quantile(0.5),
            wait_p95=wait.quantile(0.95),
            done=counts.done + counts.next,
            parked=counts.parked,
        )


def _sum_steps(fleets: Iterable[Snapshot]) -> dict[tuple[str, str], StepCounts]:
    sums: dict[tuple[str, str], StepCounts] = {}
    for fleet in fleets:
        for counts in fleet.steps:
            name = counts.task, counts.step
            sums[name] = sums[name] + counts if name in sums else counts
    return sums


def _difference(after: Histogram, before: Histogram) -> Histogram:
    """Return what was observed meanwhile; all of it if a supervisor has ended and counters fell."""
    found = after - before
    return after if min(found.buckets) < 0 else found


def _errors(counts: StepCounts) -> int:
    return counts.retried + counts.parked + counts.lost


# --- workers ------------------------------------------------------------------------------------------------


def _worker_rows(database: DatabaseSample, earlier: LocalSample, now: LocalSample) -> Iterator[WorkerRow]:
    seconds = now.seen_at - earlier.seen_at
    before = {(fleet.pid, worker.pid): worker for fleet in earlier.fleets for worker in fleet.workers}
    sessions = {session.pid: session for session in database.sessions or ()}
    leases = dict(database.leases)
    for fleet in now.fleets:
        for worker in fleet.workers:
            session = sessions.pop(worker.pid, None)
            held = worker.leases if session is None else leases.pop(session.worker, 0)
            usage = earlier.usage.get(worker.pid), now.usage.get(worker.pid)
            yield _local_row(fleet, worker, before.get((fleet.pid, worker.pid)), usage, held, (now.seen_at, seconds))
    for session in database.sessions or ():
        if sessions.get(session.pid) is session or session.worker in leases:
            held = leases.pop(session.worker, 0)
            name, host = session.worker[:MAX_HOLDER], session.address or "?"
            yield WorkerRow(worker=name, host=host, pid=session.pid, leases=held)
    for holder, held in sorted(leases.items()):
        yield WorkerRow(worker=holder[:MAX_HOLDER], host="?", leases=held, state="no connection")


def _find_longest(database: DatabaseSample, local: LocalSample) -> Iterator[LeasedTask]:
    """Yield the tasks that were leased longest ago; their workers are named as in the rows of workers."""
    pids = {session.worker: session.pid for session in database.sessions or ()}
    labels = {worker.pid: _label(fleet, worker) for fleet in local.fleets for worker in fleet.workers}
    for task in sorted(database.longest, key=lambda task: -task.seconds):
        label = labels.get(pids.get(task.worker, -1), task.worker[:MAX_HOLDER])
        yield msgspec.structs.replace(task, worker=label)


def _label(fleet: Snapshot, worker: WorkerState) -> str:
    return f"{fleet.pid}/{worker.number}"


def _local_row(
    fleet: Snapshot,
    worker: WorkerState,
    before: WorkerState | None,
    usage: tuple[Usage | None, Usage | None],
    leases: int,
    clock: tuple[float, float],
) -> WorkerRow:
    now, seconds = clock
    is_measured = before is not None and seconds > 0
    old = worker if before is None else before
    lag = _difference(worker.lag, old.lag)
    cpu = usage[1].cpu - usage[0].cpu if usage[0] is not None and usage[1] is not None else None
    return WorkerRow(
        worker=_label(fleet, worker),
        host="here",
        pid=worker.pid,
        state=_state_of(fleet, worker),
        leases=leases,
        executing=worker.executing,
        waiting=worker.waiting,
        unwritten=worker.unwritten,
        runs=(_runs(worker) - _runs(old)) / seconds if is_measured else None,
        errors=(_all_errors(worker) - _all_errors(old)) / seconds if is_measured else None,
        lag=lag.quantile(0.95) if is_measured else None,
        cpu=max(0.0, cpu) / seconds if cpu is not None and is_measured else None,
        rss=None if usage[1] is None else usage[1].rss,
        uptime=max(0.0, now - worker.started),
    )


def _state_of(fleet: Snapshot, worker: WorkerState) -> str:
    if not worker.is_ready:
        return "stopping" if fleet.is_stopping else "not ready"
    if not worker.is_connected:
        return "no database"
    return "ready" if worker.is_renewing else "no renewal"


def _runs(worker: WorkerState) -> int:
    return sum(step.run.count for step in worker.steps)


def _all_errors(worker: WorkerState) -> int:
    return sum(map(_errors, worker.steps))
