"""Enqueueing: the row that a step becomes, and what is refused before anything is sent."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from client_kit import count, in_order, numbered, play
from post import (
    Address,
    Anything,
    BareTwo,
    Everything,
    NoPolicy,
    Nowhere,
    Post,
    Send,
    Small,
    Sweep,
    UnknownType,
    Wait,
    Write,
    doubled,
)

from pgtask import Client, Task
from pgtask.config import DEFAULT_MAX_STEP_BYTES
from pgtask.errors import EnqueueError, PgtaskError

HOUR = timedelta(hours=1)
pytestmark = pytest.mark.one_database


# --- what is stored


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
            ids: list[UUID] = [await client.enqueue(Write("x"), conn=db)]
            ids += await client.enqueue_many([Write("x")], conn=db)
            ids += await client.enqueue_many([Write("x")], key=lambda _: "key", conn=db)
            for row, key in zip(await in_order(db, ids), [None, None, "Post/key"], strict=True):
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


# --- what is refused


Call = Callable[[Client, Any], Awaitable[Any]]


def one(step: Any, **options: Any) -> Call:
    return lambda client, conn: client.enqueue(step, conn=conn, **options)


def later(delay: Any) -> Call:
    return lambda client, conn: client.delay(Write("x"), delay, conn=conn)


def at(when: Any) -> Call:
    return lambda client, conn: client.schedule(Write("x"), when, conn=conn)


def many(steps: list[Any], **options: Any) -> Call:
    return lambda client, conn: client.enqueue_many(steps, conn=conn, **options)


def begun(**options: Any) -> Call:
    return lambda client, conn: client.trigger(doubled, 1, conn=conn, **options)


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
    "family itself": (one(Post()), r"^Post is a task, not a step; enqueue one of its steps, such as \w+\(\.\.\.\)$"),
    "family as a class": (one(Post), "^Post is a task, not a step"),
    "a class of no task": (one(Address), "a value of type StructMeta is " + NO_STEP),
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
    "key of wrong type": (one(Write("x"), key=3), "key=3 must be a string, not of type int"),
    "workflow": (one(doubled), "^doubled is a workflow, not a step; start a run of it by trigger"),
    "expires of wrong type": (one(Write("x"), expires=5), r"^expires=5 must be a timedelta or a datetime$"),
    "expires out of range": (one(Write("x"), expires=timedelta.max), r"^expires=.* at most 365000 days$"),
    "expires without zone": (one(Write("x"), expires=datetime(2030, 1, 1)), "^expires=.* has no time zone"),
    "debounce of wrong type": (one(Write("x"), key="k", debounce=5), "^debounce=5 must be a timedelta"),
    "ceiling of wrong type": (one(Write("x"), key="k", debounce=HOUR, ceiling=5), "^ceiling=5 must be a timedelta"),
    "after of wrong type": (begun(after=5), "^after=5 must be a timedelta"),
    "rule without a function": (many([Write("x")], on_conflict="after"), "^on_conflict, .* need key=, a function"),
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
    "key gives no text": ([Write("x")], {"key": lambda step: 3}, "key=3 must be a string, not of type int"),
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
        assert await db.fetchval("SELECT key FROM pg_task") == f"Post/{key}"

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
            with pytest.raises(EnqueueError, match="is not a connection of asyncpg"):
                await call(conn="postgresql:///app")
        assert await count(db) == 0

    play(dsn, scenario)
