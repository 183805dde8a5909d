"""What `pgtask top` shows of one moment: rows of queues, steps and workers, from samples of the last seconds.

Invariant: a number that was not measured is None, never zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import msgspec

from pgtask._observe.fleet_database import DatabaseSample, LeasedTask, Session
from pgtask._observe.fleets import HERE, FleetsSample, SeenFleet
from pgtask._observe.pages import Histogram, StepCounts, WorkerState

__all__ = ["EdgeRates", "QueueRow", "StepRates", "TopFrame", "TopHistory", "WorkerRow"]

MAX_HOLDER = 8  # digits that name a worker which is not of this host
PERIOD = 5.0  # seconds that rates, shares of CPU and percentiles are of


class QueueRow(msgspec.Struct, frozen=True, kw_only=True):
    """A queue, as the database counts it. `estimated` names the numbers that are estimates; `growth` is by how much its
    due and leased tasks grow in a second."""

    queue: str
    due: int = 0
    limited: int = 0
    scheduled: int = 0
    leased: int = 0
    parked: int = 0
    oldest_due: float | None = None
    growth: float | None = None
    estimated: tuple[str, ...] = ()


class EdgeRates(msgspec.Struct, frozen=True, kw_only=True):
    """The tasks that went on from a step to the `next` one since the supervisors began, and how many do in a second."""

    task: str
    step: str
    next: str
    tasks: int
    rate: float | None


class StepRates(msgspec.Struct, frozen=True, kw_only=True):
    """A step in the fleets that are seen: what happens in a second, percentiles in seconds, and totals. `done` counts
    tries that ended well, `next` those of them that went on to another step."""

    step: str
    runs: float | None
    errors: float | None
    run_p50: float | None
    run_p95: float | None
    wait_p50: float | None
    wait_p95: float | None
    done: int
    next: int = 0
    parked: int


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """A worker. Of one whose supervisor is not seen, only its address, its pid and its leases are known; of a holder of
    leases without a connection of ours, only its part of tokens. `leases` counts those in the table."""

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
    one, of `answered_at`. `supervisors` are those whose counters are read; `silent` says why others are not; `added`
    and `removed` are rows in a second."""

    seen_at: float
    database: str | None = None
    answered_at: float | None = None
    supervisors: tuple[int, ...] = ()
    silent: tuple[str, ...] = ()
    added: float | None = None
    removed: float | None = None
    queues: tuple[QueueRow, ...] = ()
    steps: tuple[StepRates, ...] = ()
    edges: tuple[EdgeRates, ...] = ()
    workers: tuple[WorkerRow, ...] = ()
    longest: tuple[LeasedTask, ...] = ()


class _Moment(msgspec.Struct, frozen=True):
    database: DatabaseSample
    fleets: FleetsSample


class TopHistory:
    """The samples of the last seconds."""

    def __init__(self) -> None:
        self._moments: deque[_Moment] = deque()
        self._answered: deque[tuple[float, DatabaseSample]] = deque()

    def frame(self, database: DatabaseSample, seen: FleetsSample, wall_time: float) -> TopFrame:
        """Add a sample, and return the frame up to it."""
        now = seen.seen_at
        if database.error is None:
            self._answered.append((now, database))
        seen = FleetsSample(now, tuple(_ours(seen.fleets, self._last.sessions)), seen.silent)
        self._moments.append(_Moment(database, seen))
        while len(self._moments) > 2 and self._moments[1].fleets.seen_at <= now - PERIOD:
            self._moments.popleft()
        while len(self._answered) > 2 and self._answered[1][0] <= now - PERIOD:
            self._answered.popleft()
        earlier = self._moments[0].fleets
        rates = self._traffic() if database.error is None else (None, None)
        return TopFrame(
            seen_at=wall_time,
            database=database.error,
            answered_at=self._answered[-1][0] - now + wall_time if self._answered else None,
            supervisors=tuple(fleet.snapshot.pid for fleet in seen.fleets),
            silent=seen.silent,
            added=rates[0],
            removed=rates[1],
            queues=tuple(self._queues()),
            steps=tuple(_step_rates(earlier, seen)),
            edges=tuple(_edge_rates(earlier, seen)),
            workers=tuple(_worker_rows(self._last, earlier, seen)),
            longest=tuple(_find_longest(self._last, seen)),
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


def _ours(fleets: Iterable[SeenFleet], sessions: tuple[Session, ...] | None) -> Iterator[SeenFleet]:
    """Yield the fleets of this database: all that were named, and those of this host but the ones whose workers have
    connections, and none of them is to this database."""
    known = {session.worker for session in sessions or ()}
    for fleet in fleets:
        connected = {worker.holder for worker in fleet.snapshot.workers if worker.is_connected}
        if fleet.host != HERE or sessions is None or not connected or connected & known:
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


def _step_rates(earlier: FleetsSample, now: FleetsSample) -> Iterator[StepRates]:
    before, after, seconds = _both(earlier, now)
    known, older, newer = _sum_steps(now.fleets), _sum_steps(before), _sum_steps(after)
    for name, counts in sorted(known.items()):
        nothing = StepCounts(task=counts.task, step=counts.step)
        old, new = older.get(name, nothing), newer.get(name, nothing)
        run, wait = _difference(new.run, old.run), _difference(new.wait, old.wait)
        yield StepRates(
            step=f"{counts.task}.{counts.step}" if counts.task else "(unknown)",
            runs=run.count / seconds if seconds else None,
            errors=max(0, _errors(new) - _errors(old)) / seconds if seconds else None,
            run_p50=run.quantile(0.5),
            run_p95=run.quantile(0.95),
            wait_p50=wait.quantile(0.5),
            wait_p95=wait.quantile(0.95),
            done=counts.done + counts.next,
            next=counts.next,
            parked=counts.parked,
        )


def _both(earlier: FleetsSample, now: FleetsSample) -> tuple[list[SeenFleet], list[SeenFleet], float | None]:
    """Return the fleets that both samples have, as they were and as they are, and the seconds between; None if there
    are no such fleets, or the samples are one. Rates are of these."""
    old = {fleet.key: fleet for fleet in earlier.fleets}
    after = [fleet for fleet in now.fleets if fleet.key in old]
    seconds = now.seen_at - earlier.seen_at
    return [old[fleet.key] for fleet in after], after, seconds if after and seconds > 0 else None


def _sum_steps(fleets: Iterable[SeenFleet]) -> dict[tuple[str, str], StepCounts]:
    sums: dict[tuple[str, str], StepCounts] = {}
    for fleet in fleets:
        for counts in fleet.snapshot.steps:
            name = counts.task, counts.step
            sums[name] = sums[name] + counts if name in sums else counts
    return sums


def _edge_rates(earlier: FleetsSample, now: FleetsSample) -> Iterator[EdgeRates]:
    before, after, seconds = _both(earlier, now)
    older, newer = _sum_edges(before), _sum_edges(after)
    for (task, step, then), tasks in sorted(_sum_edges(now.fleets).items()):
        grown = newer.get((task, step, then), 0) - older.get((task, step, then), 0)
        rate = grown / seconds if seconds else None
        yield EdgeRates(task=task, step=step, next=then, tasks=tasks, rate=rate)


def _sum_edges(fleets: Iterable[SeenFleet]) -> dict[tuple[str, str, str], int]:
    sums: dict[tuple[str, str, str], int] = {}
    for fleet in fleets:
        for edge in fleet.snapshot.edges:
            name = edge.task, edge.step, edge.next
            sums[name] = sums.get(name, 0) + edge.count
    return sums


def _difference(after: Histogram, before: Histogram) -> Histogram:
    """Return what was observed meanwhile; all of it if a supervisor has ended and counters fell."""
    found = after - before
    return after if min(found.buckets) < 0 else found


def _errors(counts: StepCounts) -> int:
    return counts.retried + counts.parked + counts.lost


# --- workers ------------------------------------------------------------------------------------------------


def _worker_rows(database: DatabaseSample, earlier: FleetsSample, now: FleetsSample) -> Iterator[WorkerRow]:
    before = {fleet.key: fleet for fleet in earlier.fleets}
    sessions = {session.worker: session for session in database.sessions or ()}
    leases = dict(database.leases)
    for fleet in now.fleets:
        for worker in fleet.snapshot.workers:
            session = sessions.pop(worker.holder, None)
            held = leases.pop(worker.holder, worker.leases if session is None else 0)
            yield _seen_row(fleet, worker, before.get(fleet.key), held)
    for session in sessions.values():
        held = leases.pop(session.worker, 0)
        name, host = session.worker[:MAX_HOLDER], session.address or "?"
        yield WorkerRow(worker=name, host=host, pid=session.pid, leases=held)
    state = "" if database.sessions is None else "no connection"
    for holder, held in sorted(leases.items()):
        yield WorkerRow(worker=holder[:MAX_HOLDER], host="?", leases=held, state=state)


def _find_longest(database: DatabaseSample, seen: FleetsSample) -> Iterator[LeasedTask]:
    """Yield the tasks that were leased longest ago; their workers are named as in the rows of workers."""
    labels = {worker.holder: _label(fleet, worker) for fleet in seen.fleets for worker in fleet.snapshot.workers}
    for task in sorted(database.longest, key=lambda task: -task.seconds):
        label = labels.get(task.worker, task.worker[:MAX_HOLDER])
        yield msgspec.structs.replace(task, worker=label)


def _label(fleet: SeenFleet, worker: WorkerState) -> str:
    return f"{fleet.snapshot.pid}/{worker.number}"


def _seen_row(fleet: SeenFleet, worker: WorkerState, earlier: SeenFleet | None, leases: int) -> WorkerRow:
    known = {} if earlier is None else {one.pid: one for one in earlier.snapshot.workers}
    seconds = 0.0 if earlier is None else fleet.clock - earlier.clock
    is_measured = worker.pid in known and seconds > 0
    old = known.get(worker.pid, worker)
    usage, used = fleet.usage.get(worker.pid), None if earlier is None else earlier.usage.get(worker.pid)
    lag = _difference(worker.lag, old.lag)
    return WorkerRow(
        worker=_label(fleet, worker),
        host=fleet.host,
        pid=worker.pid,
        state=_state_of(fleet, worker),
        leases=leases,
        executing=worker.executing,
        waiting=worker.waiting,
        unwritten=worker.unwritten,
        runs=(_runs(worker) - _runs(old)) / seconds if is_measured else None,
        errors=(_all_errors(worker) - _all_errors(old)) / seconds if is_measured else None,
        lag=lag.quantile(0.95) if is_measured else None,
        cpu=max(0.0, usage.cpu - used.cpu) / seconds if usage and used and is_measured else None,
        rss=None if usage is None else usage.rss,
        uptime=max(0.0, fleet.clock - worker.started),
    )


def _state_of(fleet: SeenFleet, worker: WorkerState) -> str:
    if not worker.is_ready:
        return "stopping" if fleet.snapshot.is_stopping else "not ready"
    if not worker.is_connected:
        return "no database"
    return "ready" if worker.is_renewing else "no renewal"


def _runs(worker: WorkerState) -> int:
    return sum(step.run.count for step in worker.steps)


def _all_errors(worker: WorkerState) -> int:
    return sum(map(_errors, worker.steps))
