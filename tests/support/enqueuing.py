"""Tasks and a workflow whose steps enqueue by `ctx.client`."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from pgtask import App, Client, Context, Done, EnqueueError, Fail, Task, WorkflowContext, task, workflow

NAMES = "SELECT DISTINCT application_name FROM pg_stat_activity WHERE datname = current_database()"


KEYS = {"kept": "once", "keyed": "twice"}


class Parent(Task):
    pass


class Begin(Parent):
    """Uses the client in each way that a step may."""

    async def run(self, ctx: Context) -> Done:
        client = ctx.client
        await client.enqueue(note("one"))
        async with ctx.client as same:  # which closes nothing
            await same.enqueue_many(note(f"many {number}") for number in range(10))
        async with ctx.db.acquire() as conn, conn.transaction():
            await client.enqueue(note("in a transaction"), conn=conn)
        try:
            async with ctx.db.acquire() as conn, conn.transaction():
                await client.enqueue(note("rolled back"), conn=conn)
                raise KeyError
        except KeyError:
            pass
        first = await client.delay(note("kept"), timedelta(days=1), key="once")
        second = await client.enqueue(note("kept"), key="once")
        third, _ = await client.enqueue_many([note("kept"), note("keyed")], key=lambda step: KEYS[step.text])
        run = await client.trigger(
            doubled,
            21,
        )
        answer = await run.result(timeout=30)
        names = {row[0] for row in await ctx.db.fetch(NAMES)}
        is_same = client is same is ctx.client and first == second == third
        await client.enqueue(
            note(f"{answer} {is_same} {(await run.status()).state} {sorted(names & {'pgtask client'})}")
        )
        return Done()


class BeginInThread(Parent):
    def run(self, ctx: Context) -> Done | Fail:
        try:
            ctx.client  # noqa: B018
        except EnqueueError as error:
            return Fail(str(error))
        return Done()


class CallThread(Parent):
    """Uses the client in a thread of an async step."""

    async def run(self, ctx: Context) -> Done | Fail:
        try:
            await asyncio.to_thread(lambda: asyncio.run(ctx.client.enqueue(note("never"))))
        except EnqueueError as error:
            return Fail(str(error))
        return Done()


@task("note")
async def note(ctx: Context, text: str) -> Done:
    await ctx.db.execute("INSERT INTO noted VALUES ($1)", text)
    return Done()


async def enqueue(client: Client, text: str) -> None:
    await client.enqueue(note(text))


async def twice(number: int) -> int:
    return 2 * number


@workflow("doubled")
async def doubled(ctx: WorkflowContext, number: int) -> int:
    await ctx.step("enqueue", enqueue, ctx.client, "from a run")
    return await ctx.step("double", twice, number)


app = App(Parent, note, doubled)
