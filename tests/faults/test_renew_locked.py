"""A lease is renewed though its row, or that of another lease, is locked again and again, or slow to write."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from fix_database import run

from pgtask._fastpath import Leases, TaskLease
from pgtask._ids import first_id
from pgtask._lease_clock import lease_clock
from pgtask._worker.renew import Renew

LOCKS = "BEGIN; SELECT FROM pg_task WHERE id = '{}' FOR SHARE; SELECT pg_sleep(0.02); COMMIT"


def leased(count: int) -> tuple[Leases, list[TaskLease], UUID]:
    token, leases = uuid4(), Leases()
    rows = [(UUID(int=first_id()), "{}", 0, 1, None, 0.0) for _ in range(count)]
    made, _ = leases.add_claimed(rows, token, lease_clock())
    return leases, made, token


async def insert(connection: Any, leases: list[TaskLease], token: UUID) -> None:
    await connection.execute(
        "INSERT INTO pg_task (id, step, locked_by, lock_expires_at, claims) "
        "SELECT id, '{}', $2, now() + interval '20 s', 1 FROM unnest($1::uuid[]) AS lease (id)",
        [lease.id for lease in leases],
        token,
    )


SLOW = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_sleep(600); RETURN NEW; END $$;
    CREATE TRIGGER slow BEFORE UPDATE ON pg_task FOR EACH ROW WHEN (OLD.id = '{}') EXECUTE FUNCTION slow()
"""


async def until_renewed(connection: Any, leases: list[TaskLease]) -> None:
    """Wait until each of these has been renewed three times."""
    ids = [lease.id for lease in leases]
    for _ in range(3):
        end = await connection.fetchval("SELECT max(lock_expires_at) FROM pg_task WHERE id = ANY ($1)", ids)
        async with asyncio.timeout(20):
            renewed = "SELECT bool_and(lock_expires_at > $2) FROM pg_task WHERE id = ANY ($1)"
            while not await connection.fetchval(renewed, ids, end):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def renewing(dsn: str, leases: Leases, lease_timeout: float = 20.0) -> Any:
    lost: list[TaskLease] = []
    refused: list[BaseException] = []
    renew = Renew(
        *(dsn, leases),
        name="pgtask worker 1 renew",
        pooled=False,
        lease_timeout=lease_timeout,
        heartbeat_interval=0.6,
        lost=lost.extend,
        refused=refused.append,
    )
    renew.start()
    try:
        yield lost
    finally:
        await asyncio.to_thread(renew.stop)
    assert not refused


def test_row_locked_most_of_the_time_keeps_its_lease(dsn: str) -> None:
    async def main() -> None:
        leases, made, token = leased(3)
        locks, looks = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        await insert(looks, made, token)

        async def journal() -> None:
            """Holds the row of the first for all but an instant."""
            while True:
                await locks.execute(LOCKS.format(made[0].id))

        recording = asyncio.create_task(journal())
        async with renewing(dsn, leases) as lost:
            await until_renewed(looks, made)
            assert not lost, "a lease was given up"
        recording.cancel()
        await asyncio.gather(recording, return_exceptions=True)
        locks.terminate()
        await looks.close()

    run(main())


@pytest.mark.faults
def test_row_locked_by_a_stranger_blocks_no_other_renewal(dsn: str) -> None:
    async def main() -> None:
        leases, made, token = leased(3)
        locks, looks = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        await insert(looks, made, token)
        await locks.execute(f"BEGIN; SELECT FROM pg_task WHERE id = '{made[0].id}' FOR UPDATE")
        async with renewing(dsn, leases, lease_timeout=6.0) as lost:
            until = time.monotonic() + 40
            while not lost:
                assert time.monotonic() < until
                await asyncio.sleep(0.05)
            assert set(lost) == {made[0]}
            leases.remove(made[0])
            await until_renewed(looks, made[1:])
        await locks.close()
        await looks.close()

    run(main())


@pytest.mark.parametrize("pooled", [False, True])
def test_locked_row_blocks_no_release_and_no_renewal(dsn: str, pooled: bool) -> None:
    """Another session has the row locked for as long as it takes to renew the other leases three times."""

    async def main() -> None:
        leases, made, token = leased(6)
        one_running = [(UUID(int=first_id()), "{}", 0, 2, None, 0.0)]  # in place of it a suspect, which is held as long
        (running,), _ = leases.add_claimed(one_running, token, lease_clock())
        locks, looks = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        await insert(looks, [*made, running], token)
        lost: list[TaskLease] = []
        told: list[tuple[list[TaskLease], int]] = []
        heard = threading.Event()

        def released(done: list[TaskLease], locked: int) -> None:
            leases.remove_released(done)
            told.append((done, locked))
            heard.set()

        free = "SELECT count(*) FROM pg_task WHERE locked_by IS NULL AND claims = 0"
        await locks.execute(f"BEGIN; SELECT FROM pg_task WHERE id = '{made[2].id}' FOR UPDATE")
        renew = Renew(
            *(dsn, leases),
            name="pgtask worker 1 renew",
            pooled=pooled,
            lease_timeout=20.0,
            heartbeat_interval=0.6,
            lost=lost.extend,
            refused=lambda error: told.append(([], -1)),
            released=released,
        )
        renew.start()
        try:
            until = time.monotonic() + 20
            while await looks.fetchval(free) < 5:
                assert time.monotonic() < until, "what was claimed ahead is stranded"
                await asyncio.sleep(0.05)
            assert await asyncio.to_thread(heard.wait, 20)
            await until_renewed(looks, [running])
            assert not lost
            assert [(len(done), locked) for done, locked in told] == [(5, 1)]
            assert leases.releasing == 1
            await locks.execute("COMMIT")
            until = time.monotonic() + 20
            while leases.releasing:
                assert time.monotonic() < until, "the lease of the locked row is not given back"
                await asyncio.sleep(0.05)
            assert [(len(done), locked) for done, locked in told] == [(5, 1), (1, 0)]
            assert await looks.fetchval(free) == 6
        finally:
            await asyncio.to_thread(renew.stop)
        await locks.close()
        await looks.close()

    run(main())


def test_row_that_is_slow_to_renew_costs_no_other_lease(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        leases, made, token = leased(30)
        looks = await asyncpg.connect(dsn)
        await insert(looks, made, token)
        await looks.execute(SLOW.format(made[7].id))
        async with renewing(dsn, leases) as lost:
            await until_renewed(looks, [lease for lease in made if lease is not made[7]])
            assert not lost, "a lease was given up"
        await looks.close()

    run(main())
    slow = [line for line in map(logging.LogRecord.getMessage, caplog.records) if line.startswith("database.slow")]
    assert [line.count("statement=renew") for line in slow] == [1], "the slow lease is named once"


def test_row_that_is_slow_to_release_holds_up_no_other(dsn: str) -> None:
    async def main() -> None:
        leases, made, token = leased(30)
        looks = await asyncpg.connect(dsn)
        await insert(looks, made, token)
        await looks.execute(SLOW.format(made[7].id))
        ended: list[BaseException] = []
        renew = Renew(
            *(dsn, leases),
            name="pgtask worker 1 renew",
            pooled=False,
            lease_timeout=20.0,
            heartbeat_interval=15.0,
            lost=lambda _: None,
            refused=ended.append,
            released=lambda done, _: leases.remove_released(done),
        )
        renew.start()
        try:
            async with asyncio.timeout(20):
                while len(leases):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        finally:
            await asyncio.to_thread(renew.stop)
        assert not ended
        assert await looks.fetch("SELECT id FROM pg_task WHERE locked_by IS NOT NULL") == [(made[7].id,)]
        await looks.close()

    run(main())
