"""What a run asked of Postgres: read from the server's own counters before and after it, never while it works.

Invariants: nothing of ours is connected to the measured database while a contender works; the window of the rate is
told by commit timestamps, the same way for every contender, so no process has to be believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from bench.server import Server

__all__ = ["Meter", "Work", "inner"]


class Work(msgspec.Struct, frozen=True):
    """The difference that a run made. Times are seconds since the epoch, by the server's clock; None: nothing was
    written."""

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


class _Mark(msgspec.Struct, frozen=True):
    lsn: str
    images: int
    next_xid: int
    commits: int
    cpu_seconds: float | None


# Connected elsewhere: the transactions of this statement are not counted in the measured database.
_MARK = """
SELECT pg_current_wal_insert_lsn()::text,
       (SELECT wal_fpi FROM pg_stat_wal),
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
       (SELECT xact_commit FROM pg_stat_database WHERE datname = $1)
"""

# Only transactions that wrote have an id, and so a commit timestamp. Those of vacuum and analyze, which end within
# moments of what pg_stat_all_tables says, are not the contender's.
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
told AS MATERIALIZED (
    SELECT extract(epoch FROM at)::float8 AS at
    FROM written
    WHERE at IS NOT NULL
      AND NOT EXISTS (
          SELECT FROM housekeeping
          WHERE written.at BETWEEN housekeeping.at AND housekeeping.at + interval '20 ms'
      )
)
SELECT ARRAY (SELECT at FROM told ORDER BY at LIMIT $3),
       ARRAY (SELECT at FROM told ORDER BY at DESC LIMIT $3),
       (SELECT count(*) FROM told)
"""

_QUIET = 0.1
_FRINGE = 20

_TABLE = """
SELECT coalesce(sum(n_tup_upd), 0)::bigint,
       coalesce(sum(n_tup_hot_upd), 0)::bigint,
       coalesce(sum(n_tup_del), 0)::bigint,
       coalesce(sum(autovacuum_count), 0)::bigint
FROM pg_stat_user_tables
"""


class Meter:
    """Reads the counters of a database now, and in `read` once more."""

    def __init__(self, server: Server, database: str) -> None:
        self._server = server
        self._database = database
        server.wait_until_left(database)
        self._table = self._read_table()
        server.wait_until_left(database)
        self._before = self._mark()

    def read(self) -> Work:
        """The work since then, once all clients have left."""
        server, database, before = self._server, self._database, self._before
        server.wait_until_left(database)
        after = self._mark()
        dsn = server.database(database)
        firsts, lasts, count = server.query(_WINDOW, before.next_xid, after.next_xid, _FRINGE + 1, dsn=dsn)[0]
        if not count:
            first = last = None
        elif count < 10 * _FRINGE:
            first, last = firsts[0], lasts[0]
        else:
            first, last = inner(firsts), inner(lasts)
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

    def _mark(self) -> _Mark:
        lsn, images, next_xid, commits = self._server.query(_MARK, self._database)[0]
        return _Mark(lsn, images, next_xid, commits, self._server.cpu_seconds())

    def _read_table(self) -> list[int]:
        return list(self._server.query(_TABLE, dsn=self._server.database(self._database))[0])


def inner(commits: Sequence[float]) -> float:
    """Where the work begins, seen from one end of it: a worker that registers or takes its leave writes a few rows of
    its own, apart from the rest. Up to twenty commits are left out, if a tenth of a second without any follows them;
    their tasks, if they have any, are counted all the same, so this can only be too kind."""
    begin = 0
    for place, (one, following) in enumerate(pairwise(commits), start=1):
        if abs(following - one) > _QUIET:
            begin = place
    return commits[begin]
