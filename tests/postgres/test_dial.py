"""Dialling: several hosts of a DSN, the sessions that are wanted, the time of each host, and the lines of sockets."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import asyncpg
import pytest
import uvloop
from fix_commands import Command
from fix_database import run
from post import Write
from proxy import Line, with_options
from sessions import connected, linked, our_session

from pgtask import Client
from pgtask._dsn import check_dsn, redact
from pgtask._dsn_parameters import Host, read_dialling
from pgtask._postgres.connection import connect
from pgtask._postgres.dial import keep_alive, open_descriptors
from pgtask._postgres.lanes import lane_parameters
from pgtask._postgres.pools import user_pool
from pgtask.errors import DatabaseRefused, DatabaseUnavailable


def with_hosts(dsn: str, *before: str, **options: str) -> str:
    """Return the DSN with hosts, each as ADDRESS:PORT, before its own."""
    given = dict(parse_qsl(urlsplit(dsn).query))
    names = [*(host.rpartition(":")[0] for host in before), given["host"]]
    ports = [*(host.rpartition(":")[2] for host in before), given["port"]]
    return with_options(dsn, host=",".join(names), port=",".join(ports), **options)


def address_of(line: Line) -> str:
    return "127.0.0.1:" + dict(parse_qsl(urlsplit(line.dsn).query))["port"]


@pytest.fixture
def swallowing() -> Iterator[str]:
    """A host that takes everything and answers nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        yield f"127.0.0.1:{silent.getsockname()[1]}"


# --- several hosts -------------------------------------------------------------------------------------------


def test_host_that_swallows_costs_a_moment_once(dsn: str, swallowing: str) -> None:
    where = with_hosts(dsn, swallowing)

    async def main() -> list[float]:
        times = []
        for _ in range(2):
            began = time.monotonic()
            await (await connect(where, name="test")).close()
            times.append(time.monotonic() - began)
        return times

    first, second = run(main())
    assert 0.25 <= first < 1
    assert second < 0.25, "the host that was usable comes first"


def test_each_door_leaves_a_host_that_swallows(
    dsn: str, swallowing: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = with_hosts(dsn, swallowing)

    async def main() -> None:
        async with Client(where) as client, user_pool(where, size=1) as pool, linked(dsn) as (link, _):
            link._dsn = where
            await client.enqueue(Write("x"))
            assert await pool.fetchval("SELECT count(*) FROM pg_task") == 1
            assert len(await link.run("lanes", *lane_parameters(None))) == 1

    async def enter() -> None:
        async with asyncio.timeout(5):
            await main()

    run(enter())
    monkeypatch.setattr("pgtask._postgres.dial._last_good", {})
    began = time.monotonic()
    assert len(command("list", "--dsn", where, "--json").objects) == 1
    assert time.monotonic() - began < 1


def test_hosts_have_their_own_times_and_all_are_named(swallowing: str) -> None:
    other = swallowing.replace("127.0.0.1", "localhost")
    where = f"postgresql://ada:secret@{swallowing},127.0.0.1:1,{other}/db?connect_timeout=1"

    async def main() -> float:
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="no host is usable") as caught:
            await connect(where, name="test")
        for host in (swallowing, other):
            assert f"{host}: cannot reach the database: no answer in 1 s" in str(caught.value)
        assert "127.0.0.1:1: cannot reach the database: " in str(caught.value)
        assert "secret" not in str(caught.value)
        return time.monotonic() - began

    assert 1 < run(main()) < 1.9


def test_only_all_hosts_together_refuse(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as one, Line(dsn) as other:
            refusing = {"user": "no-such-role", "sslmode": "disable"}
            where = with_hosts(dsn, address_of(one), address_of(other), **refusing)
            with pytest.raises(DatabaseRefused, match=r'role "no-such-role" does not exist') as caught:
                await connect(where, name="test")
            assert str(caught.value).count("does not exist") == 3
            with pytest.raises(DatabaseUnavailable, match=r'role "no-such-role" does not exist'):
                await connect(with_hosts(dsn, "127.0.0.1:1", **refusing), name="test")

    run(main())


def test_losers_leave_no_session(dsn: str, swallowing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgtask._postgres.dial.STAGGER", 0.0)
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'test loser'"

    async def main() -> None:
        async with Line(dsn) as one, Line(dsn) as other, connected(dsn) as db:
            where = with_hosts(dsn, swallowing, address_of(one), address_of(other), sslmode="disable")
            async with asyncio.timeout(5):  # the silent one is not waited for
                won = await connect(where, name="test loser")
            while await db.fetchval(sessions) != 1:  # noqa: ASYNC110  the server ends them
                await asyncio.sleep(0)
            assert len(open_descriptors()) == 1
            await won.close()
            where = f"postgresql://{swallowing},{swallowing}/db"
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(connect(where, name="test"), 0.05)
            assert len(asyncio.all_tasks()) == 1

    run(main())


def test_hosts_are_shuffled_for_balance(dsn: str) -> None:
    async def main() -> set[str]:
        async with Line(dsn) as line:
            where = with_hosts(dsn, address_of(line), load_balance_hosts="random", sslmode="disable")
            found: set[str] = set()
            while len(found) < 2:
                db = await connect(where, name="test")
                found.add(str(db._addr))
                await db.close()
            return found

    run(main())


# --- which session -------------------------------------------------------------------------------------------


def test_session_is_the_kind_that_is_asked_for(dsn: str) -> None:
    kinds = ("any", "read-write", "primary", "read-only", "standby", "prefer-standby")

    async def is_usable(where: str, kind: str) -> bool:
        try:
            db = await connect(with_options(where, target_session_attrs=kind), name="test")
        except DatabaseUnavailable as error:
            return f"target_session_attrs is {kind}" not in str(error)
        await db.close()
        return True

    async def usable(where: str) -> set[str]:
        return {kind for kind in kinds if await is_usable(where, kind)}

    async def main() -> None:
        both = with_hosts(dsn, "127.0.0.1:1")
        for where in (dsn, both):
            assert await usable(where) == {"any", "read-write", "primary", "prefer-standby"}
        async with our_session(dsn) as db:
            name = await db.fetchval("SELECT current_database()")
            await db.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        for where in (dsn, both):
            assert await usable(where) == {"any", "primary", "read-only", "prefer-standby"}
        await (await connect(dsn, name="test")).close()  # there is no other one
        with pytest.raises(DatabaseUnavailable, match="it is read-only, and target_session_attrs is read-write"):
            await connect(both, name="test")
        await (await connect(both, name="test", reads=True)).close()

    run(main())


def test_connection_that_may_not_write_is_left(dsn: str) -> None:
    """As one to a primary that has become a standby. Those beside it in a pool of ours are left too."""

    async def become_read_only(client: Client) -> None:
        connection = client._store.connection  # type: ignore[attr-defined]
        async with connection() as one, connection() as other:
            for db in (one, other):
                await db.execute("SET default_transaction_read_only = on")

    async def main() -> None:
        async with Client(dsn, pool_size=2) as client, user_pool(dsn, size=1) as pool:
            for write in (lambda: client.enqueue(Write("x")), lambda: client.enqueue_many([Write("x")])):
                await become_read_only(client)
                with pytest.raises(DatabaseUnavailable, match="25006"):
                    await write()
                await asyncio.gather(write(), write())
            left = await pool.fetchval("SELECT pg_backend_pid()")
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await pool.execute("BEGIN READ ONLY; UPDATE pg_task SET tried = 1")
            assert await pool.fetchval("SELECT pg_backend_pid()") != left

    run(main())


# --- parameters ----------------------------------------------------------------------------------------------

HONOURED = dict(
    [
        *(("connect_timeout", "3"), ("target_session_attrs", "primary"), ("load_balance_hosts", "random")),
        *(("keepalives", "1"), ("keepalives_idle", "7"), ("keepalives_interval", "0"), ("keepalives_count", "4")),
        *(("tcp_user_timeout", "9000"), ("channel_binding", "prefer"), ("gssencmode", "disable")),
        *(("client_encoding", "UTF8"), ("sslcompression", "0"), ("fallback_application_name", "x")),
        *(("sslcertmode", "allow"), ("sslsni", "1"), ("max_protocol_version", "latest"), ("replication", "false")),
        *(("application_name", "x"), ("options", "-cwork_mem=1MB"), ("sslmode", "prefer")),
    ]
)
REFUSED = [
    *(("connect_timeout", "0"), ("target_session_attrs", "writable"), ("load_balance_hosts", "yes")),
    *(("keepalives", "0"), ("keepalives_idle", "32768"), ("keepalives_interval", "-1"), ("keepalives_count", "128")),
    *(("tcp_user_timeout", "1s"), ("channel_binding", "require"), ("client_encoding", "latin1")),
    *(("gssencmode", "require"), ("hostaddr", "10.0.0.1"), ("require_auth", "scram-sha-256"), ("requirepeer", "x")),
    *(("sslcertmode", "require"), ("sslcrldir", "/x"), ("sslsni", "0"), ("min_protocol_version", "3.2")),
    *(("oauth_issuer", "x"), ("replication", "database"), ("scram_client_key", "x"), ("servicefile", "/x")),
    *(("requiressl", "1"), ("sslkeylogfile", "/x"), ("sslcompression", "1")),
]


def test_parameters_of_libpq_are_honoured_or_refused(dsn: str) -> None:
    async def main() -> None:
        where = with_options(dsn, **HONOURED)
        async with our_session(where) as db:
            assert await db.fetchval("SHOW work_mem") == "1MB"
        both = with_hosts(dsn, "127.0.0.1:1", **HONOURED)
        await (await connect(both, name="test")).close()

    run(main())
    for name, value in REFUSED:
        with pytest.raises(ValueError, match=f"its option {name} cannot be honoured: ") as caught:
            check_dsn(f"postgresql://u:secret@h/db?{name}={value}")
        assert "secret" not in str(caught.value)
        check_dsn(f"postgresql://h/db?{name}=")  # none, as for libpq


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("PGCHANNELBINDING", "require", "sslmode=verify-full"),
        ("PGHOSTADDR", "10.0.0.1", "as the host"),
        ("PGCONNECT_TIMEOUT", "0", "whole seconds"),
    ],
)
def test_environment_is_honoured_or_refused(
    dsn: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(variable, value)

    async def main() -> None:
        with pytest.raises(DatabaseRefused, match=rf"{variable} of the environment cannot be honoured: .*{remedy}"):
            await connect(dsn, name="test")

    run(main())


def test_hosts_and_parameters_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hosts = (Host("a", 1), Host("::1", 2), Host("/run", 5432))
    for dsn in (
        "postgresql://u:p@a:1,[::1]:2,%2Frun/db",
        "postgresql:///db?host=a,[::1],/run&port=1,2,5432",
    ):
        assert read_dialling(check_dsn(dsn)).hosts == hosts
    assert [str(host) for host in hosts] == ["a:1", "[::1]:2", "/run"]
    assert read_dialling("postgresql://a:1/db").hosts == ()
    for dsn in ("postgresql://a,/db", "postgresql:///db?host=a,b&port=1,2,3", "postgresql:///db?host=a,b&port=x"):
        with pytest.raises(ValueError, match="HOST:PORT,HOST:PORT"):
            read_dialling(dsn)

    monkeypatch.setenv("PGHOST", "c,d")
    monkeypatch.setenv("PGPORT", "6000")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "7")
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "primary")
    monkeypatch.setenv("PGLOADBALANCEHOSTS", "random")
    found = read_dialling("postgresql:///db?sslmode=disable&keepalives_idle=60")
    assert found.dsn == "postgresql:///db?sslmode=disable"
    assert found.hosts == (Host("c", 6000), Host("d", 6000))
    assert (found.connect_timeout, found.session, found.is_balanced) == (7.0, "primary", True)
    assert found.keepalive["TCP_USER_TIMEOUT"] == 65_000

    services = tmp_path / "services"
    services.write_text("[shop]\nhost=e,f\nport=7000,7001\nconnect_timeout=8\npassword=50%\n[bad]\nrequirepeer=x\n")
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    found = read_dialling("postgresql:///db?service=shop")
    assert (found.dsn, found.connect_timeout) == ("postgresql:///db?service=shop", 8.0)
    assert found.hosts == (Host("e", 7000), Host("f", 7001))
    with pytest.raises(ValueError, match="requirepeer of the service file cannot be honoured"):
        read_dialling("postgresql:///db?service=bad")


def test_parameters_are_shown_where_they_hold_no_secret() -> None:
    dsn = "postgresql://u:secret@h/db?connect_timeout=3&load_balance_hosts=random"
    assert redact(dsn) == dsn.replace("secret", "***")
    assert "key" not in redact("postgresql://h/db?scram_client_key=key")


# --- the lines -----------------------------------------------------------------------------------------------

OURS = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
ASKED = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 67_000}
IMPATIENT = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 2_500}


def keepalive_of(connection: Any) -> dict[str, int]:
    line = connection._transport.get_extra_info("socket")
    assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    return {name: line.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in OURS if hasattr(socket, name)}


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_lines_have_keepalives(dsn: str, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        async with Line(dsn) as line:
            for options, wanted in (({}, OURS), ({"keepalives_idle": "60", "keepalives_count": "4"}, ASKED)):
                async with our_session(with_options(line.dsn, **options)) as db:
                    assert keepalive_of(db) == {name: wanted[name] for name in keepalive_of(db)}
            async with (
                Client(line.dsn, pool_size=1) as client,
                user_pool(line.dsn, size=1) as pool,
                client._store.connection() as db,  # type: ignore[attr-defined]
                pool.acquire() as other,
            ):
                assert keepalive_of(db) == keepalive_of(other) == {name: OURS[name] for name in keepalive_of(db)}

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(asyncio.wait_for(main(), 20))


def test_unix_socket_needs_no_keepalives() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        keep_alive(SimpleNamespace(_transport=SimpleNamespace(get_extra_info=lambda _: ours)), OURS)
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    keep_alive(SimpleNamespace(_transport=SimpleNamespace(get_extra_info=lambda _: None)), OURS)


def test_new_primary_makes_lines_to_the_old_one_impatient(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as old, Line(dsn) as other:
            where = with_hosts(dsn, address_of(old), sslmode="disable")
            before = await connect(where, name="test")
            elsewhere = await connect(other.dsn, name="test")
            assert before._addr == ("127.0.0.1", int(address_of(old).rpartition(":")[2]))
            old._server.close()
            after = await connect(where, name="test")
            assert isinstance(after._addr, str)
            assert keepalive_of(before) == {name: IMPATIENT[name] for name in keepalive_of(before)}
            assert keepalive_of(elsewhere) == {name: OURS[name] for name in keepalive_of(elsewhere)}
            assert await before.fetchval("SELECT 1") == 1, "a line that is alive stays"
            for db in (before, elsewhere, after):
                await db.close()

    run(main())
