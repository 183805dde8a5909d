"""Consuming by hand: page views go into a table by hundreds, in one statement each, instead of one step for each view.

    python -m examples.consumer 10000

A view may come twice (its task was loaded, then the process died before it could say so), so the id of the task is the
key of the row. A view that cannot be loaded is parked alone, with the reason. `View.run` is not called here; it
would be if a worker served the queue.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import asyncpg

from pgtask import App, Client, Consumer, Context, Done, Lease, Policy, Task

TABLE = "CREATE TABLE IF NOT EXISTS page_view (id uuid PRIMARY KEY, path text NOT NULL, milliseconds integer NOT NULL)"
INSERT = """
    INSERT INTO page_view (id, path, milliseconds)
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::integer[])
    ON CONFLICT DO NOTHING
"""

Row = tuple[UUID, str, int]


class Traffic(Task):
    policy = Policy(queue="views")


class View(Traffic):
    path: str
    milliseconds: int

    async def run(self, ctx: Context) -> Done:
        await ctx.db.execute(INSERT, [ctx.task_id], [self.path], [self.milliseconds])
        return Done()


app = App(Traffic)


def row_of(lease: Lease) -> Row:
    """Raises what is wrong with the view."""
    view = lease.step
    assert isinstance(view, View)
    if not view.path.startswith("/"):
        raise ValueError(f"{view.path!r} is no path")
    return lease.task_id, view.path, view.milliseconds


async def load(consumer: Consumer, connection: asyncpg.Connection[asyncpg.Record]) -> int:
    """Load views until none has come for a second; how many."""
    loaded = 0
    while leases := await consumer.claim(limit=500, wait=timedelta(seconds=1)):
        rows: list[Row] = []
        good: list[Lease] = []
        for lease in leases:
            try:
                rows.append(row_of(lease))
                good.append(lease)
            except Exception as error:
                await consumer.fail(lease, error)
        await connection.execute(INSERT, *map(list, zip(*rows, strict=True)))
        lost = await consumer.done(good)  # loaded by somebody else too: the key of the row makes that one view
        loaded += len(good) - len(lost)
    return loaded


async def main(arguments: Sequence[str]) -> None:
    views = int(arguments[0]) if arguments else 10_000
    async with Client(app=app) as client:
        connection = await asyncpg.connect(client.dsn)
        await connection.execute(TABLE)
        await client.enqueue_many(View(f"/page/{number % 100}", number % 1000) for number in range(views))
        await client.enqueue(View("not a path", 0))
        began = time.monotonic()
        async with client.consumer("views") as consumer:
            loaded = await load(consumer, connection)
        seconds = time.monotonic() - began - 1  # the last wait
        print(f"loaded {loaded:,} views: {loaded / seconds:,.0f} views/s")
        parked = await connection.fetch("SELECT error FROM pg_task WHERE queue = 'views' AND error IS NOT NULL")
        print(f"parked: {', '.join(row['error'] for row in parked)}")
        await connection.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
