"""`pgtask.statement`: the SQL of an enqueue, for a driver that pgtask does not know."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import psycopg
import psycopg2
import pytest
from fix_database import run
from post import Numbered, Send, Sweep, Write

import pgtask
from pgtask import Client, EnqueueError

HOUR = timedelta(hours=1)
pytestmark = pytest.mark.one_database
COLUMNS = """
    SELECT step, queue, priority, key, wakeup_at > now() + interval '59 min',
        CASE WHEN wakeup_at > now() + interval '61 min' THEN wakeup_at END
    FROM pg_task"""


def by_asyncpg(dsn: str, sql: str, values: Any) -> Any:
    async def main() -> Any:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchval(sql, *values)
        finally:
            await connection.close()

    return run(main())


def by_psycopg(dsn: str, sql: str, values: Any) -> Any:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(sql, values).fetchone()
    return row and row[0]


def by_raw_psycopg(dsn: str, sql: str, values: Any) -> Any:
    with psycopg.connect(dsn, cursor_factory=psycopg.RawCursor) as connection:
        row = connection.execute(sql.encode(), values).fetchone()
    return row and row[0]


def by_psycopg2(dsn: str, sql: str, values: Any) -> Any:
    connection = psycopg2.connect(dsn)
    with connection, connection.cursor() as cursor:
        cursor.execute(sql, values)
        row = cursor.fetchone()
    connection.close()
    return row and UUID(row[0])


SENT: dict[str, tuple[str, Callable[[str, str, Any], Any]]] = {
    "asyncpg": ("numeric", by_asyncpg),
    "raw psycopg": ("numeric", by_raw_psycopg),
    "psycopg": ("format", by_psycopg),
    "psycopg by name": ("pyformat", by_psycopg),
    "psycopg2": ("format", by_psycopg2),
    "psycopg2 by name": ("pyformat", by_psycopg2),
}
SUMMER = datetime(2036, 7, 1, tzinfo=UTC)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"key": "k %s 100%"},
    {"queue": "q", "priority": -5},
    {"after": HOUR},
    {"at": SUMMER, "key": "k"},
]


async def by_the_client(client: Client, step: Any, options: dict[str, Any]) -> UUID:
    rest = {name: value for name, value in options.items() if name not in ("after", "at")}
    if "after" in options:
        return await client.delay(step, options["after"], **rest)
    if "at" in options:
        return await client.schedule(step, options["at"], **rest)
    return await client.enqueue(step, **rest)


@pytest.mark.parametrize("driver", SENT)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "plain")
def test_it_inserts_what_the_client_inserts(dsn: str, driver: str, options: dict[str, Any]) -> None:
    style, send = SENT[driver]
    for step in (Write("100% 'sure' $1 %s"), Send("x", copies=2), Sweep()):
        found = []
        for is_client in (True, False):
            with psycopg.connect(dsn) as look:
                look.execute("DELETE FROM pg_task")
            if is_client:

                async def main(step: Any = step) -> UUID:
                    async with Client(dsn) as client:
                        return await by_the_client(client, step, options)

                id = run(main())
            else:
                sql, values = pgtask.statement(step, style=style, **options)  # type: ignore[call-overload]
                id = send(dsn, sql, values)
            with psycopg.connect(dsn) as look:
                assert look.execute("SELECT id FROM pg_task").fetchall() == [(id,)]
                found.append(look.execute(COLUMNS).fetchall())
        assert found[0] == found[1]


def test_a_key_that_a_task_has_gives_no_row(dsn: str) -> None:
    for expected in (False, True):
        sql, values = pgtask.statement(Write("x"), key="k", style="format")
        assert (by_psycopg(dsn, sql, values) is None) is expected


@pytest.mark.parametrize("driver", SENT)
def test_it_does_to_another_task_what_the_client_does(dsn: str, driver: str) -> None:
    style, send = SENT[driver]

    def enqueue(text: str, **options: Any) -> Any:
        sql, values = pgtask.statement(Write(text), key="k %", style=style, **options)  # type: ignore[call-overload]
        return send(dsn, sql, values)

    with psycopg.connect(dsn, autocommit=True) as look:

        def texts() -> list[Any]:
            rows = look.execute("SELECT step::json -> 'Post' -> 'Write' ->> 'text' FROM pg_task ORDER BY key DESC")
            return [text for (text,) in rows.fetchall()]

        first = enqueue("first", on_conflict="replace", expires=HOUR)
        assert enqueue("second", on_conflict="replace") == first
        assert texts() == ["second"]
        assert enqueue("third", debounce=HOUR, ceiling=HOUR, on_parked="revive") == first
        assert look.execute("SELECT wakeup_at > now() + interval '59 min' FROM pg_task").fetchall() == [(True,)]
        behind = enqueue("fourth", on_conflict="after")
        assert texts() == ["third", "fourth"]
        look.execute("UPDATE pg_task SET error = 'wrong' WHERE id = %s", [first])
        assert enqueue("fifth", on_parked="replace") == first
        assert texts() == ["fifth", "fourth"]
        assert behind != first


def test_its_row_says_what_became_of_the_step(dsn: str) -> None:
    found = []
    for _ in range(2):
        sql, values = pgtask.statement(Write("x"), key="k", on_conflict="replace", style="format")
        with psycopg.connect(dsn) as connection:
            row = connection.execute(sql, values).fetchone()
        assert row is not None
        found.append(row[1:3])
    assert found == [("Post/k", "new"), ("Post/k", "replaced")]


def test_the_text_has_no_comment_and_stays_the_same() -> None:
    for style, first in (("numeric", "$1"), ("format", "%s"), ("pyformat", "%(p1)s")):
        (one, _), (two, _) = (pgtask.statement(Numbered(n), style=style) for n in (1, 2))  # type: ignore[call-overload]
        assert one == two
        assert "--" not in one
        assert one.startswith("INSERT INTO pg_task")
        assert first in one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": ""}, "key '' must be 1 to 512 characters"),
        ({"priority": 10**6}, "priority"),
        ({"after": HOUR, "at": SUMMER}, "either after= or at="),
        ({"at": datetime(2036, 7, 1)}, "has no time zone"),
        ({"on_conflict": "after"}, "give key= as well"),
        ({"key": "k", "debounce": 5}, "debounce=5 must be a timedelta"),
        ({"key": "k", "debounce": HOUR, "after": HOUR}, "leave out after= and at="),
        ({"expires": HOUR, "after": 2 * HOUR}, "would never start"),
        ({"style": "qmark"}, "style='qmark' must be one of 'numeric', 'format', 'pyformat'"),
    ],
)
def test_it_refuses_what_the_client_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EnqueueError, match=message):
        pgtask.statement(Write("x"), **options)
    with pytest.raises(EnqueueError, match="Write is a class"):
        pgtask.statement(Write)  # type: ignore[call-overload]
