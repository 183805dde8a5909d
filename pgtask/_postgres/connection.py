"""Connections to Postgres, and the one boundary at which its errors become ours.

Invariant: the exceptions of asyncpg and of the socket do not pass `map_errors`.
"""

from __future__ import annotations

import asyncio
import configparser
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

import asyncpg

from pgtask._dsn import check_dsn, conceal, redact
from pgtask._postgres.dial import NoUsableHost, dial
from pgtask.errors import (
    DatabaseError,
    DatabaseRefused,
    DatabaseUnavailable,
    DataRefused,
    PgtaskError,
    RowsLocked,
    SchemaError,
    StatementTimeout,
)

__all__ = [
    "PLAN_SETTINGS",
    "SESSION_SETTINGS",
    "Connection",
    "connect",
    "fetch_in_transaction",
    "became_read_only",
    "is_connection_loss",
    "map_errors",
    "valid_dsn",
    "was_rolled_back",
]

Connection = asyncpg.Connection

if not hasattr(Connection, "_transport"):  # dial.py reads it
    raise ImportError(
        f"asyncpg {asyncpg.__version__} has no Connection._transport, which pgtask needs: install an older asyncpg, or "
        "a newer pgtask"
    )

SESSION_SETTINGS = {"default_transaction_isolation": "read committed"}
"""The settings of all our sessions. The statements rely on seeing rows that other sessions have committed while they
waited for a lock, independent of the default of the database or the role."""

PLAN_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_indexonlyscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_sort": "off",
    "jit": "off",
}
"""The settings of all our sessions that send one statement again and again. Each has one right plan, an index scan; a
plan made while the table was empty must be the same one."""

_CLOSED = re.compile(r"(connection|pool) (is|was) (being )?clos(ed|ing)")
_POOLER = "through a pooler use --no-listen, or PGTASK_NO_LISTEN=1 for a client"

# SQLSTATE classes and codes after which the same statement may succeed later, on this or a new connection.
_WAIT_CLASSES = ("08", "40", "53", "57", "58")
_WAIT_CODES = ("25006", "55006", "25P03", "25P04")
# A pooler reports nearly all its own errors as 08P01. Only these texts, seen while connecting, name permanent errors;
# the others (max_client_conn, query_wait_timeout, an unavailable server) pass. So does a password that the server has
# refused to the pooler itself, which passes that on: `password authentication failed for user ...`.
_POOLER_REFUSES = re.compile(
    "unsupported startup parameter|no such database|no such user|(SASL|password) authentication failed$"
)


async def connect(
    dsn: str, *, name: str, settings: dict[str, str] | None = None, pooled: bool = False, reads: bool = False
) -> Any:
    """Open a connection that shows as `name` in `pg_stat_activity`, with `settings` for its whole life.

    `pooled` is for a transaction-pooling pgbouncer: no session settings, no prepared statements that outlive a
    transaction. If it only `reads`, a standby among several hosts will do. The caller owns the connection. Raises
    `DatabaseUnavailable` or `DatabaseRefused`.
    """
    with map_errors(dsn):
        return await dial(
            valid_dsn(dsn),
            reads=reads,
            statement_cache_size=0 if pooled else 100,
            max_cached_statement_lifetime=0,
            server_settings=None if pooled else {"application_name": name, **SESSION_SETTINGS, **(settings or {})},
        )


async def fetch_in_transaction(connection: Any, settings: dict[str, str], query: str, *args: Any) -> list[Any]:
    """Run a query in a transaction of its own that has these settings: behind a pooler, where no session is ours."""
    values = "".join(f"; SET LOCAL {name} = '{value}'" for name, value in settings.items())
    await connection.execute(f"BEGIN ISOLATION LEVEL READ COMMITTED{values}")
    try:
        rows: list[Any] = await connection.fetch(query, *args)
    except Exception:
        if not connection.is_closed():
            await connection.execute("ROLLBACK")
        raise
    await connection.execute("COMMIT")
    return rows


def valid_dsn(dsn: str) -> str:
    """Return the DSN if it is valid. asyncpg would quote pieces of an invalid one in its error.

    Raises `DatabaseRefused`."""
    try:
        return check_dsn(dsn)
    except ValueError as error:
        raise DatabaseRefused(f"the DSN is not valid: {error}{_at(dsn)}") from None


@contextmanager
def map_errors(dsn: str = "") -> Iterator[None]:
    """Turn an exception of asyncpg, the socket or the resolver into a `DatabaseError` of ours, the original as
    `__cause__`: `DatabaseUnavailable` (wait), `DataRefused` (SQLSTATE 22, 23, P0 and 53400), `SchemaError`, or
    `DatabaseRefused`."""
    try:
        yield
    except PgtaskError:
        raise
    except NoUsableHost as error:
        raise _error_of_hosts(error, dsn) from error
    except asyncpg.PostgresError as error:
        raise _error_of_sqlstate(error, dsn) from error
    except asyncpg.InternalClientError as error:
        raise DatabaseUnavailable(f"the connection broke: {error}") from error
    except (asyncpg.ClientConfigurationError, configparser.Error) as error:
        # In the options of the DSN or in the service file: the text and the traceback may quote a password of it.
        text = str(error) if isinstance(error, asyncpg.InterfaceError) else "the service file cannot be read"
        raise DatabaseRefused(f"{conceal(text, dsn)}{_at(dsn)}") from None
    except asyncpg.InterfaceError as error:
        # asyncpg raises this for a closed connection, an invalid DSN and a wrong call; only the first is temporary.
        if _is_closed(error):
            raise DatabaseUnavailable(f"the connection is closed: {error}") from error
        raise DatabaseRefused(f"{error}{_at(dsn)}") from error
    except ssl.SSLCertVerificationError as error:
        raise DatabaseRefused(f"the server's certificate is not trusted: {error.verify_message}{_at(dsn)}") from error
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        text = str(error) or type(error).__name__
        raise DatabaseUnavailable(f"cannot reach the database: {text}{_at(dsn)}") from error
    except (ValueError, TypeError):
        if not dsn:
            raise
        raise DatabaseRefused(f"the DSN is not valid{_at(dsn)}") from None  # the error may quote pieces of it


def _error_of_hosts(error: NoUsableHost, dsn: str) -> DatabaseError:
    """Return our error for a list of hosts: it is a refusal only if each of them refuses, as another may come back."""
    texts, refused = [], 0
    for host, cause in error.causes:
        text = cause
        if isinstance(cause, Exception):
            try:
                with map_errors(dsn):
                    raise cause
            except DatabaseError as mapped:
                text = str(mapped).removesuffix(_at(dsn))
                refused += isinstance(mapped, DatabaseRefused)
        texts.append(f"{host}: {text}")
    kind = DatabaseRefused if refused == len(texts) else DatabaseUnavailable
    return kind(f"no host is usable: {'; '.join(texts)}{_at(dsn)}")


def _error_of_sqlstate(error: asyncpg.PostgresError, dsn: str) -> DatabaseError:
    """Return our error for one that the server has reported."""
    state = error.sqlstate or ""
    is_about_row = error.server_source_function == "ExecWithCheckOptions"  # the user's row security forbids this row
    text = " ".join(f"{error.args[0] if error.args else error}".split())
    # P0: raised by a trigger of the user. 53400: the statement is too large for a limit, such as temp_file_limit.
    if state[:2] in ("22", "23", "P0") or state == "53400" or is_about_row:
        return DataRefused(f"{text} (SQLSTATE {state})")
    if state in ("55P03", "40P01"):  # the latter is a deadlock: the server has rolled our statement back
        return RowsLocked(f"{text} (SQLSTATE {state})")
    if state == "57014":
        return StatementTimeout(f"{text} (SQLSTATE {state})")
    if state in ("26000", "42P05"):  # other clients use our session
        return DatabaseRefused(f"{text}; {_POOLER} (SQLSTATE {state}){_at(dsn)}")
    if state == "08P01" and dsn and _POOLER_REFUSES.match(text):
        hint = f"; {_POOLER}" if "parameter" in text else ""
        return DatabaseRefused(f"{text}{hint} (SQLSTATE {state}){_at(dsn)}")
    if state.startswith(_WAIT_CLASSES) or state in _WAIT_CODES:
        return DatabaseUnavailable(f"{text} (SQLSTATE {state})")
    if state in ("42P01", "42703", "42P10", "3F000"):
        return SchemaError(f"{text}: the schema of pgtask is missing or older; run: pgtask migrate")
    hint = "; a % in its password is written %25" if state == "28P01" and "%" in dsn.partition("@")[0] else ""
    return DatabaseRefused(f"{text}{hint} (SQLSTATE {state}){_at(dsn)}")


def is_connection_loss(error: BaseException) -> bool:
    """Return whether an exception of asyncpg says that a statement lost its connection, or the server is
    unavailable."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "").startswith(("08", "57P"))
    if isinstance(error, asyncpg.InternalClientError):
        return True  # raised when the server ends the connection in the middle of a reply
    if isinstance(error, ConnectionError):  # a step may have other sockets: only asyncpg's count
        return any(
            frame.f_globals.get("__name__", "").startswith("asyncpg.") for frame, _ in walk_tb(error.__traceback__)
        )
    return isinstance(error, asyncpg.InterfaceError) and _is_closed(error)


def became_read_only(error: BaseException | None) -> bool:
    """Return whether a statement failed because its session may not write: the server is a standby now, say. The owner
    of the connection leaves it then, as another host may be the primary."""
    cause = error.__cause__ if isinstance(error, DatabaseUnavailable) else error
    return isinstance(cause, asyncpg.ReadOnlySQLTransactionError)


def _is_closed(error: asyncpg.InterfaceError) -> bool:
    """Return whether the error says that a connection or a pool is closed. Only the class itself does; its subclasses
    are about an argument or a DSN, whose text they quote."""
    return type(error) is asyncpg.InterfaceError and _CLOSED.search(str(error)) is not None


def was_rolled_back(error: DatabaseUnavailable) -> bool:
    """Return whether the server itself has reported that a statement failed (a deadlock, an unavailable lock), so that
    nothing of it was carried out."""
    cause = error.__cause__
    return isinstance(cause, asyncpg.PostgresError) and not is_connection_loss(cause)


def _at(dsn: str) -> str:
    return f" [{redact(dsn)}]" if isinstance(dsn, str) and dsn else ""
