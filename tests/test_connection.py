"""Connections: whose fault an error is, no password in a message, keepalives, and links that come back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import asyncpg
import pytest
import uvloop
from conftest import _fresh_database, run, with_database

from pgtask._dsn import redact
from pgtask._postgres.connection import connect, keep_alive, map_errors
from pgtask._postgres.store import HOT_SETTINGS, Link
from pgtask.errors import (
    DatabaseError,
    DatabaseRefused,
    DatabaseUnavailable,
    DataRefused,
    PgtaskError,
    RowsLocked,
    SchemaError,
)

INSERT = "INSERT INTO pg_task (id, step) VALUES ('018f0000-0000-7000-8000-000000000000', '{}')"
LOCK = "SELECT pg_advisory_lock(1)"


# --- tools ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(cluster: str, template: str) -> Iterator[str]:
    yield from _fresh_database(cluster, template)


@pytest.fixture
def dsn(database: str) -> str:
    """One database for this module, emptied before each test."""

    async def empty() -> None:
        db = await asyncpg.connect(database)
        await db.execute("DELETE FROM pg_task")
        await db.close()

    asyncio.run(empty())
    return database


def with_options(dsn: str, **options: str) -> str:
    """The DSN with other options in its query, and no host before it."""
    parts = urlsplit(dsn)
    query = {"user": parts.username or "postgres", **dict(parse_qsl(parts.query)), **options}
    return f"{parts.scheme}://{parts.path}?{urlencode(query)}"


@asynccontextmanager
async def connected(dsn: str, **settings: str) -> AsyncIterator[Any]:
    connection = await connect(dsn, name="test", settings=settings)
    try:
        yield connection
    finally:
        await connection.close()


async def until_blocked(db: Any, pid: int) -> None:
    while not await db.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", pid):  # noqa: ASYNC110
        await asyncio.sleep(0)


class Line:
    """A line to the server that can be cut at the worst moment: when the server has committed and answered, but the
    answer has not arrived. A TCP proxy, so that the server and asyncpg are the real ones.

        async with Line(dsn) as line: connect to line.dsn; line.swallow() cuts it at the next answer.
    """

    def __init__(self, dsn: str) -> None:
        self._upstream = dsn
        self._swallow = False
        self._lines: set[asyncio.Task[None]] = set()
        self.cut = 0

    async def __aenter__(self) -> Line:
        probe = await asyncpg.connect(self._upstream)
        self._address = probe._addr
        await probe.close()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.dsn = with_options(self._upstream, host="127.0.0.1", port=str(port), sslmode="disable")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._lines:
            task.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)
        await self._server.wait_closed()

    def swallow(self) -> None:
        self._swallow = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._lines.add(task)
        if isinstance(self._address, str):
            answers, questions = await asyncio.open_unix_connection(self._address)
        else:
            answers, questions = await asyncio.open_connection(*self._address)
        upward = asyncio.create_task(self._pass(reader, questions))
        try:
            with contextlib.suppress(ConnectionError):  # an end of it is gone
                await self._answer(answers, writer)
        finally:
            upward.cancel()
            for end in (writer, questions):
                end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self._swallow:
                self._swallow = False
                self.cut += 1
                return
            writer.write(data)


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
    "53100": DatabaseUnavailable,  # disk_full
    "53300": DatabaseUnavailable,  # too_many_connections
    "55006": DatabaseUnavailable,  # object_in_use
    "55P03": RowsLocked,  # lock_not_available
    "57014": DatabaseUnavailable,  # query_canceled
    "57P01": DatabaseUnavailable,  # admin_shutdown
    "57P03": DatabaseUnavailable,  # cannot_connect_now
    "58030": DatabaseUnavailable,  # io_error
    "XX000": DatabaseRefused,  # internal_error
}


def test_each_sqlstate_has_its_error(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db:
            for state, kind in STATES.items():
                with pytest.raises(DatabaseError) as caught, map_errors():
                    await db.execute(f"DO $$ BEGIN RAISE EXCEPTION 'told so' USING ERRCODE = '{state}'; END $$")
                assert type(caught.value) is kind, state
                assert "told so" in str(caught.value)
                assert isinstance(caught.value.__cause__, asyncpg.PostgresError)

    run(main())


def test_the_message_of_an_error_is_one_line(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db:
            with pytest.raises(DatabaseError) as caught, map_errors():
                await db.execute(r"DO $$ BEGIN RAISE EXCEPTION E'one\ntwo' USING DETAIL = E'three\nfour'; END $$")
            assert "one" in str(caught.value)
            assert "\n" not in str(caught.value)

    run(main())


def test_what_the_server_says_of_itself(dsn: str) -> None:
    """The same errors, but as they really come about."""

    async def main() -> None:
        async with connected(dsn) as other, connected(dsn, statement_timeout="50ms", lock_timeout="20ms") as db:
            cases: list[tuple[str, type[DatabaseError], str]] = [
                ("SELECT pg_sleep(10)", DatabaseUnavailable, "statement timeout"),
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


def test_a_value_that_asyncpg_cannot_send_is_refused_data(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db:
            for kind, value in (("text", 3), ("text", "\ud800"), ("int2", 70000), ("uuid", "x"), ("text", "a\0b")):
                with pytest.raises(DataRefused), map_errors():
                    await db.fetchval(f"SELECT $1::{kind}", value)
            assert await db.fetchval("SELECT 1") == 1

    run(main())


def test_a_connection_that_ended_is_unavailable(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as other:
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


def test_our_own_errors_and_the_callers_pass_untouched() -> None:
    for error in (PgtaskError("ours"), KeyError("theirs"), ValueError("theirs"), asyncio.CancelledError()):
        with pytest.raises(type(error)) as caught, map_errors():
            raise error
        assert caught.value is error


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_server_that_is_not_there_is_unavailable(dsn: str) -> None:
    async def main() -> None:
        port = str(free_port())
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


def test_a_server_that_says_nothing_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgtask._postgres.connection.CONNECT_TIMEOUT", 0.1)

    async def main() -> None:
        refusal = pytest.raises(DatabaseUnavailable, match="cannot reach the database: TimeoutError")
        with socket.create_server(("127.0.0.1", 0)) as silent, refusal:
            await connect(f"postgresql://127.0.0.1:{silent.getsockname()[1]}/db", name="test")

    run(main())


def test_who_may_not_come_in_is_refused(dsn: str, cluster: str) -> None:
    async def main() -> None:
        async with connected(cluster) as admin:
            await admin.execute("CREATE ROLE pgtask_no_login; CREATE ROLE pgtask_full LOGIN CONNECTION LIMIT 0")
            try:
                cases: list[tuple[str, type[DatabaseError], str]] = [
                    (with_database(dsn, "nowhere"), DatabaseRefused, 'database "nowhere" does not exist'),
                    (with_options(dsn, user="nobody-here"), DatabaseRefused, 'role "nobody-here" does not exist'),
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
def test_a_dsn_that_cannot_be_used_is_refused_without_its_password(bad: str) -> None:
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


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_keepalives_are_set_on_a_tcp_socket(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        keep_alive(SimpleNamespace(_transport=writer.transport))
        line = writer.transport.get_extra_info("socket")
        assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
        for name, value in wanted.items():
            if hasattr(socket, name):
                assert line.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value, name
        writer.close()
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(asyncio.wait_for(main(), 10))


def test_a_unix_socket_needs_no_keepalives() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        keep_alive(SimpleNamespace(_transport=SimpleNamespace(get_extra_info=lambda _: ours)))
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    keep_alive(SimpleNamespace(_transport=SimpleNamespace(get_extra_info=lambda _: None)))


def test_a_connection_over_tcp_has_keepalives(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as line, connected(line.dsn) as db:
            ours = db._transport.get_extra_info("socket")
            assert ours.family == socket.AF_INET
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1

    run(main())


def test_settings_hold_for_the_life_of_the_connection(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn, **HOT_SETTINGS) as db:
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


@asynccontextmanager
async def linked(dsn: str, **options: Any) -> AsyncIterator[tuple[Link, Any]]:
    """A link, and a connection of our own to meddle with."""
    link = Link(dsn, "test link", **options)
    async with connected(dsn) as db:
        try:
            yield link, db
        finally:
            await link.close()


def test_a_link_opens_once_and_again_when_it_was_lost(dsn: str) -> None:
    async def main() -> None:
        opened: list[Any] = []

        async def on_open(connection: Any) -> None:
            opened.append(connection)

        async with linked(dsn, on_open=on_open) as (link, db):
            await link.run("lanes")
            await link.run("lanes")
            assert opened == [link.connection]
            await db.execute("SELECT pg_terminate_backend($1, 5000)", opened[0].get_server_pid())
            await link.run("lanes")
            assert len(opened) == 2
            link.drop()
            assert opened[1].is_closed()
            await link.run("lanes")
            assert len(opened) == 3
            assert link.statements >= 4

    run(main())


def test_a_link_that_cannot_prepare_its_session_has_no_connection(dsn: str) -> None:
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


def test_a_statement_whose_backend_was_killed_is_sent_again(dsn: str) -> None:
    async def main() -> None:
        losses: list[Any] = []
        async with linked(dsn) as (link, db):
            connection = await link.open()
            async with db.transaction():
                await db.execute("LOCK TABLE pg_task")
                running = asyncio.create_task(link.run("lanes", on_loss=lambda: losses.append(connection)))
                await until_blocked(db, connection.get_server_pid())
                await db.execute("SELECT pg_terminate_backend($1, 5000)", connection.get_server_pid())
            assert await running == []
            assert losses == [connection]
            assert link.connection is not connection

    run(main())


def test_a_statement_whose_answer_was_lost_is_sent_again(dsn: str) -> None:
    async def main() -> None:
        losses: list[int] = []
        async with Line(dsn) as line, linked(line.dsn) as (link, db):
            await db.execute(INSERT)
            await link.run("expire", 1)
            await db.execute("UPDATE pg_task SET locked_by = id, lock_expires_at = now() - interval '1 s'")
            line.swallow()
            ((expired, _),) = await link.run("expire", 1, on_loss=lambda: losses.append(line.cut))
            assert (expired, losses) == (0, [1]), "the first attempt had done it"
            assert await db.fetchval("SELECT locked_by FROM pg_task") is None

    run(main())


def test_a_statement_that_does_not_end_is_cut_off_at_its_deadline(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (link, db):
            await link.run("lanes")
            async with db.transaction():
                await db.execute("LOCK TABLE pg_task")
                with pytest.raises(DatabaseUnavailable):
                    await link.once("lanes", deadline=0.05)
                assert link.connection is None
            assert await link.once("lanes") == []

    run(main())


def test_a_cancelled_statement_leaves_no_half_read_connection(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (link, db):
            await link.run("lanes")
            async with db.transaction():
                await db.execute("LOCK TABLE pg_task")
                waiting = asyncio.create_task(link.run("lanes"))
                await until_blocked(db, link.connection.get_server_pid())
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await waiting
                assert waiting.cancelled()
                assert link.connection is None
            assert await link.run("lanes") == []

    run(main())


def test_refused_data_keeps_the_connection(dsn: str) -> None:
    async def main() -> None:
        async with linked(dsn) as (link, _):
            await link.run("lanes")
            before = link.connection
            with pytest.raises(DataRefused):
                await link.run("find_keys", [3])
            assert link.connection is before

    run(main())
