"""The PostgreSQL server that is measured: a throwaway one, or the one that `--dsn` names, with fresh databases.

Invariants: the server keeps what it has committed, or the bench refuses it; every run has a database of its own, made
from the same template; the bench removes every database that it has made.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate

__all__ = ["BenchError", "Server", "open_server"]

_REPORTED_SETTINGS = (
    *("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_level", "wal_sync_method"),
    *("data_checksums", "shared_buffers", "max_wal_size", "checkpoint_timeout", "autovacuum"),
    *("autovacuum_naptime", "max_connections", "commit_delay", "huge_pages", "track_commit_timestamp"),
)
_DURABLE_SETTINGS = ("fsync", "synchronous_commit", "full_page_writes")
_DISCONNECT_TIMEOUT = 10.0
_numbers = itertools.count(1)


class BenchError(Exception):
    """A measurement that is not possible; the text gives the reason and the remedy."""


class Server:
    """A server and the databases that the bench makes on it. `dsn` must name a superuser."""

    def __init__(self, dsn: str) -> None:
        if not re.match(r"postgres(ql)?://", dsn):
            raise BenchError(f"--dsn {dsn}: give it as postgresql://user@host:port/database?...")
        self.dsn = dsn
        self._template = f"pgtask_bench_{os.getpid()}_{next(_numbers)}"
        self.settings = {name: self.value(f"SHOW {name}") for name in _REPORTED_SETTINGS}
        self.version = self.value("SELECT version()")
        for name in _DURABLE_SETTINGS:
            if self.settings[name] != "on":
                raise BenchError(f"{name} is {self.settings[name]} on this server: what it commits may be lost")
        if self.settings["track_commit_timestamp"] != "on":
            raise BenchError("the rate is measured by commit timestamps: set track_commit_timestamp = on and restart")
        self._postmaster = self._find_postmaster()

    def database(self, name: str) -> str:
        """Return the DSN of a database of this server."""
        return re.sub(r"^(\w+://[^/?]*)(/[^?]*)?", rf"\1/{name}", self.dsn, count=1)

    # --- queries

    def query(self, sql: str, *args: Any, dsn: str | None = None) -> list[Any]:
        """Run a statement over a new connection."""

        async def ask() -> list[Any]:
            connection = await asyncpg.connect(dsn or self.dsn)
            try:
                return list(await connection.fetch(sql, *args))
            finally:
                await connection.close()

        return asyncio.run(ask())

    def value(self, sql: str, *args: Any, dsn: str | None = None) -> Any:
        return self.query(sql, *args, dsn=dsn)[0][0]

    def cpu_seconds(self) -> float | None:
        """Return the CPU time of all processes of the server, past ones included; None if they are not visible here."""
        if self._postmaster is None:
            return None
        own = self._postmaster.cpu_times()
        seconds = own.user + own.system + own.children_user + own.children_system
        for child in self._postmaster.children():
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:
                continue
            seconds += times.user + times.system
        return float(seconds)

    def wait_for_disconnects(self, database: str) -> None:
        """Wait until no client is connected to a database, since its statistics are complete only then."""
        deadline = time.monotonic() + _DISCONNECT_TIMEOUT
        sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'"
        while self.value(sql, database):
            if time.monotonic() > deadline:
                raise BenchError(f"a client is still connected to the database {database}")
            time.sleep(0.02)

    def _find_postmaster(self) -> psutil.Process | None:
        async def parent() -> psutil.Process | None:
            connection = await asyncpg.connect(self.dsn)
            try:
                backend = psutil.Process(await connection.fetchval("SELECT pg_backend_pid()"))
                return backend.parent() if backend.name() == "postgres" else None
            except psutil.Error:
                return None
            finally:
                await connection.close()

        return asyncio.run(parent())

    # --- databases

    def make_template(self) -> None:
        """Make the database that those of the runs are copies of: our schema and no task."""
        self.query(f"CREATE DATABASE {self._template} TEMPLATE template0")
        asyncio.run(migrate(self.database(self._template)))

    def remove_template(self) -> None:
        self.query(f"DROP DATABASE IF EXISTS {self._template} WITH (FORCE)")

    @contextmanager
    def fresh_database(self, *, empty: bool = False) -> Iterator[str]:
        """Make a database, with our schema or `empty`, and remove it at the end; yield its name."""
        name = f"{self._template}_run"
        self.query(f"CREATE DATABASE {name} TEMPLATE {'template0' if empty else self._template}")
        try:
            yield name
        finally:
            self.query(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@contextmanager
def open_server(dsn: str | None) -> Iterator[Server]:
    """Open the server that `dsn` names, or start a throwaway one with the settings of the embedded default."""
    if dsn is not None:
        yield from _with_template(Server(dsn))
        return
    with tempfile.TemporaryDirectory(prefix="pgtask-bench-", ignore_cleanup_errors=True) as directory:
        home = Path(directory)
        try:
            _enable_commit_timestamps(embedded.start(home))
            embedded.stop(home)
            yield from _with_template(Server(embedded.start(home)))
        finally:
            embedded.stop(home)


def _with_template(server: Server) -> Iterator[Server]:
    server.make_template()
    try:
        yield server
    finally:
        server.remove_template()


def _enable_commit_timestamps(dsn: str) -> None:
    """Set the one setting that differs from the embedded default; it costs ten bytes a transaction."""

    async def alter() -> None:
        connection = await asyncpg.connect(dsn)
        await connection.execute("ALTER SYSTEM SET track_commit_timestamp = on")
        await connection.close()

    asyncio.run(alter())
