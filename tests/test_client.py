"""Producing: what is stored, what is refused before it is sent, keys, their races, bulk, the caller's transaction."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from functools import partial
from itertools import islice
from typing import Annotated, Any
from uuid import UUID

import asyncpg
import msgspec
import pytest
from conftest import _fresh_database, run, with_database

from pgtask import Client, Context, Done, Policy, Task
from pgtask._ids import TaskIds
from pgtask.client import CHUNK_TASKS
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.errors import DatabaseRefused, DatabaseUnavailable, EnqueueError, PgtaskError, SchemaError

HOUR = timedelta(hours=1)
EVERY_LEASE = "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() + interval '1 hour'"


# --- the tasks -----------------------------------------------------------------------------------------------


class Post(Task):
    """The family; its policy is the default of its steps."""

    policy = Policy(queue="post", priority=3)


class Write(Post):
    text: str

    async def run(self, ctx: Context) -> Done:
        return Done()


class Send(Post):
    """Has a policy of its own."""

    policy = Policy(queue="outgoing", priority=-7)
    to: str
    copies: int = 1

    async def run(self, ctx: Context) -> Done:
        return Done()


class Sweep(Post):
    """Without fields: serde's unit struct."""

    async def run(self, ctx: Context) -> Done:
        return Done()


class Wait(Post):
    """Serde's newtype."""

    transparent = True
    seconds: float

    async def run(self, ctx: Context) -> Done:
        return Done()


class Numbered(Post):
    n: int

    async def run(self, ctx: Context) -> Done:
        return Done()


class Address(msgspec.Struct):
    street: str
    number: int | None = None


class Everything(Post):
    flag: bool
    ratio: float
    large: int
    tags: list[str]
    home: Address
    counts: dict[str, int]
    nothing: None = None

    async def run(self, ctx: Context) -> Done:
        return Done()


class Anything(Post):
    value: Any

    async def run(self, ctx: Context) -> Done:
        return Done()


class Small(Post):
    n: Annotated[int, msgspec.Meta(le=10)]

    async def run(self, ctx: Context) -> Done:
        return Done()


class Nowhere(tzinfo):
    """A time zone that does not say where it is: a datetime with it is naive all the same."""

    def utcoffset(self, _at: datetime | None) -> None:
        return None

    dst = tzname = utcoffset


class Unfit(Task):
    """Steps that `App(Unfit)` refuses, but a producer needs no `App`."""


class UnknownType(Unfit):
    field: NotThere  # type: ignore[name-defined]  # noqa: F821


class BareTwo(Unfit):
    transparent = True
    one: int = 1
    two: int = 2


class NoPolicy(Unfit):
    policy = {"queue": "post"}  # type: ignore[assignment]  # noqa: RUF012


# --- tools ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(cluster: str, template: str) -> Iterator[str]:
    yield from _fresh_database(cluster, template)


@pytest.fixture
def dsn(database: str) -> str:
    """One database for this module, emptied before each test: making one takes longer than most tests here."""

    async def empty() -> None:
        db = await asyncpg.connect(database)
        await db.execute("DELETE FROM pg_task")
        await db.close()

    asyncio.run(empty())
    return database


Scenario = Callable[[Client, Any], Awaitable[None]]


@asynccontextmanager
async def connected(dsn: str, **options: Any) -> AsyncIterator[Any]:
    db = await asyncpg.connect(dsn, **options)
    try:
        yield db
    finally:
        await db.close()


@asynccontextmanager
async def opened(dsn: str, **options: Any) -> AsyncIterator[tuple[Client, Any]]:
    """A client, and a connection of our own to look and to meddle with."""
    async with Client(dsn, **options) as client, connected(dsn) as db:
        yield client, db


def play(dsn: str, scenario: Scenario, **options: Any) -> None:
    async def main() -> None:
        async with opened(dsn, **options) as (client, db):
            await scenario(client, db)

    run(main())


async def count(db: Any) -> int:
    return int(await db.fetchval("SELECT count(*) FROM pg_task"))


async def until(db: Any, condition: str, *args: Any) -> None:
    """Wait until a query gives true. Bounded by `run`."""
    while not await db.fetchval(condition, *args):  # noqa: ASYNC110  what changes it is another process
        await asyncio.sleep(0)


async def until_blocked(db: Any, pid: int) -> None:
    await until(db, "SELECT cardinality(pg_blocking_pids($1)) > 0", pid)


def numbered(n: int) -> Iterator[Numbered]:
    return (Numbered(i) for i in range(n))


async def slowly(steps: Iterator[Numbered]) -> AsyncIterator[Numbered]:
    for step in steps:
        if step.n % 100 == 0:
            await asyncio.sleep(0)
        yield step


def numbers_in(rows: list[Any]) -> list[int]:
    return [msgspec.json.decode(row["step"])["Post"]["Numbered"]["n"] for row in rows]


async def in_order(db: Any, ids: list[UUID]) -> list[Any]:
    """The rows of these ids, in their order."""
    rows: list[Any] = await db.fetch(
        "SELECT pg_task.* FROM unnest($1::uuid[]) WITH ORDINALITY AS wanted (id, place) JOIN pg_task USING (id)"
        " ORDER BY place",
        ids,
    )
    return rows


# --- what is stored ------------------------------------------------------------------------------------------

SERDE: list[tuple[Task, str]] = [
    (Write("hello"), '{"Post":{"Write":{"text":"hello"}}}'),
    (Write(""), '{"Post":{"Write":{"text":""}}}'),
    (Write("grüße 🐘"), '{"Post":{"Write":{"text":"grüße 🐘"}}}'),
    (Write('"\\/\b\f\n\r\t'), '{"Post":{"Write":{"text":"\\"\\\\/\\b\\f\\n\\r\\t"}}}'),
    (Write("\0\x1b\x7f"), '{"Post":{"Write":{"text":"\\u0000\\u001b\x7f"}}}'),
    (Send("x"), '{"Post":{"Send":{"to":"x","copies":1}}}'),
    (Sweep(), '{"Post":{"Sweep":null}}'),
    (Wait(3.0), '{"Post":{"Wait":3.0}}'),
    (Wait(1e16), '{"Post":{"Wait":1e16}}'),
    (
        Everything(True, 0.1, 2**63, ["a", "b"], Address("Elm"), {"k": -1}),
        '{"Post":{"Everything":{"flag":true,"ratio":0.1,"large":9223372036854775808,"tags":["a","b"],'
        '"home":{"street":"Elm","number":null},"counts":{"k":-1},"nothing":null}}}',
    ),
]


@pytest.mark.parametrize(("step", "text"), SERDE, ids=lambda value: type(value).__name__)
def test_step_is_stored_as_serde_writes_it(dsn: str, step: Task, text: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        one = await client.enqueue(step)
        (many,) = await client.enqueue_many([step])
        (keyed,) = await client.enqueue_many([step], key=lambda _: "key")
        rows = await in_order(db, [one, many, keyed])
        assert [row["step"] for row in rows] == [text] * 3

    play(dsn, scenario)


def test_a_new_row_is_waiting_untried_and_due_now(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with db.transaction():
            ids = [await client.enqueue(Write("x"), conn=db)]
            ids += await client.enqueue_many([Write("x")], conn=db)
            ids += await client.enqueue_many([Write("x")], key=lambda _: "key", conn=db)
            for row, key in zip(await in_order(db, ids), [None, None, "key"], strict=True):
                begun, now = await db.fetchrow("SELECT now(), clock_timestamp()")
                assert (row["created_at"], row["updated_at"]) == (begun, begun)
                assert begun <= row["wakeup_at"] <= now
                assert (row["tried"], row["claims"], row["key"]) == (0, 0, key)
                assert (row["error"], row["locked_by"], row["lock_expires_at"]) == (None, None, None)

    play(dsn, scenario)


def test_delay_counts_by_the_clock_of_the_database(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        for delay in (timedelta(0), timedelta(microseconds=1), timedelta(minutes=5), timedelta(days=10_000)):
            async with db.transaction():
                task = await client.delay(Write("x"), delay, conn=db)
                left = "SELECT wakeup_at - clock_timestamp(), wakeup_at - now() FROM pg_task WHERE id = $1"
                least, most = await db.fetchrow(left, task)
                assert least <= delay <= most

    play(dsn, scenario)


def test_schedule_takes_a_time_of_any_zone(dsn: str) -> None:
    at = datetime(2031, 5, 6, 7, 8, 9, 123456, tzinfo=timezone(timedelta(hours=5, minutes=45)))

    async def scenario(client: Client, db: Any) -> None:
        for when in (at, datetime(1999, 1, 1, tzinfo=UTC)):
            task = await client.schedule(Write("x"), when)
            assert await db.fetchval("SELECT wakeup_at FROM pg_task WHERE id = $1", task) == when

    play(dsn, scenario)


LANES: list[tuple[Task, dict[str, Any], tuple[str, int]]] = [
    (Write("x"), {}, ("post", 3)),
    (Send("x"), {}, ("outgoing", -7)),
    (Send("x"), {"queue": "other"}, ("other", -7)),
    (Send("x"), {"priority": 0}, ("outgoing", 0)),
    (Send("x"), {"queue": "grün", "priority": 32767}, ("grün", 32767)),
    (Send("x"), {"queue": "q" * 255, "priority": -32768}, ("q" * 255, -32768)),
]


@pytest.mark.parametrize(("step", "options", "lane"), LANES)
def test_queue_and_priority_come_from_the_policy_unless_given(
    dsn: str, step: Task, options: dict[str, Any], lane: tuple[str, int]
) -> None:
    async def scenario(client: Client, db: Any) -> None:
        ids = [
            await client.enqueue(step, **options),
            await client.delay(step, HOUR, **options),
            await client.schedule(step, datetime.now(UTC), **options),
            *await client.enqueue_many([step], **options),
            *await client.enqueue_many([step], key=lambda _: "key", **options),
        ]
        assert [(row["queue"], row["priority"]) for row in await in_order(db, ids)] == [lane] * 5

    play(dsn, scenario)


def test_plain_sql_needs_a_step_only(dsn: str) -> None:
    async def scenario(_: Client, db: Any) -> None:
        ours = ("default", 0, None, None, None, None, 0, 0)
        step = '{"Post":{"Sweep":null}}'
        await db.execute("INSERT INTO pg_task (step) VALUES ($1)", step)
        await db.execute("INSERT INTO pg_task (step, wakeup_at) VALUES ($1, now())", step)
        for row in await db.fetch("SELECT * FROM pg_task"):
            rest = ("queue", "priority", "key", "error", "locked_by", "lock_expires_at", "tried", "claims")
            assert tuple(row[name] for name in rest) == ours
            assert row["id"].version == (7 if db.get_server_version().major >= 18 else 4)
            assert row["created_at"] == row["updated_at"] <= row["wakeup_at"]
        assert await db.fetchval("SELECT count(*) FROM pg_task WHERE wakeup_at <= now()") == 2

    play(dsn, scenario)


# --- what is refused -----------------------------------------------------------------------------------------

Call = Callable[[Client, Any], Awaitable[Any]]


def one(step: Any, **options: Any) -> Call:
    return lambda client, conn: client.enqueue(step, conn=conn, **options)


def later(delay: Any) -> Call:
    return lambda client, conn: client.delay(Write("x"), delay, conn=conn)


def at(when: Any) -> Call:
    return lambda client, conn: client.schedule(Write("x"), when, conn=conn)


NO_STEP = r"not a step"
LONG = "x" * DEFAULT_MAX_STEP_BYTES

REFUSED: dict[str, tuple[Call, str]] = {
    "naive time": (at(datetime(2030, 1, 1)), "no time zone"),
    "zone without offset": (at(datetime(2030, 1, 1, tzinfo=Nowhere())), "no time zone"),
    "time as text": (at("2030-01-01T00:00:00Z"), "must be a datetime"),
    "no time": (at(None), "must be a datetime"),
    "time out of range": (at(datetime.max.replace(tzinfo=timezone(-HOUR))), "at="),
    "negative delay": (later(timedelta(microseconds=-1)), "zero or more"),
    "delay as number": (later(5), "must be a timedelta"),
    "delay out of range": (later(timedelta.max), "delay"),
    "not a step": (one("text"), "a value of type str is " + NO_STEP),
    "none": (one(None), "a value of type NoneType is " + NO_STEP),
    "class instead of step": (one(Write), r"^Write is a class: write Write\(\.\.\.\)$"),
    "family itself": (one(Post()), "a value of type Post is " + NO_STEP),
    "root itself": (one(Task()), "a value of type Task is " + NO_STEP),
    "struct that is no task": (one(Address("Elm")), "a value of type Address is " + NO_STEP),
    "wrong field type": (one(Send(3)), r"Post\.Send .*Expected `str`, got `int` - at `\$\.to`"),  # type: ignore[arg-type]
    "wrong nested field": (
        one(Everything(True, 0.1, 1, [1], Address("Elm"), {})),  # type: ignore[list-item]
        r"Post\.Everything .*\$\.tags\[0\]",
    ),
    "wrong newtype": (one(Wait("soon")), r"Post\.Wait .*Expected `float`"),  # type: ignore[arg-type]
    "broken constraint": (one(Small(11)), r"Post\.Small .*<= 10"),
    "not a number": (one(Wait(math.nan)), r"Post\.Wait .*got `null`"),
    "unserialisable": (one(Anything(object())), r"Post\.Anything cannot be stored as JSON: .*object"),
    "unserialisable inside": (one(Anything({"a": [lambda: 0]})), r"Post\.Anything cannot be stored as JSON"),
    "lone surrogate": (one(Write("\udc80")), r"Post\.Write cannot be stored as JSON"),
    "oversize": (one(Write(LONG)), rf"Post\.Write is \d+ bytes, more than the {DEFAULT_MAX_STEP_BYTES} allowed"),
    "queue of wrong type": (one(Write("x"), queue=3), "queue 3 must be"),
    "queue empty": (one(Write("x"), queue=""), "queue '' must be"),
    "queue too long": (one(Write("x"), queue="q" * 256), "must be"),
    "queue with NUL": (one(Write("x"), queue="a\0b"), "queue .* must be"),
    "queue not printable": (one(Write("x"), queue="a\nb"), "queue .* must be"),
    "queue with a surrogate": (one(Write("x"), queue="\ud800"), "queue .* must be"),
    "priority of wrong type": (one(Write("x"), priority="1"), "priority '1' must be"),
    "priority broken": (one(Write("x"), priority=1.0), "priority 1.0 must be"),
    "priority a truth": (one(Write("x"), priority=True), "priority True must be"),
    "priority too high": (one(Write("x"), priority=32768), "priority 32768 must be"),
    "priority too low": (one(Write("x"), priority=-32769), "priority -32769 must be"),
    "key of wrong type": (one(Write("x"), key=3), "key 3 must be"),
    "key empty": (one(Write("x"), key=""), "key '' must be"),
    "key too long": (one(Write("x"), key="k" * 513), "key .* must be"),
    "key with NUL": (one(Write("x"), key="a\0b"), "key .* must be"),
    "key with a surrogate": (one(Write("x"), key="\ud800"), "key .* must be"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_sent(dsn: str, call: Call, message: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        sent: list[Any] = []
        with db.query_logger(sent.append), pytest.raises(EnqueueError, match=message) as caught:
            await call(client, db)
        assert "\n" not in str(caught.value)
        assert sent == []
        with pytest.raises(EnqueueError, match=message):
            await call(client, None)
        assert await count(db) == 0

    play(dsn, scenario)


@pytest.mark.parametrize("step", [UnknownType(1), BareTwo(), NoPolicy()], ids=repr)
def test_a_step_that_no_app_would_take_is_refused_by_name(dsn: str, step: Task) -> None:
    async def scenario(client: Client, db: Any) -> None:
        with pytest.raises(PgtaskError, match=type(step).__name__):
            await client.enqueue(step)
        with pytest.raises(PgtaskError, match=type(step).__name__):
            await client.enqueue_many([step])
        assert await count(db) == 0

    play(dsn, scenario)


BARE_NOTHING = """
import asyncio, pgtask
class Unfit(pgtask.Task): pass
class BareNothing(Unfit): transparent = True
try:
    asyncio.run(pgtask.Client("postgresql:///").enqueue(BareNothing()))
except pgtask.PgtaskError as error:
    print(error)
"""


def test_a_bare_step_without_a_field_is_refused_too() -> None:
    """In a process of its own, since it used to crash the interpreter."""
    command = [sys.executable, "-c", BARE_NOTHING]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 0, ended
    assert "BareNothing" in ended.stdout


@pytest.mark.parametrize("wrong", [Write(LONG), Send(3), "text", Post()], ids=["oversize", "type", "no step", "family"])  # type: ignore[arg-type]
@pytest.mark.parametrize("key", [None, lambda step: str(id(step))], ids=["copy", "keyed"])
def test_one_wrong_step_among_many_leaves_none(dsn: str, wrong: Any, key: Any) -> None:
    async def scenario(client: Client, db: Any) -> None:
        steps = [*numbered(3000), wrong, *numbered(10)]
        with pytest.raises(EnqueueError):
            await client.enqueue_many(steps, key=key)
        assert await count(db) == 0
        assert len(await client.enqueue_many(numbered(5), key=key)) == 5

    play(dsn, scenario, pool_size=1)


MANY_REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no iterable": (3, {}, "takes an iterable of steps, not 3"),
    "one step": (Write("x"), {}, "takes an iterable of steps"),
    "queue": ([Write("x")], {"queue": ""}, "queue '' must be"),
    "priority": ([Write("x")], {"priority": 2.5}, "priority 2.5 must be"),
    "key is no function": ([Write("x")], {"key": "x"}, "must be a function"),
    "key gives no text": ([Write("x")], {"key": lambda step: 3}, "key 3 must be"),
    "key gives NUL": ([Write("x")], {"key": lambda step: "\0"}, "key .* must be"),
}


@pytest.mark.parametrize(("steps", "options", "message"), MANY_REFUSED.values(), ids=MANY_REFUSED)
def test_enqueue_many_refuses_wrong_arguments(dsn: str, steps: Any, options: dict[str, Any], message: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        with pytest.raises(EnqueueError, match=message):
            await client.enqueue_many(steps, **options)
        assert await count(db) == 0

    play(dsn, scenario)


def test_the_longest_key_of_the_widest_characters_fits_its_index(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        key = "".join(chr(0x10000 + 7919 * n % 0xFFFF) for n in range(512))
        task = await client.enqueue(Write("x"), key=key)
        assert await client.enqueue(Write("x"), key=key) == task
        assert await db.fetchval("SELECT key FROM pg_task") == key

    play(dsn, scenario)


@pytest.mark.parametrize("limit", [60, 200, 5000])
def test_a_step_that_is_accepted_is_not_too_large_for_a_worker(dsn: str, limit: int) -> None:
    """The worker compares the size of the whole row with its limit of the same name and default."""

    async def scenario(client: Client, db: Any) -> None:
        accepted = 0
        for size in range(limit - 60, limit + 1):
            try:
                await client.enqueue(Write("x" * max(size, 0)))
            except EnqueueError:
                break
            accepted += 1
        assert accepted > 0
        assert await db.fetchval("SELECT max(octet_length(step)) FROM pg_task") <= limit

    play(dsn, scenario, max_step_bytes=limit)


def test_a_connection_of_another_library_is_refused(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        calls: list[Callable[..., Awaitable[Any]]] = [
            partial(client.enqueue, Write("x")),
            partial(client.enqueue_many, [Write("x")]),
        ]
        for call in calls:
            with pytest.raises(EnqueueError, match="is not an asyncpg connection"):
                await call(conn="postgresql:///app")
        assert await count(db) == 0

    play(dsn, scenario)


# --- the client itself ---------------------------------------------------------------------------------------


def test_with_a_connection_of_the_caller_a_client_need_not_be_open(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.__aexit__(None, None, None)
        for closed in (client, Client(dsn)):
            await closed.enqueue(Write("x"), conn=db)
            await closed.enqueue_many([Write("x")], conn=db)
        assert await count(db) == 4
        await client.__aenter__()

    play(dsn, scenario)


def test_a_client_that_is_not_open_says_so(dsn: str) -> None:
    async def main() -> None:
        client = Client(dsn)
        for _ in range(2):
            for call in (client.enqueue(Write("x")), client.enqueue_many([Write("x")])):
                with pytest.raises(EnqueueError, match="the client is not open"):
                    await call
            async with client:
                await client.enqueue(Write("x"))

    run(main())


def test_a_client_without_dsn_reads_the_environment(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Client() as client:
            task = await client.enqueue(Write("x"))
        async with opened(dsn) as (_, db):
            assert await db.fetchval("SELECT id FROM pg_task") == task

    monkeypatch.setenv("DATABASE_URL", dsn)
    run(main())


def test_a_database_that_is_not_there_is_found_when_opening(dsn: str) -> None:
    async def main() -> None:
        with pytest.raises(DatabaseRefused, match='database "nowhere" does not exist'):
            async with Client(with_database(dsn, "nowhere")):
                pass

    run(main())


def test_without_the_table_the_command_is_named(empty_dsn: str) -> None:
    async def main() -> None:
        with pytest.raises(SchemaError, match="has no pg_task table; run: pgtask migrate"):
            async with Client(empty_dsn):
                raise AssertionError

    run(main())


CALLS: dict[str, Callable[[Client], Awaitable[Any]]] = {
    "enqueue": lambda client: client.enqueue(Write("x")),
    "with a key": lambda client: client.enqueue(Write("x"), key="k"),
    "enqueue_many": lambda client: client.enqueue_many([Write("x")]),
    "enqueue_many with keys": lambda client: client.enqueue_many([Write("x")], key=lambda _: "k"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_lost_connection_is_said_and_the_next_call_has_another(
    dsn: str, call: Callable[[Client], Awaitable[Any]]
) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with db.transaction():
            await db.execute("LOCK TABLE pg_task IN EXCLUSIVE MODE")
            waiting = asyncio.ensure_future(call(client))
            who = "FROM pg_stat_activity WHERE application_name = 'pgtask client' AND datname = current_database()"
            await until(db, f"SELECT EXISTS (SELECT {who} AND wait_event_type = 'Lock')")
            await db.execute(f"SELECT pg_terminate_backend(pid) {who}")
            with pytest.raises(DatabaseUnavailable):
                await waiting
        await call(client)
        assert await count(db) == 1

    play(dsn, scenario, pool_size=1)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_pooled_connection_that_died_in_its_sleep(dsn: str, call: Callable[[Client], Awaitable[Any]]) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue(Write("x"))
        who = "FROM pg_stat_activity WHERE application_name = 'pgtask client' AND datname = current_database()"
        await db.execute(f"SELECT pg_terminate_backend(pid, 5000) {who}")
        try:
            await call(client)
        except DatabaseUnavailable:  # had it not heard of it yet
            await call(client)
        assert await count(db) == 2

    play(dsn, scenario, pool_size=1)


def test_the_pool_does_not_grow_beyond_its_size(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await asyncio.gather(*(client.enqueue(Numbered(n)) for n in range(50)))
        who = "FROM pg_stat_activity WHERE application_name = 'pgtask client' AND datname = current_database()"
        assert await db.fetchval(f"SELECT count(*) {who}") <= 3
        assert await count(db) == 50

    play(dsn, scenario, pool_size=3)


def test_closing_waits_for_what_is_under_way(dsn: str) -> None:
    async def main() -> None:
        async with connected(dsn) as db:
            client = await Client(dsn).__aenter__()
            async with db.transaction():
                await db.execute("LOCK TABLE pg_task IN EXCLUSIVE MODE")
                under_way = asyncio.create_task(client.enqueue(Write("x")))
                await until(
                    db, "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted AND relation = 'pg_task'::regclass"
                )
                closing = asyncio.create_task(client.__aexit__(None, None, None))
                await asyncio.sleep(0)
            async with asyncio.timeout(10):
                task = await under_way
                await closing
            assert await db.fetchval("SELECT id FROM pg_task") == task

    run(main())


def test_a_busy_connection_is_not_called_closed(dsn: str) -> None:
    """Two tasks on one connection is a mistake in the caller's code, and waiting will not mend it."""

    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn) as mine:
            await db.execute("SELECT pg_advisory_lock(1)")
            busy = asyncio.create_task(mine.execute("SELECT pg_advisory_lock(1)"))
            await until_blocked(db, mine.get_server_pid())
            with pytest.raises(Exception, match="another operation is in progress") as caught:
                await client.enqueue(Write("x"), conn=mine)
            await db.execute("SELECT pg_advisory_unlock(1)")
            await busy
            assert "closed" not in str(caught.value)
            assert not isinstance(caught.value, DatabaseUnavailable)

    play(dsn, scenario)


# --- the caller's transaction --------------------------------------------------------------------------------


async def by_every_way(client: Client, conn: Any) -> list[UUID]:
    return [
        await client.enqueue(Write("x"), conn=conn),
        await client.enqueue(Write("x"), key="one", conn=conn),
        await client.delay(Write("x"), HOUR, conn=conn),
        await client.schedule(Write("x"), datetime.now(UTC), conn=conn),
        *await client.enqueue_many(numbered(3), conn=conn),
        *await client.enqueue_many(numbered(3), key=lambda step: str(step.n), conn=conn),
    ]


def test_with_conn_the_task_commits_with_the_callers_data(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn) as mine:
            async with mine.transaction():
                ids = await by_every_way(client, mine)
                assert await count(db) == 0
            assert len(await in_order(db, ids)) == len(ids) == await count(db) == 10

    play(dsn, scenario)


def test_with_conn_a_rollback_leaves_nothing(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn) as mine:
            transaction = mine.transaction()
            await transaction.start()
            await by_every_way(client, mine)
            await transaction.rollback()
            assert await count(db) == 0
            first = await client.enqueue(Write("x"), key="one")
            assert [row["id"] for row in await db.fetch("SELECT id FROM pg_task")] == [first]

    play(dsn, scenario)


def test_with_conn_and_no_transaction_it_is_committed_at_once(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn) as mine:
            assert len(await by_every_way(client, mine)) == await count(db) == 10

    play(dsn, scenario)


def test_conn_may_come_from_the_callers_pool(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with asyncpg.create_pool(dsn, min_size=1, max_size=1) as pool, pool.acquire() as mine:
            await by_every_way(client, mine)
        assert await count(db) == 10

    play(dsn, scenario)


@pytest.mark.parametrize("key", [None, lambda step: str(step.n)], ids=["copy", "keyed"])
def test_a_refused_step_does_not_spoil_the_callers_transaction(dsn: str, key: Any) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with db.transaction():
            await client.enqueue(Write("before"), conn=db)
            with pytest.raises(EnqueueError):
                await client.enqueue_many([*numbered(10), Numbered("x")], key=key, conn=db)  # type: ignore[arg-type]
            await client.enqueue(Write("after"), conn=db)
        texts = [row[0] for row in await db.fetch("SELECT step FROM pg_task ORDER BY id")]
        assert texts == ['{"Post":{"Write":{"text":"before"}}}', '{"Post":{"Write":{"text":"after"}}}']

    play(dsn, scenario)


# --- keys ----------------------------------------------------------------------------------------------------

STATES = {
    "waiting": "SELECT",
    "future": "UPDATE pg_task SET wakeup_at = now() + interval '1 year'",
    "running": EVERY_LEASE,
    "expired": "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() - interval '1 hour'",
    "parked": "UPDATE pg_task SET error = 'broken', tried = 6",
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_a_task_in_the_table_occupies_its_key(dsn: str, change: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        first = await client.enqueue(Write("first"), key="k")
        await db.execute(change)
        before = await db.fetchrow("SELECT * FROM pg_task")
        again = [
            await client.enqueue(Write("second"), key="k", queue="other", priority=9),
            await client.delay(Write("second"), HOUR, key="k"),
            await client.schedule(Write("second"), datetime.now(UTC), key="k"),
            *await client.enqueue_many([Write("second")], key=lambda _: "k"),
        ]
        assert again == [first] * 4
        assert [type(task) for task in again] == [UUID] * 4
        assert await db.fetch("SELECT * FROM pg_task") == [before]
        assert await client.enqueue(Write("x"), key="K") != first
        longer = await client.enqueue(Write("x"), key="kk")
        assert longer != first
        await db.execute("DELETE FROM pg_task WHERE id = $1", first)
        later = await client.enqueue(Write("x"), key="k")
        assert [await client.enqueue(Write("x"), key=key) for key in ("k", "kk")] == [later, longer]

    play(dsn, scenario)


def test_a_finished_task_frees_its_key(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        first = await client.enqueue(Write("first"), key="k")
        await db.execute("DELETE FROM pg_task")
        second = await client.enqueue(Write("second"), key="k")
        assert second != first
        assert await db.fetchval("SELECT id FROM pg_task") == second

    play(dsn, scenario)


def test_many_at_once_with_one_key_make_one_row(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        for key in "abcde":
            ids = await asyncio.gather(*(client.enqueue(Numbered(n), key=key) for n in range(8)))
            assert len(set(ids)) == 1
        assert await count(db) == 5

    play(dsn, scenario, pool_size=8)


@pytest.mark.parametrize("many", [False, True], ids=["enqueue", "enqueue_many"])
@pytest.mark.parametrize("commits", [True, False], ids=["commits", "rolls back"])
def test_the_second_waits_for_the_first_ones_transaction(dsn: str, commits: bool, many: bool) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn) as rival, connected(dsn) as mine:
            transaction = rival.transaction()
            await transaction.start()
            first = await client.enqueue(Write("first"), key="k", conn=rival)

            async def second() -> UUID:
                if many:
                    return (await client.enqueue_many([Write("second")], key=lambda _: "k", conn=mine))[0]
                return await client.enqueue(Write("second"), key="k", conn=mine)

            waiting = asyncio.create_task(second())
            await until_blocked(db, mine.get_server_pid())
            await (transaction.commit() if commits else transaction.rollback())
            found = await waiting
            assert (found == first) is commits
            assert [row["id"] for row in await db.fetch("SELECT id FROM pg_task")] == [found]

    play(dsn, scenario)


class FinishesFirst(asyncpg.Connection):  # type: ignore[misc]
    """A worker elsewhere that finishes the key's task between the insert that found it there and the look for it."""

    rivals: list[Any]

    async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
        await self._finish(query)
        return await super().fetchrow(query, *args, **options)

    async def fetch(self, query: str, *args: Any, **options: Any) -> Any:
        await self._finish(query)
        return await super().fetch(query, *args, **options)

    async def _finish(self, query: str) -> None:
        if "key = ANY" in query and self.rivals:
            await self.rivals.pop().execute("DELETE FROM pg_task WHERE key = 'k'")


@pytest.mark.parametrize("many", [False, True], ids=["enqueue", "enqueue_many"])
def test_the_keys_task_may_finish_in_between(dsn: str, many: bool) -> None:
    async def scenario(client: Client, db: Any) -> None:
        async with connected(dsn, connection_class=FinishesFirst) as mine:
            mine.rivals = [db]
            old = await client.enqueue(Write("old"), key="k")
            if many:
                pair = [Write("new"), Write("other")]
                found, other = await client.enqueue_many(pair, key=lambda step: "kl"[step.text == "other"], conn=mine)
                assert {row["id"] for row in await db.fetch("SELECT id FROM pg_task")} == {found, other}
            else:
                found = await client.enqueue(Write("new"), key="k", conn=mine)
            assert mine.rivals == []
            assert found != old
            row = await db.fetchrow("SELECT id, step FROM pg_task WHERE key = 'k'")
            assert tuple(row) == (found, '{"Post":{"Write":{"text":"new"}}}')

    play(dsn, scenario)


@pytest.mark.parametrize("size", [10, CHUNK_TASKS, 3 * CHUNK_TASKS + 7])
def test_keyed_ids_match_their_steps_also_with_duplicates(dsn: str, size: int) -> None:
    """Each key twice: once more at once, and once more at the very end, chunks later."""

    async def scenario(client: Client, db: Any) -> None:
        old = {n: await client.enqueue(Numbered(-1), key=f"key {n}") for n in range(0, size, size // 5)}
        twice = [step for n in range(size) for step in (Numbered(n), Numbered(n))] + list(numbered(size))
        ids = await client.enqueue_many(twice, key=lambda step: f"key {step.n}")
        assert isinstance(ids, list)
        assert len(ids) == 3 * size
        assert ids[0 : 2 * size : 2] == ids[1 : 2 * size : 2] == ids[2 * size :]
        assert await count(db) == size
        keys = [row["key"] for row in await in_order(db, ids[2 * size :])]
        assert keys == [f"key {n}" for n in range(size)]
        assert {n: ids[2 * n] for n in old} == old

    play(dsn, scenario)


def test_the_first_of_two_steps_with_one_key_counts(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        steps = [Write("first"), Send("second"), Write("third")]
        ids = await client.enqueue_many(steps, key=lambda _: "k")
        row = await db.fetchrow("SELECT id, step, queue, priority FROM pg_task")
        assert tuple(row) == (ids[0], '{"Post":{"Write":{"text":"first"}}}', "post", 3)
        assert ids == [ids[0]] * 3

    play(dsn, scenario)


def test_two_bulks_with_the_same_keys_in_opposite_order_do_not_deadlock(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        steps = list(numbered(CHUNK_TASKS))
        for _ in range(3):
            ways = (steps, steps[::-1])
            there, back = await asyncio.gather(
                *(client.enqueue_many(way, key=lambda step: str(step.n)) for way in ways), return_exceptions=True
            )
            assert isinstance(there, list), there
            assert isinstance(back, list), back
            assert there == back[::-1]
            assert await count(db) == len(steps)
            await db.execute("DELETE FROM pg_task")

    play(dsn, scenario)


# --- many ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 999, 5000])
@pytest.mark.parametrize("make", [numbered, lambda n: slowly(numbered(n)), lambda n: list(numbered(n))])
def test_ids_match_the_rows_in_order(dsn: str, make: Callable[[int], Any], size: int) -> None:
    async def scenario(client: Client, db: Any) -> None:
        ids = await client.enqueue_many(make(size))
        assert len(ids) == size == await count(db)
        assert numbers_in(await in_order(db, list(ids))) == list(range(size))
        by_id = numbers_in(await db.fetch("SELECT step FROM pg_task ORDER BY id"))
        assert by_id == list(range(size))

    play(dsn, scenario)


@pytest.mark.parametrize("key", [None, str], ids=["copy", "keyed"])
def test_no_steps_are_no_rows(dsn: str, key: Any) -> None:
    async def nothing() -> AsyncIterator[Task]:
        for step in numbered(0):
            yield step

    async def scenario(client: Client, db: Any) -> None:
        empty: list[Any] = [[], iter(()), nothing()]
        for steps in empty:
            assert list(await client.enqueue_many(steps, key=key)) == []
        assert await count(db) == 0

    play(dsn, scenario)


def test_fifty_thousand_take_no_more_memory_than_a_few(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        await client.enqueue_many(numbered(2000))
        peaks = []
        for size in (2000, 50_000):
            tracemalloc.start()
            ids = await client.enqueue_many(numbered(size))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert await count(db) == 54_000
        assert numbers_in(await in_order(db, [ids[0], ids[25_000], ids[-1]])) == [0, 25_000, 49_999]
        assert peaks[1] < 2_000_000, peaks

    play(dsn, scenario)


class Refusal(Exception):
    pass


def break_off(error: BaseException, after: int) -> Iterator[Numbered]:
    yield from islice(numbered(after), after)
    raise error


BREAKS = [
    Refusal("mine"),
    FileNotFoundError("list.txt"),
    TimeoutError("mine"),
    ConnectionResetError("mine"),
    asyncpg.InterfaceError("of another database"),
    asyncpg.UndefinedTableError("of another database"),
]


@pytest.mark.parametrize("key", [None, lambda step: str(step.n)], ids=["copy", "keyed"])
@pytest.mark.parametrize("error", BREAKS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("after", [0, 3000])
def test_what_the_iterable_raises_comes_out_and_nothing_is_left(
    dsn: str, error: Exception, after: int, key: Any
) -> None:
    """The iterable is the caller's: its file that is missing is not our database that is away."""

    async def scenario(client: Client, db: Any) -> None:
        for make in (break_off, lambda *args: slowly(break_off(*args))):
            with pytest.raises(type(error)) as caught:
                await client.enqueue_many(make(error, after), key=key)
            assert caught.value is error
            assert await count(db) == 0
        assert len(await client.enqueue_many(numbered(5), key=key)) == 5

    play(dsn, scenario, pool_size=1)


@pytest.mark.parametrize("key", [None, lambda step: str(step.n)], ids=["copy", "keyed"])
def test_cancelled_in_the_middle_it_rolls_back(dsn: str, key: Any) -> None:
    async def scenario(client: Client, db: Any) -> None:
        reached, closed = asyncio.Event(), asyncio.Event()

        async def steps() -> AsyncIterator[Numbered]:
            try:
                for step in numbered(5000):
                    yield step
                reached.set()
                await asyncio.Event().wait()
            finally:
                closed.set()

        enqueueing = asyncio.create_task(client.enqueue_many(steps(), key=key))
        await reached.wait()
        enqueueing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await enqueueing
        await closed.wait()
        assert await count(db) == 0
        assert len(await client.enqueue_many(numbered(5), key=key)) == 5
        assert await count(db) == 5

    play(dsn, scenario, pool_size=1)


def test_many_are_one_hint(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        heard: list[str] = []
        ended = asyncio.Event()

        def hear(_db: Any, _pid: int, _channel: str, payload: str) -> None:
            if payload == "end":
                ended.set()
            heard.append(payload)

        await db.add_listener("pg_task_changed", hear)
        await client.enqueue_many(numbered(5000))
        await db.execute("NOTIFY pg_task_changed, 'end'")
        await ended.wait()
        assert heard == ["", "end"]
        await db.remove_listener("pg_task_changed", hear)

    play(dsn, scenario)


# --- ids -----------------------------------------------------------------------------------------------------


def test_task_ids_are_a_sequence() -> None:
    first = UUID("018f0000-0000-7000-9fff-ffffffffff00")
    plain = [UUID(int=first.int + n) for n in range(1000)]
    ids = TaskIds(first, 1000)
    assert (len(ids), list(ids), list(reversed(ids))) == (1000, plain, plain[::-1])
    for index in (0, 1, 999, -1, -1000):
        assert ids[index] == plain[index]
    for index in (1000, -1001):
        with pytest.raises(IndexError):
            ids[index]
    for part in (slice(None), slice(5), slice(-5, None), slice(10, 2, -3), slice(900, 2000, 7), slice(3, 3)):
        assert ids[part] == plain[part]
    assert all(task in ids for task in (plain[0], plain[-1]))
    assert all(
        thing not in ids for thing in (UUID(int=first.int - 1), UUID(int=first.int + 1000), str(first), None, first.int)
    )
    assert (ids.index(plain[7]), ids.count(plain[7])) == (7, 1)
    assert repr(ids) == "<TaskIds 1000>"
    assert list(TaskIds(first, 0)) == []


def test_ten_million_ids_take_no_room() -> None:
    ids = TaskIds(UUID("018f0000-0000-7000-9000-000000000000"), 10_000_000)
    tracemalloc.start()
    assert ids[9_999_999] in ids
    assert UUID(int=ids[-1].int + 1) not in ids
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()


def test_ids_are_uuids_of_version_7_and_grow_with_time(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        ids: list[UUID] = []
        for _ in range(20):
            before = int(datetime.now(UTC).timestamp() * 1000)
            batch = [
                await client.enqueue(Write("x")),
                *await client.enqueue_many(numbered(50)),
                *await client.enqueue_many(numbered(5), key=lambda step: f"{len(ids)} {step.n}"),
            ]
            after = int(datetime.now(UTC).timestamp() * 1000)
            for task in batch:
                assert type(task) is UUID
                assert (task.version, task.variant) == (7, "specified in RFC 4122")
                assert before <= task.int >> 80 <= after
            ids += batch
        assert len(set(ids)) == len(ids) == await count(db)
        by_time = [task for _, task in sorted(((task.int >> 80, n), task) for n, task in enumerate(ids))]
        assert by_time == ids

    play(dsn, scenario)
