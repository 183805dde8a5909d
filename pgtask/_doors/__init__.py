"""Doors: the connections of other drivers, each with the part of asyncpg's interface that our statements use.

Theory of operation. A door sends a statement on the caller's connection by the caller's driver, so that the driver, and
what is above it (SQLAlchemy, Django), see the statement and begin their transaction by their own rules. Rows come back
as `Row`, and errors as the exceptions of asyncpg with the same SQLSTATE. So the statements, their error mapping and
their retries are the same for all drivers. A door of a sync driver never suspends: one `send(None)` runs a coroutine
over it to its end.

Invariants: a driver that the program has not imported is not imported here: it is found by the name of the module of
the connection's class. A connection whose next statement would be committed by itself is refused before anything is
sent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

from pgtask._doors.door import Door

__all__ = ["Door", "door_to"]

_FILES = {
    "psycopg": "psycopg_door",
    "psycopg_pool": "psycopg_door",
    "psycopg2": "psycopg2_door",
    "sqlalchemy": "sqlalchemy_door",
    "django": "django_door",
}


def door_to(conn: Any) -> Door | None:
    """Return a door to a connection of another driver than asyncpg, or None if the driver is not known.

    Raises `EnqueueError` for another object of a driver: a pool, an engine.
    """
    if isinstance(conn, Door):
        return conn
    cls: Any = type(conn)
    open_door = _opener(cls)
    return None if open_door is None else open_door(conn)


@lru_cache(maxsize=256)
def _opener(cls: Any) -> Callable[[Any], Door] | None:
    roots = (parent.__module__.partition(".")[0] for parent in cls.__mro__)
    file = next((_FILES[root] for root in roots if root in _FILES), None)
    return None if file is None else import_module(f"pgtask._doors.{file}").open_door
