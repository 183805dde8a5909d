"""A caller with a transaction of its own for each door, so that one scenario serves all drivers.

A scenario is a coroutine. Over a sync driver nothing in it suspends, and a `SyncClient` is its client.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import asyncpg
import psycopg
import psycopg2
import sqlalchemy
from django.conf import UserSettingsHolder, global_settings, settings
from django.db import connection as default_connection
from django.db import connections
from fix_database import run
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from pgtask import Client, SyncClient

Scenario = Callable[[Any, Any, Any], Awaitable[None]]


class Caller:
    """A program with a connection. `conn` is what it passes on."""

    conn: Any

    async def connect(self, dsn: str) -> None:
        raise NotImplementedError

    async def begin(self) -> None:
        """Begin a transaction, if the driver does not with the next statement."""

    async def leave(self) -> None:
        """Come to where the next statement would be committed by itself."""
        raise NotImplementedError

    async def send(self, text: str) -> Any:
        """Send a statement as a program does."""
        return self.conn.execute(text)

    async def commit(self) -> None:
        self.conn.commit()

    async def rollback(self) -> None:
        self.conn.rollback()

    async def close(self) -> None:
        self.conn.close()


class Psycopg(Caller):
    async def connect(self, dsn: str) -> None:
        self.conn = psycopg.connect(dsn, row_factory=psycopg.rows.dict_row)

    async def leave(self) -> None:
        self.conn.autocommit = True


class PsycopgBlock(Psycopg):
    """In a block, with autocommit."""

    async def connect(self, dsn: str) -> None:
        await super().connect(dsn)
        self.conn.autocommit = True

    async def begin(self) -> None:
        self._block = self.conn.transaction()
        self._block.__enter__()

    async def commit(self) -> None:
        self._block.__exit__(None, None, None)

    async def rollback(self) -> None:
        error = psycopg.Rollback()
        self._block.__exit__(type(error), error, None)

    async def leave(self) -> None:
        pass


class AsyncPsycopg(Caller):
    async def connect(self, dsn: str) -> None:
        self.conn = await psycopg.AsyncConnection.connect(dsn)

    async def leave(self) -> None:
        await self.conn.set_autocommit(True)

    async def send(self, text: str) -> Any:
        return await self.conn.execute(text)

    async def commit(self) -> None:
        await self.conn.commit()

    async def rollback(self) -> None:
        await self.conn.rollback()

    async def close(self) -> None:
        await self.conn.close()


class Psycopg2(Caller):
    async def connect(self, dsn: str) -> None:
        import psycopg2.extras

        self.conn = psycopg2.connect(dsn, cursor_factory=psycopg2.extras.RealDictCursor)

    async def leave(self) -> None:
        self.conn.autocommit = True

    async def send(self, text: str) -> Any:
        with self.conn.cursor() as cursor:
            cursor.execute(text)


class Asyncpg(Caller):
    async def connect(self, dsn: str) -> None:
        self.conn = await asyncpg.connect(dsn)

    async def begin(self) -> None:
        await self.conn.execute("BEGIN")

    async def leave(self) -> None:
        pass

    async def send(self, text: str) -> Any:
        return await self.conn.execute(text)

    async def commit(self) -> None:
        await self.conn.execute("COMMIT")

    async def rollback(self) -> None:
        await self.conn.execute("ROLLBACK")

    async def close(self) -> None:
        await self.conn.close()


CREATORS: dict[str, Any] = {
    "psycopg": psycopg.connect,
    "psycopg2": psycopg2.connect,
    "asyncpg": asyncpg.connect,
    "psycopg_async": psycopg.AsyncConnection.connect,
}


class Alchemy(Caller):
    def __init__(self, driver: str, make: Callable[[Any], Any]) -> None:
        self._name = driver
        self._make = make

    async def connect(self, dsn: str) -> None:
        creator = functools.partial(CREATORS[self._name], dsn)
        self._engine = sqlalchemy.create_engine(f"postgresql+{self._name}://", creator=creator)
        self.conn = self._make(self._engine)

    async def leave(self) -> None:
        await self.rollback()
        options = {"isolation_level": "AUTOCOMMIT"}
        if isinstance(self.conn, sqlalchemy.Connection):
            self.conn.execution_options(**options)
        else:
            self.conn.connection(execution_options=options)

    async def send(self, text: str) -> Any:
        return self.conn.execute(sqlalchemy.text(text))

    async def close(self) -> None:
        with suppress(Exception):
            self.conn.close()
        self._engine.dispose()


class AsyncAlchemy(Caller):
    def __init__(self, driver: str, make: Callable[[Any], Any]) -> None:
        self._name = driver
        self._make = make

    async def connect(self, dsn: str) -> None:
        creator = functools.partial(CREATORS[self._name], dsn)
        url = f"postgresql+{self._name.removesuffix('_async')}://"
        self._engine = create_async_engine(url, async_creator=creator)
        self.conn = self._make(self._engine)
        if isinstance(self.conn, AsyncConnection):
            await self.conn.start()

    async def leave(self) -> None:
        await self.rollback()
        options = {"isolation_level": "AUTOCOMMIT"}
        if isinstance(self.conn, AsyncConnection):
            await self.conn.execution_options(**options)
        else:
            await self.conn.connection(execution_options=options)

    async def send(self, text: str) -> Any:
        return await self.conn.execute(sqlalchemy.text(text))

    async def commit(self) -> None:
        await self.conn.commit()

    async def rollback(self) -> None:
        await self.conn.rollback()

    async def close(self) -> None:
        with suppress(Exception):
            await self.conn.close()
        await self._engine.dispose()


class Django(Caller):
    """Has settings of its own for as long as it is connected: the process may have those of another Django project."""

    async def connect(self, dsn: str) -> None:
        self._settings, settings._wrapped = settings._wrapped, UserSettingsHolder(global_settings)
        from django.db.backends.postgresql.base import DatabaseWrapper  # reads the settings

        where = psycopg.conninfo.conninfo_to_dict(dsn)
        options: dict[str, Any] = {
            "NAME": where.pop("dbname"),
            "USER": where.pop("user", "postgres"),
            "HOST": where.pop("host", ""),
            "PORT": where.pop("port", ""),
            "OPTIONS": {},
        }
        defaults: dict[str, Any] = {"PASSWORD": "", "TIME_ZONE": None, "AUTOCOMMIT": True}
        defaults |= {"CONN_MAX_AGE": 0, "ATOMIC_REQUESTS": False, "CONN_HEALTH_CHECKS": False, "TEST": {}}
        self._wrapper = DatabaseWrapper({**defaults, **options}, "default")
        self._cached = {name: value for name, value in vars(connections).items() if name in ("settings", "_settings")}
        self._before = getattr(connections._connections, "default", None)
        connections["default"] = self._wrapper
        self.conn = default_connection

    async def begin(self) -> None:
        from django.db import transaction

        self._atomic = transaction.atomic()
        self._atomic.__enter__()

    async def leave(self) -> None:
        pass

    async def send(self, text: str) -> Any:
        with self.conn.cursor() as cursor:
            cursor.execute(text)

    async def commit(self) -> None:
        self._atomic.__exit__(None, None, None)

    async def rollback(self) -> None:
        self.conn.set_rollback(True)
        self._atomic.__exit__(None, None, None)

    async def close(self) -> None:
        self._wrapper.in_atomic_block = False
        self._wrapper.close()
        if self._before is None:
            del connections["default"]
        else:
            connections["default"] = self._before
        settings._wrapped = self._settings
        vars(connections).pop("settings", None)
        vars(connections).update(self._cached)


SYNC: dict[str, Callable[[], Caller]] = {
    "psycopg": Psycopg,
    "psycopg in a block": PsycopgBlock,
    "psycopg2": Psycopg2,
    "Session on psycopg": lambda: Alchemy("psycopg", Session),
    "Session on psycopg2": lambda: Alchemy("psycopg2", Session),
    "scoped_session on psycopg": lambda: Alchemy("psycopg", lambda engine: scoped_session(sessionmaker(engine))),
    "Connection on psycopg": lambda: Alchemy("psycopg", lambda engine: engine.connect()),
    "Connection on psycopg2": lambda: Alchemy("psycopg2", lambda engine: engine.connect()),
    "Django": Django,
}
ASYNC: dict[str, Callable[[], Caller]] = {
    "asyncpg": Asyncpg,
    "async psycopg": AsyncPsycopg,
    "AsyncSession on asyncpg": lambda: AsyncAlchemy("asyncpg", AsyncSession),
    "AsyncSession on psycopg": lambda: AsyncAlchemy("psycopg_async", AsyncSession),
    "AsyncConnection on asyncpg": lambda: AsyncAlchemy("asyncpg", lambda engine: engine.connect()),
    "AsyncConnection on psycopg": lambda: AsyncAlchemy("psycopg_async", lambda engine: engine.connect()),
}
BLOCKING: dict[str, Callable[[], Caller]] = {
    "psycopg in a loop": Psycopg,
    "psycopg2 in a loop": Psycopg2,
    "Session in a loop": lambda: Alchemy("psycopg", Session),
}
"""Sync connections that a `Client` gets."""

ALL = {**SYNC, **ASYNC, **BLOCKING}


class Awaited:
    """A `SyncClient` as a scenario calls a client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **options: Any) -> Any:
            found = getattr(self._client, name)(*args, **options)
            return Awaited(found) if type(found).__name__ == "SyncRun" else found

        found = getattr(self._client, name)
        if name == "run":
            return lambda *args: Awaited(found(*args))
        return call if callable(found) else found


def play_door(name: str, dsn: str, scenario: Scenario, *, line: str | None = None) -> None:
    """Play a scenario with a client that is not open, a caller, and a connection to look with. The caller connects to
    `line` if there is one."""

    async def main(client: Any) -> None:
        caller = ALL[name]()
        await caller.connect(line or dsn)
        try:
            with psycopg.connect(dsn, autocommit=True) as look:
                await scenario(client, caller, look)
        finally:
            await caller.close()

    if name not in SYNC:
        run(main(Client()))
        return
    os.environ.pop("DJANGO_ALLOW_ASYNC_UNSAFE", None)
    run_sync(main(Awaited(SyncClient())))


def run_sync(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in which nothing suspends."""
    with suppress(StopIteration):
        coroutine.send(None)
        raise AssertionError("a sync door has suspended")


def end_sessions(look: Any) -> None:
    """Have the server end all other sessions of the database."""
    look.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
