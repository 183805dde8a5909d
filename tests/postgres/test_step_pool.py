"""The pool of `ctx.db`: steps that wait for each other's connections get an error; all others wait their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fix_database import run

from pgtask._postgres import step_pool
from pgtask._postgres.pools import user_pool
from pgtask.errors import PoolExhausted


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pool look four times as often for steps that wait for each other."""
    monkeypatch.setattr(step_pool, "CHECK_INTERVAL", 0.25)


def use(dsn: str, size: int, scenario: Callable[[Any], Awaitable[None]]) -> None:
    async def main() -> None:
        async with user_pool(dsn, size=size) as pool:
            await scenario(pool)

    run(main())


async def two_at_once(pool: Any, meet: asyncio.Barrier) -> str:
    async with pool.acquire():
        await meet.wait()
        try:
            return str(await pool.fetchval("SELECT 'got one more'"))
        except PoolExhausted as error:
            return str(error)


@pytest.mark.parametrize("size", [1, 3])
def test_deadlocked_steps_fail_until_one_can_continue(dsn: str, size: int) -> None:
    async def scenario(pool: Any) -> None:
        meet = asyncio.Barrier(size)
        answers = await asyncio.gather(*(two_at_once(pool, meet) for _ in range(size)))
        refused = [answer for answer in answers if "--pool-size" in answer]
        assert len(refused) >= 1
        assert all(f"all {size} connections of ctx.db" in answer for answer in refused)
        assert answers.count("got one more") == size - len(refused)
        assert await pool.fetchval("SELECT 1") == 1, "nothing is lost from the pool"
        async with asyncio.timeout(10):
            assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(3 * size))) == 3 * size * [1]

    use(dsn, size, scenario)


def test_second_acquire_waits_while_a_release_is_possible(dsn: str) -> None:
    async def scenario(pool: Any) -> None:
        working = await pool.acquire()
        nested = asyncio.create_task(two_at_once(pool, asyncio.Barrier(1)))
        query = asyncio.create_task(working.fetchval("SELECT 'slow' FROM pg_sleep(0.6)"))
        await asyncio.wait([nested, query], return_when=asyncio.FIRST_COMPLETED)
        assert query.done()
        assert not nested.done()
        await pool.release(working)
        assert await nested == "got one more"

    use(dsn, 2, scenario)


def test_cancelled_second_acquire_leaves_the_pool_whole(dsn: str) -> None:
    async def scenario(pool: Any) -> None:
        for _ in range(20):
            first = await pool.acquire()
            nested = asyncio.create_task(two_at_once(pool, asyncio.Barrier(1)))
            while not pool._waiting:  # noqa: ASYNC110
                await asyncio.sleep(0)
            releasing = asyncio.create_task(pool.release(first))
            await asyncio.sleep(0)
            nested.cancel()
            await asyncio.gather(nested, releasing, return_exceptions=True)
        async with asyncio.timeout(10), pool.acquire(), pool.acquire():
            pass

    use(dsn, 2, scenario)


def test_acquire_keeps_the_timeout_of_its_caller(dsn: str) -> None:
    async def scenario(pool: Any) -> None:
        async with pool.acquire():
            with pytest.raises(TimeoutError):
                await pool.acquire(timeout=0.05)

    use(dsn, 1, scenario)


async def gathers(pool: Any) -> object:
    return await asyncio.gather(pool.fetchval("SELECT 1"), pool.fetchval("SELECT 1"))


async def waits_for(pool: Any) -> object:
    return await asyncio.wait_for(pool.fetchval("SELECT 1"), 60)


async def creates_a_task(pool: Any) -> object:
    return await asyncio.create_task(gathers(pool))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("query", [gathers, waits_for, creates_a_task])
def test_step_whose_children_wait_for_its_connection_fails(
    dsn: str, query: Callable[[Any], Awaitable[object]], size: int
) -> None:
    async def step(pool: Any, meet: asyncio.Barrier) -> None:
        async with pool.acquire():
            await meet.wait()
            await query(pool)

    async def scenario(pool: Any) -> None:
        meet = asyncio.Barrier(size)
        async with asyncio.timeout(30):
            answers = await asyncio.gather(*(step(pool, meet) for _ in range(size)), return_exceptions=True)
        assert any(isinstance(answer, PoolExhausted) for answer in answers), answers
        async with asyncio.timeout(10):
            assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(3))) == [1, 1, 1]
        assert pool._in_use == {}
        assert not pool._waiting

    use(dsn, size, scenario)


def test_tasks_of_a_step_without_connection_wait(dsn: str) -> None:
    async def scenario(pool: Any) -> None:
        async with pool.acquire():
            pass
        queries = (pool.fetchval("SELECT 1 FROM pg_sleep(0.6)") for _ in range(3))
        assert await asyncio.gather(*queries) == [1, 1, 1]

    use(dsn, 1, scenario)


def test_pool_state_does_not_grow_with_connections(dsn: str) -> None:
    async def scenario(pool: Any) -> None:
        held = await pool.acquire()
        for _ in range(50):
            another = await pool.acquire()
            await pool.release(held)
            held = another
        assert len(step_pool._holds.get()) <= 2
        await pool.release(held)

    use(dsn, 2, scenario)
