"""Consuming by hand: load page views into a table, hundreds in one statement, instead of one step for each view.

    python -m examples.consumer 10000

You may get a view twice: the process may die after it has loaded the view and before it has said so. So the id of the
task is the key of the row. A view that cannot be loaded is parked alone, with the reason. Nothing here calls
`View.run`; a worker would, if it served the queue.
"""

from __future__ import annotations

import asyncio
import sys
import time
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
    """Make the row of a view. Raises an error if the view is wrong."""
    view = lease.step
    assert isinstance(view, View)
    if not view.path.startswith("/"):
        raise ValueError(f"{view.path!r} is no path")
    return lease.task_id, view.path, view.milliseconds


async def load(consumer: Consumer, connection: asyncpg.Connection[asyncpg.Record]) -> int:
    """Load views until none has come for a second, and return their number."""
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
        if rows:  # empty if the only view of a claim is wrong
            await connection.execute(INSERT, *map(list, zip(*rows, strict=True)))
        lost = await consumer.done(good)  # another consumer loads these too: the key of the row makes that one view
        loaded += len(good) - len(lost)
    return loaded


async def main(views: int = 10_000) -> None:
    async with Client(app=app) as client:
        connection = await asyncpg.connect(client.dsn)
        await connection.execute(TABLE)
        await client.enqueue_many(View(f"/page/{number % 100}", number % 1000) for number in range(views))
        await client.enqueue(View("not a path", 0))
        began = time.monotonic()
        async with client.consumer("views") as consumer:
            loaded = await load(consumer, connection)
        seconds = time.monotonic() - began - 1  # the last wait
        rate = f": {loaded / seconds:,.0f} views/s" if loaded else ""
        print(f"loaded {loaded:,} views{rate}")
        parked = await connection.fetch("SELECT error FROM pg_task WHERE queue = 'views' AND error IS NOT NULL")
        print(f"parked: {', '.join(row['error'] for row in parked)}")
        await connection.close()


if __name__ == "__main__":
    words = sys.argv[1:] or ["10000"]
    if len(words) > 1 or not words[0].isdecimal():
        sys.exit("usage: python -m examples.consumer [VIEWS], a whole number")
    asyncio.run(main(int(words[0])))
