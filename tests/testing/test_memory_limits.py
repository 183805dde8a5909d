"""Limits in memory: what starts, and when, by the clock in memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta

import pytest

from pgtask import App, Breaker, Context, Done, Limit, Policy, Rate, Task, Throttled
from pgtask.testing import MemoryWorker

pytestmark = pytest.mark.timeout(60)

pairs = Limit("pairs", key=lambda step: step.key, concurrency=2)
paced = Limit("paced", rate=Rate(10, burst=2))
priced = Limit("priced", cost=Rate(100, of="tokens", burst=10))
fused = Limit("fused", breaker=Breaker(failures=2, pause=timedelta(minutes=5)))
strict = Limit("strict", key=lambda step: step.key, concurrency=1, order="strict")
turns = Limit("turns", key=lambda step: step.key, share={"heavy": 3})
SECOND = timedelta(seconds=1)


class Kept(Task):
    pass


class Pair(Kept):
    policy = Policy(limit=pairs)
    key: str

    async def run(self, ctx: Context) -> Done:
        now: Counter[str] = ctx.resources
        now[self.key] += 1
        assert now[self.key] <= 2
        await asyncio.sleep(0)
        now[self.key] -= 1
        return Done()


class Paced(Kept):
    policy = Policy(limit=paced)

    async def run(self, ctx: Context) -> Done:
        return Done()


class Priced(Kept):
    policy = Policy(limit=priced)
    tokens: int
    more: int = 0

    async def run(self, ctx: Context) -> Done:
        ctx.charge(self.more)
        return Done()


class Fused(Kept):
    policy = Policy(limit=fused, retry_limit=9, retry_delay=SECOND)

    async def run(self, ctx: Context) -> Done:
        return Done()


class Ordered(Kept):
    policy = Policy(limit=strict, retry_limit=1, retry_delay=timedelta(hours=1))
    key: str
    number: int

    async def run(self, ctx: Context) -> Done:
        ctx.resources[self.number] = len(ctx.resources)
        return Done()


class Turn(Kept):
    policy = Policy(limit=turns)
    key: str

    async def run(self, ctx: Context) -> Done:
        ctx.resources[f"{self.key} {len(ctx.resources)}"] = 1
        return Done()


app = App(Kept)


def starts(worker: MemoryWorker) -> list[float]:
    """Return when the tries began, in seconds from the first one."""
    times = sorted(one.at for task in worker.tasks for one in task.tries)
    return [(time - times[0]).total_seconds() for time in times]


def test_no_more_than_the_limit_run_at_once() -> None:
    async def main() -> None:
        async with MemoryWorker(app, resources=Counter()) as worker:
            for number in range(30):
                await worker.client.enqueue(Pair(f"{number % 3}"))
            await worker.run()
            assert {task.state for task in worker.tasks} == {"done"}

    asyncio.run(main())


def test_rate_moves_the_clock() -> None:
    async def main() -> None:
        async with MemoryWorker(app) as worker:
            for _ in range(6):
                await worker.client.enqueue(Paced())
            await worker.run()
            assert starts(worker) == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.4], abs=1e-4)

    asyncio.run(main())


def test_cost_and_charge_move_the_clock() -> None:
    async def main() -> None:
        async with MemoryWorker(app) as worker:
            for tokens, more in ((110, 0), (0, 210), (0, 0)):
                await worker.client.enqueue(Priced(tokens, more))
                await worker.run()
            assert starts(worker) == pytest.approx([0, 1.0, 3.1], abs=1e-3)

    asyncio.run(main())


def test_throttled_pauses_the_key() -> None:
    async def main() -> None:
        async with MemoryWorker(app) as worker:
            worker.fail(Paced, Throttled(30))
            await worker.client.enqueue(Paced())
            await worker.run(within=SECOND)
            await worker.client.enqueue(Paced())
            await worker.run()
            assert starts(worker)[1:] == pytest.approx([30, 30], abs=0.2)
            assert {task.tried for task in worker.tasks} == {0}

    asyncio.run(main())


def test_breaker_opens_probes_and_closes() -> None:
    async def main() -> None:
        async with MemoryWorker(app) as worker:
            worker.fail(Fused, OSError("down"), times=3)
            await worker.client.enqueue(Fused())
            await worker.run()
            assert starts(worker) == pytest.approx([0, 1, 301, 601], abs=1e-3)

    asyncio.run(main())


def test_strict_order_waits_for_the_retry_and_for_a_person() -> None:
    async def main() -> None:
        done: dict[int, int] = {}
        async with MemoryWorker(app, resources=done) as worker:
            worker.fail(Ordered, OSError("once"), item=Ordered("a", 0))
            first = await worker.client.enqueue(Ordered("a", 0))
            for number in (1, 2):
                await worker.client.enqueue(Ordered("a", number))
            await worker.run()
            assert list(done) == [0, 1, 2]
            assert len(worker.task(first).tries) == 2
            worker.fail(Ordered, OSError("twice"), times=2)
            parked = await worker.client.enqueue(Ordered("b", 3))
            await worker.client.enqueue(Ordered("b", 4))
            await worker.run()
            assert (worker.task(parked).state, list(done)) == ("parked", [0, 1, 2])
            await worker.client.task(parked).cancel()
            await worker.run()
            assert list(done) == [0, 1, 2, 4]

    asyncio.run(main())


def test_keys_take_turns_by_weight() -> None:
    async def main() -> None:
        order: dict[str, int] = {}
        async with MemoryWorker(app, resources=order, concurrency=1) as worker:
            for key in ("light", "heavy"):
                for _ in range(12):
                    await worker.client.enqueue(Turn(key))
            await worker.run()
        first = [key.split()[0] for key in list(order)[:8]]
        assert first.count("heavy") == 6

    asyncio.run(main())
