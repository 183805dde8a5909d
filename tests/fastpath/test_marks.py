"""The marks of executing steps."""

from __future__ import annotations

import asyncio
import mmap
from typing import Any
from uuid import UUID, uuid4

from pgtask import App, Context, Done, Task
from pgtask._fastpath import Dispatcher, Leases, Marks, Table, TaskLease


def test_executing_steps_are_marked_in_shared_memory() -> None:
    """A step is marked while it has the loop, is suspended, or has a thread; not before, and not once it has ended."""
    memory = mmap.mmap(-1, Marks.size(3))
    seen: dict[str, list[bytes]] = {}

    class Family(Task): ...

    class Ends(Family):
        async def run(self, ctx: Context) -> Done:
            seen["ends"] = Marks(memory).executing()
            return Done()

    class Fails(Family):
        async def run(self, ctx: Context) -> Done:
            raise ValueError

    class Suspends(Family):
        async def run(self, ctx: Context) -> Done:
            await go.wait()
            seen["suspends"] = Marks(memory).executing()
            return Done()

    class InThread(Family):
        def run(self, ctx: Context) -> Done:
            return Done()

    class Threads(Dispatcher):
        def start_thread(self, lease: TaskLease, run: Any, context: Context) -> None:
            started.append(lease)

    app = App(Family)
    started: list[TaskLease] = []
    go = asyncio.Event()

    async def main() -> None:
        leases = Leases()
        dispatch = Threads(
            *(asyncio.get_running_loop(), Table(app), leases),
            concurrency=3,
            max_step_bytes=1000,
            marks=Marks(memory),
        )
        kinds = ("Ends", "Fails", "Suspends", "InThread", "Suspends", "Ends")
        ids = [UUID(int=number) for number in range(len(kinds))]
        rows = [(id, f'{{"Family":{{"{kind}":null}}}}', 0, 1, None) for id, kind in zip(ids, kinds, strict=True)]
        dispatch.admit(leases.add_claimed(rows, uuid4(), 0.0)[0])
        while dispatch.suspended < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert seen["ends"] == [ids[0].bytes]
        assert Marks(memory).executing() == [ids[2].bytes, ids[3].bytes, ids[4].bytes]  # the last one waits for a slot
        dispatch.end_step(started[0], Done(), None)
        go.set()
        while len(dispatch.outcomes) < len(kinds):  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert seen["suspends"][-1] == ids[4].bytes
        assert Marks(memory).executing() == []
        assert Marks(memory).implicated() == [ids[4].bytes]  # it ended last: something that it left behind may do harm

    asyncio.run(main())
