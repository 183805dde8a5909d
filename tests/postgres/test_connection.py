"""Connections: classes of errors, no password in a message, keepalives, and links that reconnect."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from claim_kit import ALL_LEASES
from fix_database import run, with_database
from proxy import Line, with_options
from sessions import linked, our_session, until_blocked

from pgtask._dsn import redact
from pgtask._postgres.connection import connect, is_connection_loss, map_errors
from pgtask._postgres.lanes import lane_parameters
from pgtask._postgres.pools import client_pool
from pgtask._postgres.store import HOT_SETTINGS
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

INSERT = "INSERT INTO pg_task (id, step) VALUES ('018f0000-0000-7000-8000-000000000000', '{}')"
LOCK = "SELECT pg_advisory_lock(1)"

pytestmark = pytest.mark.one_database


# --- tools ---------------------------------------------------------------------------------------------------


# --- whose fault it is ---------------------------------------------------------------------------------------

STATES = {
    "08006": DatabaseUnavailable,  # connection_failure
    "22003": DataRefused,  # numeric_value_out_of_range
    "22021": DataRefused,  # character_not_in_repertoire
    "22P02": DataRefused,  # invalid_text_representation
    "23502": DataRefused,  # not_null_violation
    "23505": DataRefused,  # unique_violation
    "23514": DataRefused,  # check_violation
    "25006": DatabaseUnavailable,  # read_only_sql_transaction: a standby, until it is promoted
    "26000": DatabaseRefused,  # invalid_sql_statement_name: prepared in another session, behind a pooler
    "42P05": DatabaseRefused,  # duplicate_prepared_statement
    "25P03": DatabaseUnavailable,  # idle_in_transaction_session_timeout
    "28000": DatabaseRefused,  # invalid_authorization_specification
    "28P01": DatabaseRefused,  # invalid_password
    "3D000": DatabaseRefused,  # invalid_catalog_name
    "3F000": SchemaError,  # invalid_schema_name
    "40001": DatabaseUnavailable,  # serialization_failure
    "40P01": RowsLocked,  # deadlock_detected
    "42501": DatabaseRefused,  # insufficient_privilege
    "42703": SchemaError,  # undefined_column
    "42P01": SchemaError,  # undefined_table
    "42P10": SchemaError,  # invalid_column_reference: there is no unique index of the keys
    "53100": DatabaseUnavailable,  # disk_full
    "53400": DataRefused,  # configuration_limit_exceeded
    "53300": DatabaseUnavailable,  # too_many_connections
    "55006": DatabaseUnavailable,  # object_in_use
    "55P03": RowsLocked,  # lock_not_available
    "57014": StatementTimeout,  # query_canceled
    "57P01": DatabaseUnavailable,  # admin_shutdown
    "57P03": DatabaseUnavailable,  # cannot_connect_now
    "58030": DatabaseUnavailable,  # io_error
    "XX000": DatabaseRefused,  # internal_error
}


def test_each_sqlstate_has_its_error(dsn: str) -> None:
    async def main() -> None:
        async with our_session(dsn) as db:
            for state, kind in STATES.items():
                with pytest.raises(DatabaseError) as caught, map_errors():
                    await db.execute(f"DO $$ BEGIN RAISE EXCEPTION 'told so' USING ERRCODE = '{state}'; END $$")
                assert type(caught.value) is kind, state
                assert "told so" in str(caught.value)
                assert isinstance(caught.value.__cause__, asyncpg.PostgresError)

    run(main())


def test_message_of_an_error_is_one_line(dsn: str) -> None:
    async def main() -> None:
        async with our_session(dsn) as db:
            with pytest.raises(DatabaseError) as caught, map_errors():
                await db.execute(r"DO $$ BEGIN RAISE EXCEPTION E'one\ntwo' USING DETAIL = E'three\nfour'; END $$")
            assert "one" in str(caught.value)
            assert "\n" not in str(caught.value)

    run(main())


def test_error_of_a_stopping_server_is_unavailable(dsn: str) -> None:
    """The same errors, but as they really come about."""

    async def main() -> None:
        async with our_session(dsn) as other, our_session(dsn, lock_timeout="20ms") as db:
            cases: list[tuple[str, type[DatabaseError], str]] = [
                ("BEGIN; SET LOCAL statement_timeout = '50ms'; SELECT pg_sleep(600)", StatementTimeout, "timeout"),
                (LOCK, RowsLocked, "lock timeout"),
                ("BEGIN READ ONLY; " + INSERT, DatabaseUnavailable, "read-only"),
                (INSERT, DataRefused, "duplicate key"),
                ("INSERT INTO pg_task (step) VALUES (NULL)", DataRefused, "null value"),
                ("UPDATE pg_task SET locked_by = id", DataRefused, "pg_task_lease_state_check"),
                ("UPDATE pg_task SET priority = 70000", DataRefused, "smallint out of range"),
                ("SELECT FROM pg_task_gone", SchemaError, "run: pgtask migrate"),
                ("SELECT gone FROM pg_task", SchemaError, "run: pgtask migrate"),
                ("SELECT wrong(", DatabaseRefused, "syntax error"),
            ]
            await other.execute(LOCK)
            await other.execute(INSERT)
            for query, kind, message in cases:
                with pytest.raises(DatabaseError, match=message) as caught, map_errors():
                    await db.execute(query)
                assert type(caught.value) is kind, query
                await db.execute("ROLLBACK")

    run(main())


def test_value_that_asyncpg_cannot_send_is_refused_data(dsn: str) -> None:
    async def main() -> None:
        async with our_session(dsn) as db:
            for kind, value in (("text", 3), ("text", "\ud800"), ("int2", 70000), ("uuid", "x"), ("text", "a\0b")):
                with pytest.raises(DataRefused), map_errors():
                    await db.fetchval(f"SELECT $1::{kind}", value)
            assert await db.fetchval("SELECT 1") == 1

    run(main())


def test_connection_that_ended_is_unavailable(dsn: str) -> None:
    async def main() -> None:
        async with our_session(dsn) as other:
            closed = await connect(dsn, name="test")
            await closed.close()
            with pytest.raises(DatabaseUnavailable, match="closed"), map_errors():
                await closed.fetch("SELECT 1")

            idle = await connect(dsn, name="test")
            await other.execute("SELECT pg_terminate_backend($1, 5000)", idle.get_server_pid())
            with pytest.raises(DatabaseUnavailable), map_errors():
                await idle.fetch("SELECT 1")

            busy = await connect(dsn, name="test")
            await other.execute(LOCK)
            waiting = asyncio.create_task(busy.fetch(LOCK))
            await until_blocked(other, busy.get_server_pid())
            await other.execute("SELECT pg_terminate_backend($1)", busy.get_server_pid())
            with pytest.raises(DatabaseUnavailable), map_errors():
                await waiting

            dropped = await connect(dsn, name="test")
            waiting = asyncio.create_task(dropped.fetch(LOCK))
            await until_blocked(other, dropped.get_server_pid())
            dropped.terminate()
            with pytest.raises(DatabaseUnavailable), map_errors():
                await waiting

    run(main())


def test_error_text_does_not_make_a_connection_lost() -> None:
    """asyncpg quotes an argument in errors whose classes derive from the one for closed connections."""
    lost = [
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InterfaceError("pool is closing"),
        asyncpg.InterfaceError("cannot call Transaction.rollback(): the underlying connection is closed"),
    ]
    wrong = [
        *(kind("expected a str, got 'the connection is closed'") for kind in asyncpg.InterfaceError.__subclasses__()),
        asyncpg.InterfaceError("cannot use custom codec on type public.closed: it is neither a scalar type"),
        asyncpg.InterfaceError("cannot perform operation: another operation is in progress"),
        asyncpg.DataError("invalid input for query argument $1: 'connection is closed'"),
    ]
    for error in lost:
        assert is_connection_loss(error)
        with pytest.raises(DatabaseUnavailable), map_errors():
            raise error
    for error in wrong:
        assert not is_connection_loss(error)
        with pytest.raises(DatabaseError) as caught, map_errors():
            raise error
        assert not isinstance(caught.value, DatabaseUnavailable), error


def test_own_and_foreign_errors_pass_unchanged() -> None:
    for error in (PgtaskError("ours"), KeyError("theirs"), ValueError("theirs"), asyncio.CancelledError()):
        with pytest.raises(type(error)) as caught, map_errors():
            raise error
        assert caught.value is error


@pytest.fixture
def dead_port() -> Iterator[str]:
    """A port at which nothing listens, and nothing else can."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield str(bound.getsockname()[1])


def test_missing_server_is_unavailable(dsn: str, dead_port: str) -> None:
    async def main() -> None:
        port = dead_port
        for where in (
            with_options(dsn, host="127.0.0.1", port=port),
            f"postgresql://u:secret@127.0.0.1:{port}/db",
            with_options(dsn, host="/nowhere/at/all"),
        ):
            with pytest.raises(DatabaseUnavailable) as caught:
                await connect(where, name="test")
            assert "cannot reach the database" in str(caught.value)
            assert "secret" not in str(caught.value)

    run(main())


def test_silent_server_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgtask._postgres.dial.CONNECT_TIMEOUT", 0.1)

    async def main() -> None:
        refusal = pytest.raises(DatabaseUnavailable, match=r"cannot reach the database: no answer in 0\.1 s")
        with socket.create_server(("127.0.0.1", 0)) as silent, refusal:
            await connect(f"postgresql://127.0.0.1:{silent.getsockname()[1]}/db", name="test")

    run(main())


def test_login_without_the_right_is_refused(dsn: str, cluster: str) -> None:
    async def main() -> None:
        async with our_session(cluster) as admin:
            await admin.execute("CREATE ROLE pgtask_no_login; CREATE ROLE pgtask_full LOGIN CONNECTION LIMIT 0")
            try:
                cases: list[tuple[str, type[DatabaseError], str]] = [
                    (with_database(dsn, "nowhere"), DatabaseRefused, 'database "nowhere" does not exist'),
                    (with_options(dsn, user="no-such-role"), DatabaseRefused, 'role "no-such-role" does not exist'),
                    (with_options(dsn, user="pgtask_no_login"), DatabaseRefused, "not permitted to log in"),
                    (with_options(dsn, user="pgtask_full"), DatabaseUnavailable, "too many connections"),
                ]
                for where, kind, message in cases:
                    with pytest.raises(DatabaseError, match=message) as caught:
                        await connect(where, name="test")
                    assert type(caught.value) is kind, where
            finally:
                await admin.execute("DROP ROLE pgtask_no_login, pgtask_full")

    run(main())


BAD_DSNS = [
    "mysql://u:secret@localhost/db",
    "localhost",
    "host=localhost dbname=app password=secret",
    "host=localhost dbname=app password='my secret'",
    "postgresql://u:secret@localhost:port/db",
    "postgresql://u:se/cret@localhost/db",
    "postgresql://localhost/db?sslmode=wrong&password=secret",
]


@pytest.mark.parametrize("bad", BAD_DSNS)
def test_invalid_dsn_is_refused_without_its_password(bad: str) -> None:
    async def main() -> None:
        with pytest.raises(DatabaseRefused) as caught:
            await connect(bad, name="test")
        for part in ("secret", "se/cret", "'se'", "cret"):
            assert part not in str(caught.value)
        assert "\n" not in str(caught.value)

    run(main())


# --- passwords -----------------------------------------------------------------------------------------------

REDACTED = {
    "postgresql://u:secret@h/db": "postgresql://u:***@h/db",
    "postgres://u:secret@h:5432,i:5433/db?sslmode=require": "postgres://u:***@h:5432,i:5433/db?sslmode=require",
    "postgresql://:secret@h/db": "postgresql://:***@h/db",
    "postgresql://u:a:b@h/db": "postgresql://u:***@h/db",
    "postgresql://u:p%40ss@h/db": "postgresql://u:***@h/db",
    "postgresql://u:p@ss@h/db": "postgresql://u:***@h/db",
    "postgresql://u:p/ss@h/db": "postgresql://u:***@h/db",
    "postgresql://u:p?ss@h/db": "postgresql://u:***@h/db",
    "postgresql:///db?user=u&password=secret&host=h": "postgresql:///db?user=u&password=***&host=h",
    "postgresql:///db?password=secret": "postgresql:///db?password=***",
    "postgresql:///db?sslkey=k&sslpassword=secret": "postgresql:///db?sslkey=k&sslpassword=***",
    "host=h password=secret dbname=db": "host=h password=*** dbname=db",
    "password=secret": "password=***",
    "host=h password = secret": "host=h password = ***",
    "host=h password='my secret' dbname=db": "host=h password=*** dbname=db",
    r"host=h password='my \' secret' dbname=db": "host=h password=*** dbname=db",
    "postgresql://h/db": "postgresql://h/db",
    "postgresql://u@h:5432/db": "postgresql://u@h:5432/db",
    "postgresql://h:5432/db": "postgresql://h:5432/db",
    "postgresql:///db?host=/run/pg&user=me": "postgresql:///db?host=/run/pg&user=me",
    "": "",
}


@pytest.mark.parametrize(("dsn", "shown"), REDACTED.items(), ids=range(len(REDACTED)))
def test_redact_hides_the_password_and_nothing_else(dsn: str, shown: str) -> None:
    assert redact(dsn) == shown


# --- the socket and the session ------------------------------------------------------------------------------


def test_our_sessions_are_read_committed(dsn: str) -> None:
    async def main() -> None:
        async with our_session(dsn) as db:
            name = await db.fetchval("SELECT current_database()")
            await db.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
        ours = await connect(dsn, name="test")
        pool = await client_pool(dsn, size=1)
        assert await ours.fetchval("SHOW transaction_isolation") == "read committed"
        for _ in range(2):  # also when the pool has reset it
            assert await pool.fetchval("SHOW transaction_isolation") == "read committed"
        await ours.close()
        await pool.close()

    run(main())


def test_settings_hold_for_the_life_of_the_connection(dsn: str) -> None:
    async def main() -> None:
        async with our_session(dsn, **HOT_SETTINGS) as db:
            for _ in range(2):
                for name, value in HOT_SETTINGS.items():
                    assert await db.fetchval("SELECT current_setting($1)", name) in (value, "0"), name
                assert await db.fetchval("SHOW plan_cache_mode") == "force_generic_plan"
                assert await db.fetchval("SHOW application_name") == "test"
                await db.execute("RESET ALL")
        plain = await connect(dsn, name="test", settings=HOT_SETTINGS, pooled=True)
        assert await plain.fetchval("SHOW plan_cache_mode") == "auto"
        await plain.fetch("SELECT 1")
        assert await plain.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql") <= 1
        await plain.close()

    run(main())


# --- links ---------------------------------------------------------------------------------------------------


def test_link_reopens_after_a_loss(dsn: str) -> None:
    async def main() -> None:
        opened: list[Any] = []

        async def on_open(connection: Any) -> None:
            opened.append(connection)

        async with linked(dsn, on_open=on_open) as (link, db):
            await link.run("lanes", *lane_parameters(None))
            await link.run("lanes", *lane_parameters(None))
            assert opened == [link.connection]
            await db.execute("SELECT pg_terminate_backend($1, 5000)", opened[0].get_server_pid())
            await link.run("lanes", *lane_parameters(None))
            assert len(opened) == 2
            link.drop()
            assert opened[1].is_closed()
            await link.run("lanes", *lane_parameters(None))
            assert len(opened) == 3
            assert link.statements >= 4

    run(main())


def test_link_with_failing_on_open_has_no_connection(dsn: str) -> None:
    async def main() -> None:
        opened: list[Any] = []

        async def on_open(connection: Any) -> None:
            opened.append(connection)
            await connection.execute("SELECT gone FROM pg_task")

        async with linked(dsn, on_open=on_open) as (link, _):
            with pytest.raises(SchemaError):
                await link.open()
            assert link.connection is None
            assert opened[0].is_closed()

    run(main())


def test_statement_whose_backend_was_killed_is_sent_again(dsn: str) -> None:
    async def main() -> None:
        losses: list[Any] = []
        async with linked(dsn) as (link, db):
            connection = await link.open()
            async with db.transaction():
                await db.execute("LOCK TABLE pg_task")
                running = asyncio.create_task(
                    link.run("lanes", *lane_parameters(None), on_loss=lambda: losses.append(connection))
                )
                await until_blocked(db, connection.get_server_pid())
                await db.execute("SELECT pg_terminate_backend($1, 5000)", connection.get_server_pid())
            assert len(await running) == 1
            assert losses == [connection]
            assert link.connection is not connection

    run(main())


def test_statement_whose_answer_was_lost_is_sent_again(dsn: str) -> None:
    async def main() -> None:
        losses: list[int] = []
        async with Line(dsn) as line, linked(line.dsn) as (link, db):
            await db.execute(INSERT)
            await link.run("expire", 1, *ALL_LEASES)
            await db.execute("UPDATE pg_task SET locked_by = id, lock_expires_at = now() - interval '1 s'")
            line.swallow()
            ((expired, *_),) = await link.run("expire", 1, *ALL_LEASES, on_loss=lambda: losses.append(line.cut))
            assert (expired, losses) == (0, [1]), "the first attempt had done it"
            assert await db.fetchval("SELECT locked_by FROM pg_task") is None

    run(main())


def test_endless_statement_is_cut_off_at_its_deadline(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (link, db):
            await link.run("lanes", *lane_parameters(None))
            async with db.transaction():
                await db.execute("LOCK TABLE pg_task")
                with pytest.raises(DatabaseUnavailable):
                    await link.once("lanes", *lane_parameters(None), deadline=0.05)
                assert link.connection is None
            assert len(await link.once("lanes", *lane_parameters(None))) == 1

    run(main())


def test_cancelled_statement_leaves_no_half_read_connection(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (link, db):
            await link.run("lanes", *lane_parameters(None))
            async with db.transaction():
                await db.execute("LOCK TABLE pg_task")
                waiting = asyncio.create_task(link.run("lanes", *lane_parameters(None)))
                await until_blocked(db, link.connection.get_server_pid())
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await waiting
                assert waiting.cancelled()
                assert link.connection is None
            assert len(await link.run("lanes", *lane_parameters(None))) == 1

    run(main())


def test_refused_data_keeps_the_connection(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (link, _):
            await link.run("lanes", *lane_parameters(None))
            before = link.connection
            with pytest.raises(DataRefused):
                await link.run("find_keys", [3])
            assert link.connection is before

    run(main())
