"""A long chain: count to 1,000 in 1,000 steps, each durable before the next one starts.

    python -m examples.counter [CHAINS] && pgtask-supervisor examples.counter:app --procs 1 --burst

One chain is as fast as your database commits, since each step waits for the step before it. With 100 chains the worker
writes the steps of all chains in one statement, so 100 chains cost you little more than one.
"""

from __future__ import annotations

import asyncio
import sys
import time

from pgtask import App, Client, Context, Done, Next, Task


class Counter(Task):
    """Count."""


class Start(Counter):
    upto: int

    async def run(self, ctx: Context) -> Next[Count]:
        return Next(Count(at=1, upto=self.upto, started=time.time()))


class Count(Counter):
    at: int
    upto: int
    started: float

    async def run(self, ctx: Context) -> Next[Count] | Done:
        if self.at < self.upto:
            return Next(Count(self.at + 1, self.upto, self.started))
        seconds = time.time() - self.started
        print(f"counted to {self.upto:,} in {seconds:.2f} s: {self.upto / seconds:,.0f} steps/s")
        return Done()


app = App(Counter)


async def main(chains: int = 1) -> None:
    async with Client() as client:
        await client.enqueue_many(Start(upto=1000) for _ in range(chains))


if __name__ == "__main__":
    words = sys.argv[1:] or ["1"]
    if len(words) > 1 or not words[0].isdecimal():
        sys.exit("usage: python -m examples.counter [CHAINS], a whole number")
    asyncio.run(main(int(words[0])))
