"""A saga: book a trip step by step, and undo the bookings when a later step fails for good.

    python -m examples.saga && pgtask-supervisor examples.saga:app --procs 1 --burst
    pgtask psql -c 'SELECT * FROM trip_ledger ORDER BY at'

The database is the outside world here. Each booking is a row of `trip_ledger`. Its primary key is the key of the run
and the step, so you get one row for any number of tries. One hotel in two is full.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from typing import Any

import asyncpg

from pgtask import App, Client, Permanent, Policy, StepFailed, Transient, WorkflowContext, workflow

LEDGER = """
    CREATE TABLE IF NOT EXISTS trip_ledger (
        key  text PRIMARY KEY,
        trip integer NOT NULL,
        what text NOT NULL,
        at   timestamptz NOT NULL DEFAULT clock_timestamp()
    )
"""


async def note(db: Any, key: str, trip: int, what: str) -> str:
    """Write a booking, or the undoing of one, and return its key."""
    query = "INSERT INTO trip_ledger (key, trip, what) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
    await db.execute(query, key, trip, what)
    return key


async def book_hotel(db: Any, key: str, trip: int) -> str:
    if trip % 2:
        raise Permanent("the hotel is full")
    return await note(db, key, trip, "book hotel")


async def charge(db: Any, key: str, trip: int) -> str:
    """Charge the customer. The bank does not answer at first; the retry does not repeat the bookings before it."""
    if await db.fetchval("SELECT count(*) = 0 FROM trip_ledger WHERE trip = $1 AND what = 'bank away'", trip):
        await note(db, f"{key}/away", trip, "bank away")
        raise Transient("the bank does not answer", retry_after=timedelta(milliseconds=100))
    return await note(db, key, trip, "charge")


@workflow("trip", policy=Policy(retry_limit=3, retry_delay=timedelta(milliseconds=200), backoff="exponential"))
async def trip(ctx: WorkflowContext, number: int) -> str:
    booked: list[str] = []
    try:
        await ctx.step("flight", note, ctx.db, ctx.idempotency_key("flight"), number, "book flight")
        booked.append("flight")
        await ctx.step("hotel", book_hotel, ctx.db, ctx.idempotency_key("hotel"), number)
        booked.append("hotel")
        await ctx.step("charge", charge, ctx.db, ctx.idempotency_key("charge"), number)
    except StepFailed as failure:
        for name in reversed(booked):
            undo = f"undo {name}"
            await ctx.step(undo, note, ctx.db, ctx.idempotency_key(undo), number, undo)
        return f"not booked: {failure}"
    return "booked"


app = App(trip)


async def main(trips: int = 4) -> None:
    async with Client() as client:
        connection = await asyncpg.connect(client.dsn)
        await connection.execute(LEDGER)
        await connection.close()
        for number in range(trips):
            await client.trigger(trip, number, key=f"trip {number}")


if __name__ == "__main__":
    words = sys.argv[1:] or ["4"]
    if len(words) > 1 or not words[0].isdecimal():
        sys.exit("usage: python -m examples.saga [TRIPS], a whole number")
    asyncio.run(main(int(words[0])))
