"""Delays: a step that waits without holding anything, a task that you enqueue with a delay, and one at a time of day.

    python -m examples.delay && pgtask-supervisor examples.delay:app --procs 1 --burst

A waiting task is a row with a `wakeup_at` in the future. No process sleeps for it, and it survives every restart.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from pgtask import App, Client, Context, Done, Next, Task


class Egg(Task):
    """Boil an egg."""


class Boil(Egg):
    label: str
    seconds: float

    async def run(self, ctx: Context) -> Next[Serve]:
        print(f"{self.label}: in the water")
        return Next(Serve(self.label), after=timedelta(seconds=self.seconds))


class Serve(Egg):
    label: str

    async def run(self, ctx: Context) -> Done:
        print(f"{self.label}: served")
        return Done()


app = App(Egg)


async def main() -> None:
    async with Client() as client:
        await client.enqueue(Boil("soft", seconds=2))
        await client.delay(Boil("one second after the others", seconds=2), timedelta(seconds=1))
        await client.schedule(Serve("cold, three seconds from now"), at=datetime.now(UTC) + timedelta(seconds=3))


if __name__ == "__main__":
    asyncio.run(main())
