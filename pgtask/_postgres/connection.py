"""Connections to Postgres, and the one boundary at which its errors become ours.

Invariants: every connection has TCP keepalives; asyncpg's and the socket's exceptions do not pass `map_errors`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

import asyncpg

from pgtask._dsn import redact
from pgtask.errors import DatabaseRefused, DatabaseUnavailable, DataRefused, PgtaskError, RowsLocked, SchemaError

__all__ = [
    "CONNECT_TIMEOUT",
    "Connection",
    "connect",
    "is_connection_loss",
    "keep_alive",
    "map_errors",
    "was_rolled_back",
]

Connection = asyncpg.Connection

CONNECT_TIMEOUT = 15.0
# A half-open line is noticed after idle + count * interval = 25 s; unacknowledged data after 20 s.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}

# SQLSTATE classes and codes after which the same statement may succeed later, on this or a new connection.
_WAIT_CLASSES = ("08", "40", "53", "57", "58")
_WAIT_CODES = ("25006", "55006", "25P03", "25P04")


async def connect(dsn: str, *, name: str, settings: dict[str, str] | None = None, pooled: bool = False) -> Any:
    """Open a connection that shows as `name` in `pg_stat_activity`, with `settings` for its whole life.

    `pooled` is for a transaction-pooling pgbouncer: no session settings, no prepared statements that outlive a
    transaction. The caller owns the connection. Raises `DatabaseUnavailable` or `DatabaseRefused`.
    """
    with map_errors(dsn):
        connection = await asyncpg.connect(
            dsn,
            timeout=CONNECT_TIMEOUT,
            statement_cache_size=0 if pooled else 100,
            max_cached_statement_lifetime=0,
            server_settings=None if pooled else {"application_name": name, **(settings or {})},
        )
    keep_alive(connection)
    return connection


def keep_alive(connection: Any) -> None:
    """Set what asyncpg has no option for on its socket."""
    line = connection._transport.get_extra_info("socket")
    if line is None or line.family == getattr(socket, "AF_UNIX", None):
        return
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        if hasattr(socket, option):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


@contextmanager
def map_errors(dsn: str = "") -> Iterator[None]:
    """Turn what asyncpg, the socket or the resolver raise into a `DatabaseError` of ours, the original as `__cause__`:
    `DatabaseUnavailable` (wait), `DataRefused` (SQLSTATE 22, 23 and P0), `SchemaError`, or `DatabaseRefused`."""
    try:
        yield
    except PgtaskError:
        raise
    except asyncpg.PostgresError as error:
        state = error.sqlstate or ""
        text = " ".join(f"{error.args[0] if error.args else error}".split())
        if state[:2] in ("22", "23", "P0"):  # P0: a trigger of the user's
            raise DataRefused(f"{text} (SQLSTATE {state})") from error
        if state in ("55P03", "40P01"):  # a deadlock: the server has undone our statement to end it
            raise RowsLocked(f"{text} (SQLSTATE {state})") from error
        if state == "08P01" and dsn:
            raise DatabaseRefused(f"{text}; through a pooler use --no-listen (SQLSTATE {state}){_at(dsn)}") from error
        if state.startswith(_WAIT_CLASSES) or state in _WAIT_CODES:
            raise DatabaseUnavailable(f"{text} (SQLSTATE {state})") from error
        if state in ("42P01", "42703", "3F000"):
            raise SchemaError(f"{text}: the schema of pgtask is missing or older; run: pgtask migrate") from error
        raise DatabaseRefused(f"{text} (SQLSTATE {state}){_at(dsn)}") from error
    except asyncpg.InternalClientError as error:
        raise DatabaseUnavailable(f"the connection broke: {error}") from error
    except asyncpg.InterfaceError as error:
        # asyncpg says this of a closed connection, of a bad DSN and of a wrong call alike; only the first mends itself.
        if "closed" in str(error):
            raise DatabaseUnavailable(f"the connection is closed: {error}") from error
        raise DatabaseRefused(f"{error}{_at(dsn)}") from error
    except ssl.SSLCertVerificationError as error:
        raise DatabaseRefused(f"the server's certificate is not trusted: {error.verify_message}{_at(dsn)}") from error
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        text = str(error) or type(error).__name__
        raise DatabaseUnavailable(f"cannot reach the database: {text}{_at(dsn)}") from error
    except (ValueError, TypeError) as error:
        if not dsn:
            raise
        raise DatabaseRefused(f"the DSN is not valid{_at(dsn)}") from error  # the error may quote the password


def is_connection_loss(error: BaseException) -> bool:
    """Whether an exception of asyncpg says that the connection was lost under a statement, or the server is away."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "").startswith(("08", "57P"))
    if isinstance(error, asyncpg.InternalClientError):
        return True  # what a statement gets to see whose connection the server ends in the middle of a reply
    if isinstance(error, ConnectionError):  # a step may have other sockets: only asyncpg's count
        return any(
            frame.f_globals.get("__name__", "").startswith("asyncpg.") for frame, _ in walk_tb(error.__traceback__)
        )
    return isinstance(error, asyncpg.InterfaceError) and "closed" in str(error)


def was_rolled_back(error: DatabaseUnavailable) -> bool:
    """Whether the server itself has said that a statement failed (a deadlock, a lock that was not to be had), so that
    nothing of it was carried out."""
    cause = error.__cause__
    return isinstance(cause, asyncpg.PostgresError) and not is_connection_loss(cause)


def _at(dsn: str) -> str:
    return f" [{redact(dsn)}]" if dsn else ""
