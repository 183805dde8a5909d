"""`tests/vectors/enqueue.json`: what a client stores and refuses, and `pgtask_enqueue` in SQL, by the same file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from paths import REPOSITORY

from pgtask import Client, Context, Done, EnqueueError, Task, WorkflowContext, task, workflow
from pgtask._fastpath import Codec
from pgtask._postgres.times import allow_far_times
from pgtask.errors import DecodeError

VECTORS: list[dict[str, Any]] = json.loads((REPOSITORY / "tests/vectors/enqueue.json").read_text())
ARGUMENTS = ("step", "fields", "key", "queue", "priority", "at", "after")
pytestmark = pytest.mark.one_database


class Letter(Task):
    pass


class Write(Letter):
    text: str

    async def run(self, ctx: Context) -> Done:
        return Done()


class Burn(Letter):
    async def run(self, ctx: Context) -> Done:
        return Done()


class Weigh(Letter):
    grams: float
    count: int
    anything: Any

    async def run(self, ctx: Context) -> Done:
        return Done()


@task("stamp")
async def stamp(ctx: Context, value: int) -> Done:
    return Done()


@workflow("post a letter")
async def post(ctx: WorkflowContext, number: int) -> None: ...


STEPS: dict[str, type[Task]] = {
    "Letter.Write": Write,
    "Letter.Burn": Burn,
    "Letter.Weigh": Weigh,
    "stamp.Call": stamp.step,
}


def spelled(value: Any) -> Any:
    """A value of a vector; long texts are written as what is repeated."""
    if isinstance(value, dict):
        return value.get("before", "") + value["repeat"] * value["times"] + value.get("after", "")
    return value


async def enqueue_by_client(dsn: str, given: dict[str, Any]) -> UUID:
    """Decode the fields like the command, and enqueue like a program."""
    lane = {name: given[name] for name in ("queue", "priority", "key") if name in given}
    at = None if "at" not in given else datetime.fromisoformat(given["at"])
    after = None if "after" not in given else timedelta(seconds=given["after"])
    async with Client(dsn) as client:
        if given["step"] == "post a letter.Run":
            return (await client.trigger(post, json.loads(given["fields"]), at=at, after=after, **lane)).id
        family, name = given["step"].split(".")
        codec = Codec(STEPS[given["step"]], family, name, False)
        try:
            step = codec.decode(given.get("fields", "null").encode())
        except DecodeError as error:
            raise EnqueueError(f"step {error}") from None
        if at is not None and after is not None:
            await client.trigger(post, 1, at=at, after=after)
        if at is not None:
            return await client.schedule(step, at, **lane)
        if after is not None:
            return await client.delay(step, after, **lane)
        return await client.enqueue(step, **lane)


async def enqueue_by_sql(dsn: str, given: dict[str, Any]) -> UUID:
    """Call the function with each argument as a literal, like psql."""

    def literal(value: Any) -> str:
        return (
            "NULL" if value is None else str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"
        )

    values = {**given, **({"after": f"{given['after']:.6f} s"} if "after" in given else {})}
    named = ", ".join(f"{name} => {literal(values[name])}" for name in ARGUMENTS if name in values)
    connection = await asyncpg.connect(dsn)
    try:
        found: UUID = await connection.fetchval(f"SELECT pgtask_enqueue({named})")
    except asyncpg.InvalidParameterValueError as error:
        raise EnqueueError(str(error)) from error
    finally:
        await connection.close()
    return UUID(int=found.int)


async def check_row(dsn: str, id: UUID, stored: dict[str, Any]) -> None:
    connection = await asyncpg.connect(dsn)
    await allow_far_times(connection)
    row = await connection.fetchrow("SELECT * FROM pg_task WHERE id = $1", id)
    await connection.close()
    assert row is not None
    for name in ("step", "queue", "priority", "key"):
        if name in stored:
            assert row[name] == stored[name]
    if "json" in stored:
        assert json.dumps(json.loads(row["step"])) == json.dumps(stored["json"])
    if "bytes" in stored:
        assert len(row["step"].encode()) == stored["bytes"]
    if "wakeup_at" in stored:
        assert row["wakeup_at"] == datetime.fromisoformat(stored["wakeup_at"])
    if "due_in" in stored:
        late = row["wakeup_at"] - row["created_at"] - timedelta(seconds=stored["due_in"])
        assert timedelta(0) <= late < timedelta(seconds=20)
    assert id.version == 7
    assert abs(datetime.now(UTC).timestamp() * 1000 - (id.int >> 80)) < 60_000


def cases() -> Iterator[Any]:
    for vector in VECTORS:
        for way in ("client", "sql"):
            if vector.get("only", way) == way:
                yield pytest.param(vector, way, id=f"{vector['name']}, {way}")


@pytest.mark.parametrize(("vector", "way"), list(cases()))
def test_vector_is_stored_or_refused(dsn: str, vector: dict[str, Any], way: str) -> None:
    given = {name: spelled(vector[name]) for name in ARGUMENTS if name in vector}
    enqueue = enqueue_by_client if way == "client" else enqueue_by_sql

    async def main() -> None:
        if "stored" in vector:
            await check_row(dsn, await enqueue(dsn, given), vector["stored"])
            return
        not_json = (EnqueueError, asyncpg.InvalidTextRepresentationError)
        with pytest.raises(not_json if vector.get("not_json") else EnqueueError) as refusal:
            await enqueue(dsn, given)
        for words in vector.get("error", ()):
            assert words in str(refusal.value)
        connection = await asyncpg.connect(dsn)
        assert await connection.fetchval("SELECT count(*) FROM pg_task") == 0
        await connection.close()

    asyncio.run(main())


def test_vectors_have_names_of_their_own() -> None:
    assert len({vector["name"] for vector in VECTORS}) == len(VECTORS) > 50
    assert all(("stored" in one) + ("error" in one) + ("not_json" in one) == 1 for one in VECTORS)
