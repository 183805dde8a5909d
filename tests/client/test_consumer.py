"""Consuming by hand: the caller has every claimed task, or it is being released; every write is fenced and returns the
lost leases; the leases hold while any code of the caller runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any
from uuid import UUID

import asyncpg
import flows
import pytest
from apps import Mark, Noop, Raises, app
from fix_claims import HastyRenew
from fix_database import run
from proxy import Line
from sessions import until_blocked

from pgtask import App, Client, Consumer, Context, DatabaseUnavailable, Done, Task
from pgtask._consumer import statements
from pgtask._worker.wake import Wake
from pgtask.errors import ConsumeError, DataRefused, DecodeError, UnknownStepError

QUEUE = "emails"
LONG = timedelta(seconds=30)
CUT = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name LIKE 'pgtask consumer%' AND datname = current_database()
"""

pytestmark = pytest.mark.one_database("DROP TRIGGER IF EXISTS guard ON pg_task; TRUNCATE pg_task_runs")


# --- tools ---------------------------------------------------------------------------------------------------


class Bench:
    """A client, and a connection that reads and changes the rows."""

    def __init__(self, client: Client, db: Any) -> None:
        self.client = client
        self.db = db

    async def enqueue(self, number: int = 1, **options: Any) -> None:
        await self.client.enqueue_many([Noop(n) for n in range(number)], queue=QUEUE, **options)

    async def rows(self) -> list[Any]:
        rows: list[Any] = await self.db.fetch("SELECT * FROM pg_task ORDER BY id")
        return rows

    async def until(self, condition: str, *args: Any) -> None:
        async with asyncio.timeout(20):
            while not await self.db.fetchval(f"SELECT {condition} FROM pg_task", *args):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def until_idle(self) -> None:
        """The consumer has listened and polled, and waits."""
        async with asyncio.timeout(20):
            while not await self.db.fetchval(  # noqa: ASYNC110
                "SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name LIKE 'pgtask consumer % listen'"
                " AND query ~ 'LISTEN|virtualtransaction|pg_advisory_unlock_all' AND datname = current_database()"
            ):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def bench(dsn: str, through: str | None = None) -> AsyncIterator[Bench]:
    db = await asyncpg.connect(dsn)
    try:
        async with Client(through or dsn, app=app) as client:
            yield Bench(client, db)
    finally:
        await db.close()


@asynccontextmanager
async def consuming(dsn: str, number: int = 0, *, through: str | None = None) -> AsyncIterator[tuple[Bench, Consumer]]:
    async with bench(dsn, through) as made:
        await made.enqueue(number)
        async with made.client.consumer(QUEUE, lease_timeout=timedelta(seconds=60)) as consumer:
            yield made, consumer


# --- claim ---------------------------------------------------------------------------------------------------


def test_consumer_claims_highest_priority_then_oldest(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as b, b.client.consumer(QUEUE) as consumer:
            for number, priority in enumerate([0, 5, 0, 5, 0]):
                await b.client.enqueue(Noop(number), queue=QUEUE, priority=priority, key=f"key {number}")
            await b.client.enqueue(Noop(9), queue="another")
            await b.client.delay(Noop(9), timedelta(hours=1), queue=QUEUE)
            first = await consumer.claim(3)
            rest = await consumer.claim(10)
            assert [lease.step for lease in first + rest] == [Noop(1), Noop(3), Noop(0), Noop(2), Noop(4)]
            assert [lease.key for lease in first] == ["key 1", "key 3", "key 0"]
            assert {(lease.queue, lease.tried, lease.claims, lease.lost) for lease in rest} == {(QUEUE, 0, 1, False)}
            assert [lease.priority for lease in first] == [5, 5, 0]
            assert rest[0].raw == '{"Odd":{"Noop":{"number":2}}}'
            assert abs(rest[0].created_at - datetime.now(UTC)) < timedelta(minutes=1)
            left = rest[0].expires_at - datetime.now(UTC)
            assert timedelta(seconds=50) < left <= timedelta(seconds=60)
            (row,) = [row for row in await b.rows() if row["id"] == rest[0].task_id]
            assert abs(row["lock_expires_at"] - rest[0].expires_at) < timedelta(seconds=1)
            assert await consumer.claim() == []

    run(main())


def test_consumer_serves_several_queues(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as b, b.client.consumer(["a", "b"]) as consumer:
            for queue in "abc":
                await b.client.enqueue(Noop(), queue=queue)
            assert {lease.queue for lease in await consumer.claim()} == {"a", "b"}

    run(main())


def test_waiting_claim_is_woken_by_an_enqueue(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn) as (b, consumer):
            waiting = asyncio.create_task(consumer.claim(wait=timedelta(hours=1)))
            await b.until_idle()
            while consumer._claim.next_poll < time.monotonic() + 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            consumer._claim.next_poll = inf  # only the notification
            await b.enqueue()
            assert len(await waiting) == 1

    run(main())


def test_waiting_claim_sees_tasks_that_fall_due(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn) as (b, consumer):
            await b.client.delay(Noop(), timedelta(seconds=0.3), queue=QUEUE)
            assert len(await consumer.claim(wait=LONG)) == 1

    run(main())


def test_claim_returns_nothing_after_its_wait(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn) as (_, consumer):
            began = time.monotonic()
            assert await consumer.claim(wait=timedelta(seconds=0.3)) == []
            assert time.monotonic() - began >= 0.3

    run(main())


def test_claim_without_wait_sees_a_fresh_task(dsn: str) -> None:
    async def main() -> None:
        terms: dict[str, Any] = {"app": None, "lease_timeout": timedelta(seconds=60), "pooled": True}
        async with bench(dsn) as b, Consumer(dsn, QUEUE, **terms) as consumer:
            for _ in range(20):
                assert await consumer.claim() == []
                await b.enqueue()
                assert await consumer.done(await consumer.claim()) == []
            assert await b.rows() == []

    run(main())


class Plain(Task):
    """A task of the user's with a step that is called as that of a workflow."""


class Run(Plain):
    async def run(self, ctx: Context) -> Done:
        return Done()


RUN = '{"waiting":{"Run":0}}'
LOOKS_LIKE_ONE = ['{ "wait\\"ing" :\n {"Run" : null}}', RUN]
LOOKS_LIKE_NONE = [
    '{"Odd":{"Noop":{"number":"{\\"Run\\":0}"}}}',
    '{"Run":{"Noop":{"Run":0}}}',
    '"Run"',
    '{"a\\x":{"Runs":0}}',
]


def test_done_of_a_run_is_refused(dsn: str) -> None:
    """Its record would say that it was cancelled, and its parent would sleep on."""

    async def main() -> None:
        async with consuming(dsn) as (b, consumer):
            add = "INSERT INTO pg_task (step, queue) SELECT step, $2 FROM unnest($1::text[]) AS step"
            await b.db.execute(add, LOOKS_LIKE_ONE + LOOKS_LIKE_NONE, QUEUE)
            leases = await consumer.claim()
            runs = [lease for lease in leases if lease.raw in LOOKS_LIKE_ONE]
            for lease in runs:
                with pytest.raises(ConsumeError, match=rf"done\(\) of <Lease {lease.task_id}>, the run of a workflow"):
                    await consumer.done(leases)
                leases.remove(lease)
            assert await consumer.done(leases) == []
            assert await consumer.fail(runs[0], "no") == []
            assert await consumer.release(runs[1]) == []
            assert len(await b.rows()) == 2

    run(main())


def test_known_task_of_a_workflow_shape_is_no_run(dsn: str) -> None:
    async def main() -> None:
        async with Client(dsn, app=App(Plain, flows.waiting)) as client, client.consumer(QUEUE) as consumer:
            await client.enqueue(Run(), queue=QUEUE)
            await client.trigger(flows.waiting, 0, queue=QUEUE)
            for lease in await consumer.claim():
                if lease.raw == RUN:
                    with pytest.raises(ConsumeError, match="the run of a workflow"):
                        await consumer.done(lease)
                else:
                    assert await consumer.done(lease) == []

    run(main())


def test_claim_may_have_any_limit(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statements, "MAX_BATCH", 700)

    async def main() -> None:
        async with consuming(dsn, 3000) as (b, consumer):
            leases = await consumer.claim(2900)
            assert [lease.raw for lease in leases] == [row["step"] for row in await b.rows()][:2900]
            assert await consumer.extend(leases) == []
            assert await consumer.done(leases[:2000]) == []
            assert await consumer.release(leases[2000:]) == []
            assert {row["locked_by"] for row in await b.rows()} == {None}
            assert len(await b.rows()) == 1000

    run(main())


def test_concurrent_claims_of_a_consumer_differ(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 100) as (_, consumer):
            claims = await asyncio.gather(*(consumer.claim(20, wait=LONG) for _ in range(5)))
            assert len({lease.task_id for leases in claims for lease in leases}) == 100

    run(main())


def test_cancelled_claim_is_carried_through_and_released(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 5) as (b, consumer):
            (pid,) = await b.db.fetchrow(
                "SELECT pid FROM pg_stat_activity WHERE application_name ~ '^pgtask consumer \\d+$'"
                " AND datname = current_database()"
            )
            async with b.db.transaction():
                await b.db.execute("LOCK TABLE pg_task IN SHARE ROW EXCLUSIVE MODE")  # blocks claims, not polls
                claim = asyncio.create_task(consumer.claim(wait=LONG))
                await until_blocked(b.db, pid)
                claim.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await claim
            await b.until("bool_and(locked_by IS NULL) AND bool_and(updated_at = created_at)")
            assert [lease.claims for lease in await consumer.claim(wait=LONG)] == [1] * 5

    run(main())


FAR = "INSERT INTO pg_task (step, queue, created_at) VALUES ($1, $2, '60000-01-01'), ($1, $2, '0044-03-15 BC')"


@pytest.mark.parametrize("pooled", [False, True])
def test_consumer_claims_a_far_time(dsn: str, pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pooled:
        monkeypatch.setenv("PGTASK_NO_LISTEN", "1")

    async def main() -> None:
        async with consuming(dsn, 1) as (b, consumer):
            await b.db.execute(FAR, '{"Odd":{"Noop":{"number":7}}}', QUEUE)
            leases = await consumer.claim(10)
            assert sorted(str(lease.created_at) for lease in leases if lease.step == Noop(7)) == [
                "0044-03-15T00:00:00Z BC",
                "60000-01-01T00:00:00Z",
            ]
            assert await consumer.done(leases) == []
            assert await b.rows() == []

    run(main())


def test_failed_claim_releases_its_tasks(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate one more kind of row that cannot be read."""

    async def without(_connection: Any) -> None:
        pass

    monkeypatch.setattr("pgtask.consumer.allow_far_times", without)

    async def main() -> None:
        async with consuming(dsn) as (b, consumer):
            await b.enqueue(3, priority=5)
            await b.db.execute(FAR, "{}", QUEUE)
            for _ in range(2):
                with pytest.raises(OverflowError):
                    await consumer.claim(10)
                found = await b.db.fetch("SELECT count(*), bool_or(locked_by IS NOT NULL), max(claims) FROM pg_task")
                assert [tuple(row) for row in found] == [(5, False, 0)]
            assert len(await consumer.claim(3)) == 3

    run(main())


# --- what became of them -------------------------------------------------------------------------------------


def test_outcomes_of_a_consumer_are_in_the_rows(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 5) as (b, consumer):
            done, retried, later, failed, released = await consumer.claim()
            assert await consumer.done(done) == []
            assert await consumer.retry([retried]) == []
            assert await consumer.retry(later, after=timedelta(hours=1)) == []
            assert await consumer.fail((failed,), "no such address\0") == []
            assert await consumer.release(iter([released])) == []
            rows = {row["id"]: row for row in await b.rows()}
            assert done.task_id not in rows
            assert {row["locked_by"] for row in rows.values()} == {None}
            assert {row["claims"] for row in rows.values()} == {0}
            told = {id: (row["tried"], row["error"]) for id, row in rows.items()}
            assert told == {
                retried.task_id: (1, None),
                later.task_id: (1, None),
                failed.task_id: (1, "no such address\N{SYMBOL FOR NULL}"),
                released.task_id: (0, None),
            }
            assert rows[later.task_id]["wakeup_at"] - rows[retried.task_id]["wakeup_at"] > timedelta(minutes=59)
            again = await consumer.claim()
            assert [(lease.task_id, lease.tried) for lease in again] == [(released.task_id, 0), (retried.task_id, 1)]

    run(main())


def test_fail_takes_an_exception(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 1) as (b, consumer):
            await consumer.fail(await consumer.claim(), ValueError("no such address"))
            (row,) = await b.rows()
            assert row["error"] == "ValueError: no such address"

    run(main())


@pytest.mark.parametrize("verb", ["done", "retry", "fail", "release", "extend"])
def test_each_verb_returns_lost_leases_unwritten(dsn: str, verb: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 4) as (b, consumer):
            leases = await consumer.claim()
            await b.db.execute(
                "UPDATE pg_task SET locked_by = gen_random_uuid() WHERE id = ANY ($1)",
                [leases[1].task_id, leases[3].task_id],
            )
            before = {row["id"]: row for row in await b.rows()}
            words = ["gone"] if verb == "fail" else []
            assert await getattr(consumer, verb)(leases, *words) == [leases[1], leases[3]]
            assert [lease.lost for lease in leases] == [False, True, False, True]
            after = {row["id"]: row for row in await b.rows()}
            for lost in (leases[1], leases[3]):
                assert after[lost.task_id] == before[lost.task_id]

    run(main())


def test_lease_of_a_removed_task_is_lost(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 2) as (b, consumer):
            first, second = await consumer.claim()
            await b.db.execute("DELETE FROM pg_task WHERE id = $1", first.task_id)
            assert await consumer.release([first, second]) == [first]

    run(main())


def test_expired_unclaimed_lease_can_be_settled(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 1) as (b, consumer):
            (lease,) = await consumer.claim()
            await b.db.execute("UPDATE pg_task SET lock_expires_at = now() - interval '1 s'")
            assert await consumer.done(lease) == []
            assert await b.rows() == []

    run(main())


def test_expired_lease_is_claimed_and_counts_its_claims(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 1) as (b, first):
            await first.claim()
            await b.db.execute("UPDATE pg_task SET lock_expires_at = now() - interval '1 s'")
            async with b.client.consumer(QUEUE) as second:
                (lease,) = await second.claim()
                assert (lease.claims, lease.tried) == (2, 0)

    run(main())


def test_cancelled_done_is_carried_through(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 3) as (b, consumer):
            leases = await consumer.claim()
            async with b.db.transaction():
                await b.db.execute("SELECT FROM pg_task FOR UPDATE")
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await consumer.done(leases)
                with pytest.raises(ConsumeError, match=r"which done\(\) has already settled"):
                    await consumer.release(leases)
            await b.until("count(*) = 0")

    run(main())


def test_refused_statement_keeps_the_leases(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 2) as (b, consumer):
            leases = await consumer.claim()
            await b.db.execute(
                "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN RAISE EXCEPTION 'not that one'; END $$;"
                " CREATE TRIGGER guard BEFORE DELETE ON pg_task FOR EACH ROW"
                f" WHEN (OLD.id = '{leases[0].task_id}') EXECUTE FUNCTION refuse()"
            )
            with pytest.raises(DataRefused, match="not that one"):
                await consumer.done(leases)
            assert await consumer.done(leases[1]) == []
            assert await consumer.fail(leases[0], "refused") == []

    run(main())


# --- holding -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty_renewal")
def test_leases_hold_while_the_loop_is_blocked(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 2) as (b, consumer):
            leases = await consumer.claim()
            ends = [lease.expires_at for lease in leases]
            spin_until(lambda: all(lease.expires_at > end for lease, end in zip(leases, ends, strict=True)))
            assert [lease.lost for lease in leases] == [False, False]
            async with b.client.consumer(QUEUE) as other:
                assert await other.claim() == []
            assert await consumer.done(leases) == []

    run(main())


@pytest.mark.usefixtures("hasty_renewal")
def test_lost_lease_shows_while_the_loop_is_blocked(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 2) as (b, consumer):
            lost, kept = await consumer.claim()
            await b.db.execute("UPDATE pg_task SET locked_by = gen_random_uuid() WHERE id = $1", lost.task_id)
            spin_until(lambda: lost.lost)
            assert not kept.lost
            assert repr(lost).endswith("lost>")
            assert await consumer.done([lost, kept]) == [lost]

    run(main())


def spin_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def renew_all(consumer: Consumer) -> None:
    """Block the loop until renewal has come and gone: its leases are due by then, and it has read the answers."""
    time.sleep(0.2)
    renew = consumer._renew
    assert isinstance(renew, HastyRenew)
    turns = renew.turns
    spin_until(lambda: renew.turns > turns + 3)


@pytest.mark.usefixtures("hasty_renewal")
def test_renewal_during_done_loses_nothing(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 2) as (_, consumer):
            first, second = await consumer.claim()
            await consumer.done(first)
            done = asyncio.create_task(consumer.done(second))
            for _ in range(10):
                await asyncio.sleep(0)  # it is sent
            renew_all(consumer)  # before we have read the answer
            assert not second.lost
            assert await done == []

    run(main())


@pytest.mark.usefixtures("hasty_renewal")
@pytest.mark.parametrize("by", ["a claim that was cancelled", "the end"])
def test_renewal_during_release_loses_nothing(dsn: str, by: str, caplog: pytest.LogCaptureFixture) -> None:
    """The answer to the release is not read yet, and its leases are due for renewal."""

    async def main() -> None:
        async with consuming(dsn, 3) as (b, consumer):
            given_back = asyncio.Event()
            release = consumer._statements._link.run

            async def slowly(name: str, *args: Any, **options: Any) -> list[Any]:
                rows = await release(name, *args, **options)
                if name == "release":
                    given_back.set()
                    renew_all(consumer)  # before the answer has been read
                return rows

            consumer._statements._link.run = slowly  # type: ignore[method-assign]
            if by == "the end":
                await consumer.claim()
                return
            async with b.db.transaction():
                await b.db.execute("LOCK TABLE pg_task IN SHARE ROW EXCLUSIVE MODE")
                claim = asyncio.create_task(consumer.claim(wait=LONG))
                await until_blocked(b.db, consumer._link.connection.get_server_pid())
                claim.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await claim
            await asyncio.wait_for(given_back.wait(), 20)
            await b.until("bool_and(locked_by IS NULL)")

    run(main())
    assert "lease.lost" not in caplog.text


def test_refused_release_lets_the_leases_expire(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with consuming(dsn, 2) as (b, consumer):
            await consumer.claim()
            await b.db.execute(
                "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN RAISE EXCEPTION 'not that one'; END $$;"
                " CREATE TRIGGER guard BEFORE UPDATE ON pg_task FOR EACH ROW EXECUTE FUNCTION refuse()"
            )
        assert len(consumer._held) == 0

    run(main())
    assert "leases.abandoned" in caplog.text


def test_steps_are_not_decoded_without_an_archive(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 2) as (_, consumer):
            leases = await consumer.claim()
            consumer._held.table = Undecoded()  # type: ignore[assignment]
            assert await consumer.done(leases) == []

    run(main())


class Undecoded:
    def decode(self, text: str) -> None:
        raise AssertionError(text)


@pytest.mark.usefixtures("hasty_renewal")
def test_renewal_does_not_shorten_an_extension(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 2) as (b, consumer):
            consumer._renew._heartbeat_interval = inf  # nothing is renewed yet
            extended, other = await consumer.claim()
            assert await consumer.extend(extended, timedelta(hours=1)) == []
            consumer._renew._heartbeat_interval = 0.1
            for _ in range(3):
                end = await b.db.fetchval("SELECT lock_expires_at FROM pg_task WHERE id = $1", other.task_id)
                await b.until("bool_or(id = $1 AND lock_expires_at > $2)", other.task_id, end)
            left = await b.db.fetchval("SELECT lock_expires_at - now() FROM pg_task WHERE id = $1", extended.task_id)
            assert left > timedelta(minutes=59)
            assert extended.expires_at - datetime.now(UTC) > timedelta(minutes=59)

    run(main())


def test_end_of_a_consumer_releases_its_leases(dsn: str) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="of the caller"):  # noqa: PT012
            async with consuming(dsn, 5) as (b, consumer):
                leases = await consumer.claim()
                await consumer.done(leases[0])
                raise RuntimeError("of the caller")
        async with bench(dsn) as b:
            assert [(row["locked_by"], row["claims"]) for row in await b.rows()] == [(None, 0)] * 4
            names = await b.db.fetch("SELECT FROM pg_stat_activity WHERE application_name LIKE 'pgtask consumer%'")
            assert names == []
        with pytest.raises(ConsumeError, match="the consumer is not open"):
            await consumer.done(leases[1])

    run(main())


# --- faults --------------------------------------------------------------------------------------------------


def test_consumer_survives_cut_connections(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 2) as (b, consumer):
            leases = await consumer.claim()
            await b.db.execute(CUT)
            assert await consumer.done(leases) == []
            await b.db.execute(CUT)
            waiting = asyncio.create_task(consumer.claim(wait=LONG))
            await b.until_idle()
            await b.enqueue()
            assert len(await waiting) == 1

    run(main())


def test_release_waits_for_a_locked_row_but_not_the_others(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn, 4) as (b, consumer):
            leases = await consumer.claim(4)
            await b.db.execute("UPDATE pg_task SET locked_by = gen_random_uuid() WHERE id = $1", leases[3].task_id)
            locks = await asyncpg.connect(dsn)
            async with locks.transaction():
                await locks.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", leases[0].task_id)
                releasing = asyncio.create_task(consumer.release(leases))
                await b.until("count(*) FILTER (WHERE locked_by IS NULL) = 2")
                assert not releasing.done()
            assert await releasing == [leases[3]]
            await locks.close()
            assert sorted((row["locked_by"] is None, row["claims"]) for row in await b.rows()) == [
                (False, 1), (True, 0), (True, 0), (True, 0),
            ]  # fmt: skip

    run(main())


END: dict[str, Callable[[Consumer, list[Any]], Any]] = {
    "done": lambda consumer, leases: consumer.done(leases),
    "retry": lambda consumer, leases: consumer.retry(leases, LONG),
    "fail": lambda consumer, leases: consumer.fail(leases, "no"),
    "release": lambda consumer, leases: consumer.release(leases),
}


@pytest.mark.parametrize("how", ["listening", "pooled"])
@pytest.mark.parametrize("verb", END)
def test_locked_row_delays_its_own_call_only(dsn: str, verb: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "pooled":
        monkeypatch.setenv("PGTASK_NO_LISTEN", "1")

    async def main() -> None:
        async with consuming(dsn, 4) as (b, consumer):
            leases = await consumer.claim(3)
            locks = await asyncpg.connect(dsn)
            async with locks.transaction():
                await locks.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", leases[0].task_id)
                ending = asyncio.create_task(END[verb](consumer, leases[:2]))
                await b.until(
                    "NOT coalesce(bool_or(locked_by IS NOT NULL) FILTER (WHERE id = $1), false)", leases[1].task_id
                )
                assert await consumer.done(leases[2]) == []
                assert len(await consumer.claim(1)) == 1
                assert not ending.done()
            assert await ending == []
            await locks.close()

    run(main())


def test_locked_parent_delays_the_end_of_its_child_only(dsn: str) -> None:
    """A trigger writes its rows; the consumer finds by halves for which lease it does."""

    async def main() -> None:
        async with consuming(dsn, 7) as (b, consumer):
            parent = await b.db.fetchval(
                "INSERT INTO pg_task_runs (id, name) VALUES ($1, 'flow') RETURNING id", UUID(int=1)
            )
            leases = await consumer.claim(7)
            child = leases[4].task_id
            await b.db.execute(
                "INSERT INTO pg_task_runs (id, name, parent, awaited) VALUES ($1, 'flow', $2, true)", child, parent
            )
            locks = await asyncpg.connect(dsn)
            async with locks.transaction():
                await locks.execute("SELECT FROM pg_task_runs WHERE id = $1 FOR UPDATE", parent)
                failing = asyncio.create_task(consumer.fail(leases, "no"))
                await b.until("count(*) FILTER (WHERE error = 'no') = 6")
                assert not failing.done()
            assert await failing == []
            assert await b.db.fetchval("SELECT state FROM pg_task_runs WHERE id = $1", child) == "ERROR"
            await locks.close()

    run(main())


@pytest.mark.parametrize("verb", ["done", "retry", "release"])
def test_written_but_unanswered_lease_is_not_lost(dsn: str, verb: str) -> None:
    async def main() -> None:
        async with Line(dsn) as line, consuming(dsn, 3, through=line.dsn) as (_, consumer):
            first, *leases = await consumer.claim()
            await getattr(consumer, verb)(first)  # it is prepared now: what comes next is the answer to it
            line.swallow()
            assert await getattr(consumer, verb)(leases) == []
            assert line.cut == 1
            assert not any(lease.lost for lease in leases)

    run(main())


def test_listener_cancelled_during_a_loss_ends(dsn: str) -> None:
    """At each moment of the loss: one of them once swallowed the cancellation, and the consumer never closed."""

    async def main() -> None:
        for turns in range(8):
            wake = Wake(dsn, name="pgtask listen", queues=(), hint=lambda: None, stop=None)
            await wake.open()
            listening = asyncio.create_task(wake.run())
            await asyncio.sleep(0.1)  # it waits by then; if not, this loses nothing but sharpness
            wake._link.connection.terminate()
            for _ in range(turns):
                await asyncio.sleep(0)
            listening.cancel()
            assert await asyncio.wait([listening], timeout=20) == ({listening}, set()), f"{turns} turns of the loop"

    run(main())


def test_claim_with_lost_reply_is_recovered(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as line, consuming(dsn, 20, through=line.dsn) as (_, consumer):
            assert len(await consumer.claim(2)) == 2  # the lane is known now: what is sent next is a claim
            consumer._claim.next_poll = inf
            line.swallow()
            assert len(await consumer.claim(18, wait=LONG)) == 18
            assert line.cut == 1

    run(main())


def test_claim_raises_if_the_database_is_unavailable(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as line, consuming(dsn, through=line.dsn) as (b, consumer):
            line._server.close()
            await b.db.execute(CUT)
            with pytest.raises(DatabaseUnavailable, match="the database is unavailable"):
                await consumer.claim(wait=timedelta(seconds=0.2))

    run(main())


# --- steps, and mistakes -------------------------------------------------------------------------------------


def test_invalid_row_harms_no_other(dsn: str) -> None:
    async def main() -> None:
        async with consuming(dsn) as (b, consumer):
            for step in ('{"Odd":{"Noop":{"number":"x"}}}', "garbage", '{"Of":{"Others":null}}', '{"Odd":{"Noop":{}}}'):
                await b.db.execute("INSERT INTO pg_task (step, queue) VALUES ($1, $2)", step, QUEUE)
            wrong, garbage, unknown, good = await consumer.claim()
            with pytest.raises(DecodeError, match=r"Odd.Noop cannot be decoded: Expected `int`, got `str`"):
                _ = wrong.step
            with pytest.raises(DecodeError, match="not valid JSON"):
                _ = garbage.step
            with pytest.raises(UnknownStepError, match=r"unknown step Of\.Others"):
                _ = unknown.step
            assert good.step == Noop(0)
            assert garbage.raw == "garbage"

    run(main())


def test_consumer_without_an_app_has_raw_steps(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as b, Client(dsn) as client, client.consumer(QUEUE) as consumer:
            await b.enqueue()
            (lease,) = await consumer.claim()
            assert lease.raw == '{"Odd":{"Noop":{"number":0}}}'
            with pytest.raises(ConsumeError, match=r"the client has no app to decode steps with"):
                _ = lease.step

    run(main())


def test_consumer_gets_large_steps_whole(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as b, Client(dsn, app=app, max_step_bytes=10_000_000) as client:
            await client.enqueue(Mark("x" * 5_000_000), queue=QUEUE)
            async with b.client.consumer(QUEUE) as consumer:
                (lease,) = await consumer.claim()
                assert len(lease.step.name) == 5_000_000  # type: ignore[attr-defined]

    run(main())


def test_mistakes_of_a_consumer_are_named(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as b, b.client.consumer(QUEUE) as consumer, b.client.consumer("other") as other:
            await b.client.enqueue(Raises("x"), queue=QUEUE)
            (lease,) = await consumer.claim()
            anything: Any = object()
            for wrong, said in [
                (consumer.claim(0), r"claim\(limit=0\) must be a whole number, 1 or more"),
                (consumer.claim(wait=anything), "wait=<object .* must be a timedelta, zero or more"),
                (consumer.retry(lease, after=timedelta(-1)), r"after=.* must be a timedelta, zero or more"),
                (other.done(lease), r"done\(\) takes leases of this consumer, not <Lease"),
                (consumer.done(anything), r"done\(\) takes leases of this consumer, not <object"),
                (consumer.done([anything]), r"done\(\) takes leases of this consumer, not <object"),
            ]:
                with pytest.raises(ConsumeError, match=said):
                    await wrong
            await consumer.done([lease, lease])
            with pytest.raises(ConsumeError, match=r"retry\(\) of <Lease .*>, which done\(\) has already settled"):
                await consumer.retry(lease)
            makers: list[tuple[Callable[[], Any], str]] = [
                (lambda: b.client.consumer(""), "queue '' must be a printable string"),
                (lambda: b.client.consumer([]), "needs the name of at least one queue"),
                (lambda: b.client.consumer(lease_timeout=timedelta(0)), "lease_timeout must be longer than zero"),
            ]
            for make, said in makers:
                with pytest.raises(ConsumeError, match=said):
                    make()
            with pytest.raises(ConsumeError, match="the consumer is not open"):
                await b.client.consumer(QUEUE).claim()

    run(main())


def test_many_lost_leases_are_some_lines_and_a_count(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with consuming(dsn, 300) as (b, consumer):
            leases = await consumer.claim(300)
            await b.db.execute("DELETE FROM pg_task")
            assert len(await consumer.done(leases)) == 300

    with caplog.at_level(logging.WARNING, "pgtask.consumer"):
        run(main())
    events: list[Any] = [record.msg for record in caplog.records]
    said = [event.fields for event in events if event.name == "lease.lost"]
    counts = [fields["more"] for fields in said if "more" in fields]
    assert len(said) < 40
    assert len(said) - len(counts) + sum(counts) == 300
