"""Work of Postgres during a run, read from the counters of the server before and after it.

Invariants: the bench has no connection to the measured database while a contender works; commit timestamps give the
window of the rate, the same way for every contender, so that the bench need not believe any process.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from bench.harness.server import Server

__all__ = ["Meter", "Work", "trim_fringe"]


class Work(msgspec.Struct, frozen=True):
    """Difference between the counters before and after a run. Times are seconds since the epoch, by the clock of the
    server, and None if the run has written nothing."""

    first_commit_at: float | None
    last_commit_at: float | None
    transactions: int
    wal_bytes: int
    full_page_images: int
    updates: int
    hot_updates: int
    deletes: int
    autovacuums: int
    server_cpu_seconds: float | None


class _Counters(msgspec.Struct, frozen=True):
    lsn: str
    images: int
    next_xid: int
    commits: int
    cpu_seconds: float | None


# Over a connection to another database, so that the measured one does not count the transaction of this statement.
_COUNTERS = """
SELECT pg_current_wal_insert_lsn()::text,
       (SELECT wal_fpi FROM pg_stat_wal),
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
       (SELECT xact_commit FROM pg_stat_database WHERE datname = $1)
"""

# Only a transaction that has written has an id, and so a commit timestamp. Transactions of vacuum and analyze, which
# commit within 20 ms of the times in pg_stat_all_tables, do not belong to the contender.
_WINDOW = """
WITH housekeeping AS MATERIALIZED (
    SELECT done.at
    FROM pg_stat_all_tables, unnest(ARRAY[last_vacuum, last_autovacuum, last_analyze, last_autoanalyze]) AS done (at)
    WHERE done.at IS NOT NULL
),
written AS MATERIALIZED (
    SELECT pg_xact_commit_timestamp((number % 4294967296)::text::xid) AS at
    FROM generate_series($1::bigint, $2::bigint - 1) AS number
),
committed AS MATERIALIZED (
    SELECT extract(epoch FROM at)::float8 AS at
    FROM written
    WHERE at IS NOT NULL
      AND NOT EXISTS (
          SELECT FROM housekeeping
          WHERE written.at BETWEEN housekeeping.at AND housekeeping.at + interval '20 ms'
      )
)
SELECT ARRAY (SELECT at FROM committed ORDER BY at LIMIT $3),
       ARRAY (SELECT at FROM committed ORDER BY at DESC LIMIT $3),
       (SELECT count(*) FROM committed)
"""

_GAP = 0.1  # seconds without a commit that separate the fringe from the work
_MAX_FRINGE = 20  # commits at each end

_TABLE = """
SELECT coalesce(sum(n_tup_upd), 0)::bigint,
       coalesce(sum(n_tup_hot_upd), 0)::bigint,
       coalesce(sum(n_tup_del), 0)::bigint,
       coalesce(sum(autovacuum_count), 0)::bigint
FROM pg_stat_user_tables
"""


class Meter:
    """Reader of the counters of a database: once when it is made, and again in `read`."""

    def __init__(self, server: Server, database: str) -> None:
        self._server = server
        self._database = database
        server.wait_for_disconnects(database)
        self._table = self._read_table()
        server.wait_for_disconnects(database)
        self._before = self._read_counters()

    def read(self) -> Work:
        """Wait until all clients have disconnected; return the work since this meter was made."""
        server, database, before = self._server, self._database, self._before
        server.wait_for_disconnects(database)
        after = self._read_counters()
        dsn = server.database(database)
        firsts, lasts, count = server.query(_WINDOW, before.next_xid, after.next_xid, _MAX_FRINGE + 1, dsn=dsn)[0]
        if not count:
            first = last = None
        elif count < 10 * _MAX_FRINGE:
            first, last = firsts[0], lasts[0]
        else:
            first, last = trim_fringe(firsts), trim_fringe(lasts)
        updates, hot, deletes, vacuums = (now - then for now, then in zip(self._read_table(), self._table, strict=True))
        cpu = None
        if before.cpu_seconds is not None and after.cpu_seconds is not None:
            cpu = after.cpu_seconds - before.cpu_seconds
        return Work(
            first_commit_at=first,
            last_commit_at=last,
            transactions=after.commits - before.commits,
            wal_bytes=int(server.value("SELECT $1::text::pg_lsn - $2::text::pg_lsn", after.lsn, before.lsn)),
            full_page_images=after.images - before.images,
            updates=updates,
            hot_updates=hot,
            deletes=deletes,
            autovacuums=vacuums,
            server_cpu_seconds=cpu,
        )

    def _read_counters(self) -> _Counters:
        lsn, images, next_xid, commits = self._server.query(_COUNTERS, self._database)[0]
        return _Counters(lsn, images, next_xid, commits, self._server.cpu_seconds())

    def _read_table(self) -> list[int]:
        return list(self._server.query(_TABLE, dsn=self._server.database(self._database))[0])


def trim_fringe(commits: Sequence[float]) -> float:
    """Return the first commit of the work, or the last one if the order is reversed.

    A worker that starts or exits may write a few rows of its own, apart from the work. So up to twenty commits are left
    out if a tenth of a second without a commit follows them. Their tasks, if they have any, still count, which can only
    favour the contender.
    """
    begin = 0
    for place, (one, following) in enumerate(pairwise(commits), start=1):
        if abs(following - one) > _GAP:
            begin = place
    return commits[begin]
