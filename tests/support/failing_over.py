"""Tasks that sleep for 50 ms and write a row, for the tests of a failover, and the ledger of those rows."""

from __future__ import annotations

import asyncio

from pgtask import App, Context, Done, Policy, Task

LEDGER = "CREATE TABLE ledger (number int, written_at timestamptz NOT NULL DEFAULT clock_timestamp())"


class Ledger(Task):
    """One step, which may run again after a failover."""

    policy = Policy(retry_limit=20)


class Write(Ledger):
    number: int

    async def run(self, ctx: Context) -> Done:
        await asyncio.sleep(0.05)
        await ctx.db.execute("INSERT INTO ledger (number) VALUES ($1)", self.number)
        return Done()


app = App(Ledger)
