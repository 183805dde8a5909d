"""The door to SQLAlchemy: Session and Connection, AsyncSession and AsyncConnection, on psycopg, psycopg2 or asyncpg.

Invariant: each statement goes through `Connection.exec_driver_sql`, so SQLAlchemy begins its own transaction and ends
it with ours in it. A COPY goes to the driver's connection, once a savepoint has begun the transaction.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import exc
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from pgtask._doors import door_to
from pgtask._doors.door import Door, as_named_text, raise_closed, raise_outside, server_error
from pgtask._placeholders import translate
from pgtask.errors import EnqueueError

__all__ = ["open_door"]

T = TypeVar("T")
_DRIVERS = ("psycopg", "psycopg_async", "psycopg2", "asyncpg")


def open_door(conn: Any) -> Door:
    if isinstance(getattr(conn, "registry", None), Callable) and hasattr(conn, "session_factory"):  # type: ignore[arg-type]
        conn = conn.registry()  # a scoped_session: the session of this thread or task
    if isinstance(conn, (Session, Connection)):
        return _SqlalchemyDoor(conn, is_async=False)
    if any(cls.__name__ in ("AsyncSession", "AsyncConnection") for cls in type(conn).__mro__):
        return _SqlalchemyDoor(conn, is_async=True)
    name = type(conn).__name__
    if "Engine" in name:
        raise EnqueueError("conn= is an Engine; pass a connection in a transaction: with engine.begin() as conn")
    if "sessionmaker" in name or "scoped_session" in name:
        raise EnqueueError(f"conn= is a {name}; call it, and pass the session")
    raise EnqueueError(f"conn= is a {name} of SQLAlchemy; pass the session, or the Connection, itself")


class _SqlalchemyDoor(Door):
    def __init__(self, target: Any, *, is_async: bool) -> None:
        self._target = target
        self.is_async = is_async
        self._is_lost = False

    def check(self) -> None:
        if not isinstance(self._target, Session) and getattr(self._target, "closed", False):
            raise_closed()

    async def begin(self) -> None:
        await self._call(_check_connection)

    def is_closed(self) -> bool:
        return self._is_lost

    async def _fetch(self, query: str, args: Sequence[Any]) -> tuple[Any, Sequence[Sequence[Any]]]:
        return await self._call(_execute, query, args)

    async def copy_to_table(
        self, table: str, *, source: AsyncIterator[bytes], columns: Sequence[str], format: str
    ) -> str:
        driver = await self._call(_driver_connection)
        connection: Any = door_to(driver) or driver
        status: str = await connection.copy_to_table(table, source=source, columns=columns, format=format)
        return status

    async def _call(self, work: Callable[..., T], *args: Any) -> T:
        """Do the work on the sync session or connection: SQLAlchemy runs it in a greenlet if its driver is async."""
        try:
            if self.is_async:
                return await self._target.run_sync(work, *args)  # type: ignore[no-any-return]
            return work(self._target, *args)
        except exc.DBAPIError as error:
            self._is_lost = error.connection_invalidated
            raise self._driver_error(error) from error
        except exc.PendingRollbackError as error:
            raise asyncpg.PostgresError.new({"C": "25P02", "M": _text(error)}) from error
        except exc.ResourceClosedError:
            raise_closed()
        except exc.SQLAlchemyError as error:  # it has no engine, or may not begin a transaction by itself
            raise EnqueueError(f"conn= cannot be used: {_text(error)}") from error

    def _driver_error(self, error: exc.DBAPIError) -> Any:
        original = error.orig
        cause: BaseException | None = None if original is None else original.__cause__
        if isinstance(cause, (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)):
            return cause  # of an asyncpg dialect
        return server_error(original or error, is_lost=self._is_lost or isinstance(error, exc.OperationalError))


def _text(error: exc.SQLAlchemyError) -> str:
    return str(error.args[0] if error.args else error)


def _connection_of(target: Any) -> Any:
    return target.connection() if isinstance(target, Session) else target


def _check_connection(target: Any) -> None:
    connection = _connection_of(target)
    if connection.closed:
        raise_closed()
    dialect = connection.dialect
    if dialect.name != "postgresql" or dialect.driver not in _DRIVERS:
        raise EnqueueError(
            f"conn= is a connection of {dialect.name}+{dialect.driver}; pgtask takes those of postgresql with psycopg, "
            "psycopg2 or asyncpg"
        )
    if connection.connection.dbapi_connection.autocommit:
        raise_outside('its isolation_level is "AUTOCOMMIT": use an engine, or execution options, without that')


def _execute(target: Any, query: str, args: Sequence[Any]) -> tuple[Any, Sequence[Sequence[Any]]]:
    connection = _connection_of(target)
    if not args:
        result = connection.exec_driver_sql(query)
    elif connection.dialect.driver == "asyncpg":
        result = connection.exec_driver_sql(query, tuple(args))
    else:
        result = connection.exec_driver_sql(translate(query, "pyformat")[0], as_named_text(args))
    if not result.returns_rows:
        return None, ()
    described = SimpleNamespace(description=result.cursor.description)  # the cursor forgets it when all is fetched
    return described, result.fetchall()


def _driver_connection(target: Any) -> Any:
    return _connection_of(target).connection.driver_connection
