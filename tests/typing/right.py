# pyright: strict
"""User code that both checkers accept in their strict modes: every form that the documentation shows."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type
from uuid import UUID

from pgtask import (
    App,
    Client,
    Context,
    Done,
    Enqueue,
    Fail,
    Next,
    Outcome,
    Policy,
    SyncClient,
    Task,
    TaskId,
    Throttled,
    statement,
    task,
)


class Greeter(Task):
    """A task."""

    policy = Policy(retry_limit=3, backoff="exponential")


class ReadName(Greeter):
    policy = Policy(retry_limit=5, retry_delay=timedelta(seconds=1), timeout=timedelta(minutes=1), jitter=0.1)
    filename: str

    async def run(self, ctx: Context) -> Next[SayHello]:
        assert_type(ctx.task_id, UUID)
        assert_type(ctx.attempt, int)
        return Next(SayHello(self.filename, times=2))


class SayHello(Greeter):
    name: str
    times: int = 1

    async def run(self, ctx: Context) -> Next[SayHello] | Next[Wait] | Done:
        if self.times > 2:
            return Next(SayHello(self.name, self.times - 1))
        if self.times > 1:
            return Next(Wait(), after=timedelta(seconds=5))
        return Done()


class Wait(Greeter):
    """A step without fields that may go either way."""

    async def run(self, ctx: Context) -> Next[SayHello | Count] | Fail:
        if ctx.attempt > 1:
            return Fail("enough")
        if ctx.task_id.int % 2:
            return Next(SayHello("Ada"))
        return Next(Count(5))


class Count(Greeter):
    """A step in a thread, stored as a bare number."""

    transparent = True
    number: int

    def run(self, ctx: Context) -> Outcome[Count]:
        if self.number == 0:
            return Done()
        if self.number < 0:
            return Fail(f"{self.number} is negative")
        return Next(Count(self.number - 1))


class Spread(Task):
    """A task whose steps enqueue others."""


class Begin(Spread):
    names: list[str]

    async def run(self, ctx: Context) -> Next[End] | Done:
        if not self.names:
            return Done(enqueue=[ReadName("name.txt"), Enqueue(Wait(), after=timedelta(minutes=5), key="wait")])
        if ctx.attempt > 1:
            return Done(enqueue=(ReadName(name) for name in self.names))
        return Next(End(), enqueue=map(ReadName, self.names))


class End(Spread):
    async def run(self, ctx: Context) -> Next[End] | Done:
        readers = [ReadName("a"), ReadName("b")]
        late = [Enqueue(reader, at=datetime.now(UTC), queue="files", priority=1) for reader in readers]
        return Next(End(), after=timedelta(days=1), enqueue=late) if ctx.attempt > 1 else Done(enqueue=readers)


@asynccontextmanager
async def resources() -> AsyncGenerator[dict[str, str], None]:
    yield {"greeting": "Hello"}


@task("greet", policy=Policy(retry_limit=3))
async def greet(ctx: Context, name: str, *, times: int = 1) -> Done:
    assert_type(ctx.attempt, int)
    return Done()


@task("check", archive=True)
def check(ctx: Context, path: str, retry_after: float = 1) -> Done | Fail:
    if ctx.attempt > 9:
        return Fail(path)
    raise Throttled(retry_after if path else timedelta(seconds=1))


app = App(Greeter, greet, check, lifespan=resources)


async def produce(client: Client) -> None:
    assert_type(await client.enqueue(ReadName("name.txt"), queue="files", priority=1, key="once"), TaskId)
    await client.delay(ReadName(filename="name.txt"), timedelta(minutes=5))
    ids = await client.enqueue_many(ReadName(f"{number}.txt") for number in range(10))
    assert len(ids) == 10
    assert_type(greet("Ada", times=2), Task)
    await client.enqueue(greet(name="Ada"), key="once")
    await client.enqueue_many([greet("Ada"), check("a"), check(path="b", retry_after=0.5)])


def produce_from_sync_code() -> None:
    with SyncClient() as client:
        assert_type(client, SyncClient)
        assert_type(client.enqueue(ReadName("name.txt"), queue="files", priority=1, key="once"), TaskId)
        assert len(client.enqueue_many(ReadName(f"{number}.txt") for number in range(10))) == 10
        for parked in client.failures():
            assert_type(parked.id, UUID)
    assert_type(statement(ReadName("name.txt"), key="once"), tuple[str, list[Any]])
    assert_type(statement(greet("Ada"), style="pyformat"), tuple[str, dict[str, Any]])


async def call(ctx: Context) -> None:
    assert_type(await greet.run(ctx, "Ada", times=2), Done)
    assert_type(check.run(ctx, "a"), Done | Fail)
