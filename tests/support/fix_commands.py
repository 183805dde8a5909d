"""The command `pgtask` in the process of a test or in one of its own, and tasks inserted as SQL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import asyncpg
import pytest
from fix_database import run
from greeter import HELLO
from paths import REPOSITORY

from pgtask._cli.main import main


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def cursor(self) -> str | None:
        found = re.search(r"--after (\S+)$", self.err.strip())
        return found and found[1]


Command = Callable[..., Said]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process; a complaint is always one line."""

    def call(*words: str) -> Said:
        capsys.readouterr()
        said = Said(main(words), *capsys.readouterr())
        assert all(line.startswith("pgtask: ") for line in said.err.splitlines()), said.err
        return said

    return call


@pytest.fixture
def database(dsn: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A migrated database that the commands find."""
    monkeypatch.setenv("PGTASK_DSN", dsn)
    return dsn


def with_connection(dsn: str, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    async def connect_and_work() -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            return await work(connection)
        finally:
            await connection.close()

    return run(connect_and_work())


def query(dsn: str, sql: str, *args: Any) -> list[Any]:
    return [tuple(row) for row in with_connection(dsn, lambda connection: connection.fetch(sql, *args))]


def insert(dsn: str, **columns: str) -> str:
    """Insert one task, its columns given as SQL; returns its id."""
    columns = {"step": f"'{HELLO}'", **columns}
    sql = f"INSERT INTO pg_task ({', '.join(columns)}) VALUES ({', '.join(columns.values())}) RETURNING id::text"
    return str(query(dsn, sql)[0][0])


def insert_many(dsn: str, tasks: list[dict[str, str]]) -> None:
    """Insert tasks by one session, their columns given as SQL."""

    async def work(db: Any) -> None:
        for columns in tasks:
            columns = {"step": f"'{HELLO}'", **columns}
            await db.execute(f"INSERT INTO pg_task ({', '.join(columns)}) VALUES ({', '.join(columns.values())})")

    with_connection(dsn, work)


PARKED = {"error": "'boom'", "tried": "6"}
LEASED = {"locked_by": "gen_random_uuid()", "lock_expires_at": "now() + interval '1 min'", "claims": "1"}
EXPIRED = {**LEASED, "lock_expires_at": "now() - interval '1 min'"}


UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"
FILL = """
    INSERT INTO pg_task (step, queue, priority, wakeup_at, error, locked_by, lock_expires_at)
    SELECT
        format('{"T%s":{"S%s":null}}', i % 2, i % 3),
        CASE i % 7 WHEN 0 THEN 'a b' ELSE 'default' END,
        i % 2,
        CASE i % 5
            WHEN 0 THEN '-infinity'::timestamptz
            WHEN 1 THEN 'infinity'
            WHEN 2 THEN now() - interval '1 h'
            ELSE now() + i / 50 * interval '1 h'
        END,
        CASE WHEN i % 11 = 0 THEN 'boom' END,
        CASE WHEN i % 13 = 0 THEN gen_random_uuid() END,
        CASE WHEN i % 13 = 0 THEN now() + i / 50 * interval '1 min' END
    FROM generate_series(1, 500) AS i
"""
"""500 tasks in each state, of two queues, priorities and families."""


def process(*words: str, environ: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pgtask", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(environ or {})},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )
