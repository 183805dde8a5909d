"""What is no connection that a door leads to, and what a door imports."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import asyncpg
import psycopg
import psycopg2
import psycopg2.pool
import pytest
import sqlalchemy
from door_kit import ALL, Django, play_door, run_sync
from fix_database import run
from post import Write
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from pgtask import Client, EnqueueError, SyncClient

pytestmark = [
    pytest.mark.one_database,
    pytest.mark.filterwarnings("ignore:Accessing the database during app initialization:RuntimeWarning"),
]


def sqlite_session() -> Session:
    return Session(sqlalchemy.create_engine("sqlite://"))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "Engine": (lambda: sqlalchemy.create_engine("postgresql+psycopg://"), "an Engine; pass .* with engine.begin()"),
    "AsyncEngine": (lambda: create_async_engine("postgresql+psycopg://"), "an Engine; pass a connection"),
    "sessionmaker": (sessionmaker, "a sessionmaker; call it, and pass the session"),
    "async_sessionmaker": (async_sessionmaker, "a async_sessionmaker; call it"),
    "another database": (sqlite_session, r"of sqlite\+pysqlite; pgtask takes those of postgresql"),
    "unbound session": (Session, "conn= cannot be used: This session is not bound"),
    "without autobegin": (
        lambda: Session(sqlalchemy.create_engine("postgresql+psycopg://"), autobegin=False),
        "conn= cannot be used: Autobegin is disabled",
    ),
    "statement": (lambda: sqlalchemy.text("SELECT 1"), "a TextClause of SQLAlchemy; pass the session"),
    "text": (lambda: "postgresql:///app", "'postgresql:///app' is no.* connection.* of .*psycopg, psycopg2, SQL"),
    "psycopg2 pool": (
        lambda: psycopg2.pool.SimpleConnectionPool(0, 1, ""),
        r"conn= is a pool; take a connection from it: pool.getconn\(\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_connection_is_refused(wrong: str) -> None:
    make, message = WRONG[wrong]
    conn = make()
    with pytest.raises(EnqueueError, match=message):
        run(Client().enqueue(Write("x"), conn=conn))
    if wrong != "AsyncEngine":
        with pytest.raises(EnqueueError, match=message):
            SyncClient().enqueue(Write("x"), conn=conn)


def test_what_belongs_to_a_connection_is_not_it(dsn: str) -> None:
    with psycopg.connect(dsn) as one, psycopg2.connect(dsn) as two, one.cursor() as first, two.cursor() as second:
        for cursor in (first, second):
            with pytest.raises(EnqueueError, match=r"conn= is a [cC]ursor of psycopg2?; pass the connection itself"):
                SyncClient().enqueue(Write("x"), conn=cursor)
    two.close()


def test_a_sync_client_takes_no_async_connection(dsn: str) -> None:
    async def main() -> None:
        one, two = await asyncpg.connect(dsn), await psycopg.AsyncConnection.connect(dsn)
        engine = create_async_engine("postgresql+psycopg://")
        for conn in (one, two, AsyncSession(engine), engine.connect()):
            with pytest.raises(EnqueueError, match="is an async connection; a SyncClient takes a sync one"):
                SyncClient().enqueue(Write("x"), conn=conn)
        await one.close()
        await two.close()
        two = psycopg2.connect(dsn, async_=1)
        with pytest.raises(EnqueueError, match="connect without async_=1"):
            SyncClient().enqueue(Write("x"), conn=two)
        two.close()

    run(main())


def test_an_async_scoped_session_is_the_session_of_the_task(dsn: str) -> None:
    async def main() -> int:
        engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(dsn))
        scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
        async with scoped() as session:
            await Client().enqueue(Write("x"), conn=scoped)
            found = int((await session.execute(sqlalchemy.text("SELECT count(*) FROM pg_task"))).scalar_one())
        await scoped.remove()
        await engine.dispose()
        return found

    assert run(main()) == 1


def test_django_refuses_event_loops_and_other_threads(dsn: str) -> None:
    caller = Django()
    run_sync(caller.connect(dsn))
    run_sync(caller.begin())
    wrapper = caller.conn._connections["default"]
    try:
        with pytest.raises(EnqueueError, match="Django forbids to use in an event loop: call a SyncClient in"):
            run(Client().enqueue(Write("x"), conn=caller.conn))
        errors: list[Any] = []

        def elsewhere() -> None:
            try:
                SyncClient().enqueue(Write("x"), conn=wrapper)
            except EnqueueError as error:
                errors.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert "conn= cannot be used: DatabaseWrapper objects created in a thread" in str(errors[0])
        SyncClient().enqueue(Write("x"), conn=wrapper)
    finally:
        run_sync(caller.rollback())
        run_sync(caller.close())


REMEDIES = {
    "psycopg": "with conn.transaction()",
    "psycopg2": "conn.autocommit = False",
    "Session on psycopg": 'its isolation_level is "AUTOCOMMIT"',
    "Django": r"call this within transaction.atomic\(\)",
    "asyncpg": r"async with conn.transaction\(\)",
}


@pytest.mark.parametrize("name", REMEDIES)
def test_the_refusal_outside_of_a_transaction_names_the_remedy(dsn: str, name: str) -> None:
    async def scenario(client: Any, caller: Any, look: Any) -> None:
        await caller.leave()
        with pytest.raises(EnqueueError, match=REMEDIES[name]):
            await client.enqueue(Write("x"), conn=caller.conn)

    play_door(name, dsn, scenario)


LOADED = "print(sorted({'psycopg', 'psycopg2', 'sqlalchemy', 'django', 'uvloop', 'ctypes'} & set(sys.modules)))"


def loaded(program: str) -> str:
    command = [sys.executable, "-c", f"import sys, pgtask; {program}; {LOADED}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_pgtask_imports_no_driver_but_asyncpg() -> None:
    assert loaded("pass") == "[]"
    assert loaded("import pgtask.sync_client") == "['ctypes', 'uvloop']"


def test_a_door_imports_nothing_that_is_not_there(dsn: str) -> None:
    enqueue = f"import psycopg2; conn = psycopg2.connect({dsn!r}); import post; pgtask.SyncClient().enqueue"
    program = f"sys.path[:0] = {sys.path!r}; {enqueue}(post.Write('x'), conn=conn)"
    assert "psycopg'" not in loaded(program)


assert set(REMEDIES) <= set(ALL)


def test_django_works_on_psycopg2(dsn: str) -> None:
    program = """
    sys.modules["psycopg"] = None
    from django.conf import settings
    import psycopg2.extensions, os, post, client_kit
    where = psycopg2.extensions.parse_dsn(os.environ["DATABASE_URL"])
    names = {"NAME": "dbname", "USER": "user", "HOST": "host", "PORT": "port"}
    database = {"ENGINE": "django.db.backends.postgresql", **{ours: where.get(its, "") for ours, its in names.items()}}
    settings.configure(USE_TZ=True, DATABASES={"default": database})
    import django
    django.setup()
    from django.db import connection, transaction
    client = pgtask.SyncClient()
    with transaction.atomic():
        ids = [client.enqueue(post.Write("100% 'sure'"), key="k", conn=connection)]
        ids += client.enqueue_many(client_kit.numbered(5000), conn=connection)
        ids += client.enqueue_many(client_kit.numbered(3), key=repr, conn=connection)
    assert connection.connection.__class__.__module__.startswith("psycopg2")
    with connection.cursor() as cursor:
        cursor.execute("SELECT id FROM pg_task ORDER BY id")
        assert sorted(ids) == [row[0] for row in cursor.fetchall()]
    try:
        with transaction.atomic():
            client.enqueue_many(client_kit.numbered(5000), conn=connection)
            raise KeyError
    except KeyError:
        pass
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_task")
        print(cursor.fetchone()[0])
    """
    lines = "\n".join(line[4:] for line in program.splitlines())
    command = [sys.executable, "-c", f"import sys, pgtask\nsys.path[:0] = {sys.path!r}\n{lines}"]
    environment = {**os.environ, "DATABASE_URL": dsn}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.stdout, done.returncode) == ("5004\n", 0), done.stderr
