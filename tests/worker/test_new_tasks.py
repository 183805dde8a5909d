"""The new tasks of an outcome: the statement that writes the outcome inserts them, exactly once or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
import trees
from fix_database import run
from late import begun
from proxy import Line
from sessions import connected, our_session, until_waiting
from writers import Flushing, running

from pgtask._fastpath import Codec, NewTask, Outcomes, TaskLease
from pgtask._postgres import writer
from pgtask._postgres.store import HOT_SETTINGS, statement

CODEC = Codec(trees.Closes, "Tree", "Closes", False)
FAR = datetime(2099, 1, 1, tzinfo=UTC)
KINDS = ("done", "archived", "continued", "rescheduled")
GUARDS = """
    DROP TRIGGER IF EXISTS guard ON pg_task; ALTER TABLE pg_task DROP CONSTRAINT IF EXISTS guard;
    DROP POLICY IF EXISTS guard ON pg_task; ALTER TABLE pg_task DISABLE ROW LEVEL SECURITY;
    TRUNCATE pg_task_archive
"""

pytestmark = [pytest.mark.one_database(GUARDS), pytest.mark.timeout(60)]


class Bench(Flushing):
    """A flush, and a connection of the test."""

    def __init__(self, dsn: str, db: Any) -> None:
        super().__init__(dsn)
        self.db = db
        self.due: list[float] = []
        self.flush.due_in = self.due.append

    async def take(self, n: int, *keys: str) -> list[TaskLease]:
        """Enqueue and claim `n` tasks; the first of them have these keys."""
        await self.db.execute(
            "INSERT INTO pg_task (step, key, wakeup_at)"
            " SELECT '{}', ($2::text[])[n], now() - make_interval(secs => $1 - n) FROM generate_series(1, $1) AS n",
            n, list(keys),
        )  # fmt: skip
        token = uuid4()
        rows = await self.db.fetch(statement("claim"), "default", 0, n, token, 60.0, 1000, 0.0)
        return self.leases.add_claimed(sorted(rows, key=lambda row: row[5]), token, 0.0)[0]

    async def parents(self, leases: list[TaskLease]) -> list[Any]:
        return list(await self.db.fetch("SELECT * FROM pg_task WHERE id = ANY ($1)", [lease.id for lease in leases]))

    async def new(self) -> list[str]:
        """The new tasks, in the order of their ids."""
        return [row[0] for row in await self.db.fetch("SELECT step FROM pg_task WHERE step ~ 'Closes' ORDER BY id")]

    async def everything(self) -> list[Any]:
        return [await self.db.fetch(f"SELECT * FROM {table} ORDER BY id") for table in ("pg_task", "pg_task_archive")]


@asynccontextmanager
async def bench(dsn: str, through: str | None = None) -> AsyncIterator[Bench]:
    async with connected(dsn) as db:
        made = Bench(through or dsn, db)
        async with running(made):
            yield made


def new(
    *names: str, key: str | None = None, queue: str = "default", at: Any = None, delay: Any = None
) -> list[NewTask]:
    first = uuid4().int
    return [
        NewTask(CODEC, UUID(int=first + number), CODEC.encode(trees.Closes(name)), at, delay, queue, 3, key)
        for number, name in enumerate(names)
    ]


def text(name: str) -> str:
    return CODEC.encode(trees.Closes(name))


def add(outcomes: Outcomes, lease: TaskLease, kind: str, tasks: list[NewTask] | None = None) -> None:
    match kind:
        case "done":
            outcomes.add_done(lease)
        case "archived":
            outcomes.add_archived(lease)
        case "continued":
            outcomes.add_continued(lease, '{"T":{"Next":null}}')
        case "rescheduled":
            outcomes.add_rescheduled(lease, '{"T":{"Next":null}}', 0, None, 5.0)
    outcomes.add_new_tasks(lease, tasks or [])


def filled(leases: list[TaskLease], kind: str, tasks: list[NewTask]) -> Outcomes:
    outcomes = Outcomes()
    for lease in leases:
        add(outcomes, lease, kind, tasks)
    return outcomes


async def finish_new(at: Bench) -> None:
    """Let another worker finish the new tasks."""
    await at.db.execute("DELETE FROM pg_task WHERE step ~ 'Closes'")


# --- written once


@pytest.mark.parametrize("kind", KINDS)
def test_new_tasks_come_with_their_outcome(dsn: str, kind: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            with_tasks, without = await at.take(2)
            outcomes = filled([with_tasks], kind, new("a") + new("b", at=FAR) + new("c", delay=60.0, queue="other"))
            add(outcomes, without, "done")
            assert await at.write(outcomes) == ([with_tasks] if kind == "continued" else [])
            rows = await at.db.fetch("SELECT * FROM pg_task WHERE step ~ 'Closes' ORDER BY step")
            assert [row["step"] for row in rows] == [text("a"), text("b"), text("c")]
            assert [row["queue"] for row in rows] == ["default", "default", "other"]
            assert {(row["priority"], row["key"], row["tried"], row["locked_by"], row["error"]) for row in rows} == {
                (3, None, 0, None, None)
            }
            assert rows[1]["wakeup_at"] == FAR
            assert 59 < (rows[2]["wakeup_at"] - rows[0]["wakeup_at"]).total_seconds() < 61
            left = await at.parents([with_tasks, without])
            assert len(left) == (kind in ("continued", "rescheduled"))
            assert await at.db.fetchval("SELECT count(*) FROM pg_task_archive") == (kind == "archived")
            assert (at.flush.lost, at.due) == (0, [0.0])

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_late_copy_of_the_statement_inserts_nothing(dsn: str, kind: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            (lease,) = await at.take(1)
            outcomes = filled([lease], kind, new("a", "b"))
            await at.write(outcomes)
            assert len(await at.new()) == 2
            await finish_new(at)
            before = await at.everything()
            for copy in range(2):
                found = await at.db.fetch(statement(outcomes.statement), *outcomes.parameters(1))
                assert await at.new() == []
                if kind == "continued":  # it is still ours
                    assert list(found[0].values()) == [None, None, None, None]
                    after = await at.everything()
                    assert [row["position"] for row in after[0]] == [row["position"] for row in before[0]] == [1]
                else:
                    assert await at.everything() == before, copy

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_copy_that_began_before_the_first_inserts_nothing(dsn: str, kind: str) -> None:
    """It has its snapshot, in which the outcome is not written."""

    async def main() -> None:
        async with bench(dsn) as at, our_session(dsn, **HOT_SETTINGS) as late:
            (lease,) = await at.take(1)
            outcomes = filled([lease], kind, new("a", "b"))
            number = {"done": 1, "archived": 1, "continued": 3, "rescheduled": 7}[kind]
            arguments = outcomes.parameters(1)
            async with begun(at.db, late, outcomes.statement, *arguments, number=number) as under_way:
                await at.write(outcomes)
                await finish_new(at)
            found = list((await under_way)[0].values())
            assert await at.new() == []
            assert (None if kind == "continued" else []) in found

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_copy_that_waits_for_the_first_inserts_nothing(dsn: str, kind: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at, our_session(dsn, **HOT_SETTINGS) as late:
            (lease,) = await at.take(1)
            outcomes = filled([lease], kind, new("a", "b"))
            query, arguments = statement(outcomes.statement), outcomes.parameters(1)
            async with at.db.transaction():
                await at.db.fetch(query, *arguments)
                waiting = asyncio.create_task(late.fetch(query, *arguments))
                await until_waiting(at.db)
                await finish_new(at)
            found = list((await waiting)[0].values())
            assert await at.new() == []
            assert (None if kind == "continued" else []) in found

    run(main())


def test_outcomes_with_a_lost_reply_enqueue_once(dsn: str) -> None:
    async def main() -> None:
        async with Line(dsn) as line, bench(dsn, line.dsn) as at:
            await at.write(Outcomes())
            for kind in KINDS:
                (lease,) = await at.take(1)
                line.swallow()
                assert await at.write(filled([lease], kind, new(kind))) == ([lease] if kind == "continued" else [])
            assert line.cut == len(KINDS)
            assert sorted(await at.new()) == sorted(text(kind) for kind in KINDS)
            assert at.flush.lost == 0

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_outcome_of_a_lost_lease_enqueues_nothing(dsn: str, kind: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            lost, held = await at.take(2)
            await at.db.execute("UPDATE pg_task SET locked_by = gen_random_uuid() WHERE id = $1", lost.id)
            outcomes = filled([lost], kind, new("lost"))
            add(outcomes, held, kind, new("held"))
            await at.write(outcomes)
            assert await at.new() == [text("held")]
            assert at.flush.lost == 1
            assert at.leases.get(lost.id) is None

    run(main())


# --- keys


@pytest.mark.parametrize("kind", KINDS)
def test_new_task_whose_key_is_taken_is_not_inserted(dsn: str, kind: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            (lease,) = await at.take(1)
            await at.db.execute("INSERT INTO pg_task (step, key, error) VALUES ('{}', 'taken', 'parked')")
            await at.write(filled([lease], kind, new("a", key="taken") + new("b", key="free") + new("c")))
            assert sorted(await at.new()) == [text("b"), text("c")]
            assert await at.db.fetchval("SELECT step FROM pg_task WHERE key = 'taken'") == "{}"

    run(main())


def test_equal_keys_of_a_batch_insert_one_task(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            first, second = await at.take(2)
            outcomes = filled([first], "done", new("a", "b", key="same"))
            add(outcomes, second, "done", new("c", key="same"))
            await at.write(outcomes)
            assert len(await at.new()) == 1
            assert at.flush.done == 2

    run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_finished_task_hands_its_key_to_a_new_one(dsn: str, kind: str) -> None:
    """Whichever of the outcomes of the batch is that of the holder."""

    async def main() -> None:
        async with bench(dsn) as at:
            leases = await at.take(4, "0", "1", "2", "3")
            outcomes = Outcomes()
            for number, lease in enumerate(leases):
                add(outcomes, lease, kind, new(f"next {number}", key=str((number + 1) % 4)))
            await at.write(outcomes)
            assert len(await at.new()) == (4 if kind in ("done", "archived") else 0)
            assert await at.db.fetchval("SELECT count(*) FROM pg_task WHERE key IS NOT NULL") == 4

    run(main())


@pytest.mark.parametrize("commits", [True, False])
def test_uncommitted_key_holds_up_no_other_outcome(dsn: str, monkeypatch: pytest.MonkeyPatch, commits: bool) -> None:
    monkeypatch.setitem(writer.SHARED_SETTINGS, "lock_timeout", "20ms")

    async def main() -> None:
        async with bench(dsn) as at, connected(dsn) as rival:
            leases = await at.take(6)
            outcomes = Outcomes()
            for number, lease in enumerate(leases):
                add(outcomes, lease, "done", new(f"{number}", key=f"key {number}"))
            transaction = rival.transaction()
            await transaction.start()
            await rival.execute("INSERT INTO pg_task (step, key) VALUES ('{}', 'key 2')")
            await at.write(outcomes)
            assert (at.flush.blocked, at.flush.done) == (1, 5)
            assert [row["id"] for row in await at.parents(leases)] == [leases[2].id]
            await (transaction.commit() if commits else transaction.rollback())
            await at.settle()
            assert (at.flush.blocked, at.flush.done, at.flush.lost) == (0, 6, 0)
            assert len(await at.new()) == (5 if commits else 6)

    run(main())


# --- refused


CHECK = "ALTER TABLE pg_task ADD CONSTRAINT guard CHECK (queue <> 'closed')"
DROPS = """
    CREATE OR REPLACE FUNCTION guard() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
    CREATE TRIGGER guard BEFORE INSERT ON pg_task FOR EACH ROW WHEN (NEW.queue = 'closed') EXECUTE FUNCTION guard()
"""


@pytest.mark.parametrize(
    ("guard", "says"), [(CHECK, 'violates check constraint "guard"'), (DROPS, "a trigger, rule or")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_refused_new_task_parks_its_parent_alone(dsn: str, kind: str, guard: str, says: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = await at.take(5)
            await at.db.execute(guard)
            outcomes = Outcomes()
            for number, lease in enumerate(leases):
                add(outcomes, lease, kind, new(f"{number}") + new("x", queue="closed" if number == 3 else "open"))
            await at.write(outcomes)
            ((id, error, step),) = await at.db.fetch("SELECT id, error, step FROM pg_task WHERE error IS NOT NULL")
            assert (id, step) == (leases[3].id, "{}")
            assert says in error
            assert text("3") not in await at.new()
            assert len(await at.new()) == 8
            assert (at.flush.parked, at.flush.lost, at.flush.blocked) == (1, 0, 0)

    run(main())


def test_new_task_that_row_security_forbids_parks_its_parent(dsn: str) -> None:
    """It is about the row: the worker goes on."""

    async def main() -> None:
        async with bench(dsn) as at:
            first, second = await at.take(2)
            await at.db.execute(
                "ALTER TABLE pg_task ENABLE ROW LEVEL SECURITY; ALTER TABLE pg_task FORCE ROW LEVEL SECURITY;"
                "CREATE POLICY guard ON pg_task USING (true) WITH CHECK (queue <> 'closed');"
                "DROP ROLE IF EXISTS plain; CREATE ROLE plain; GRANT ALL ON ALL TABLES IN SCHEMA public TO plain"
            )
            connection = await at.link.open()
            await connection.execute("SET ROLE plain")
            aside = await at.aside._link.open()
            await aside.execute("SET ROLE plain")
            outcomes = filled([first], "done", new("a"))
            add(outcomes, second, "done", new("b", queue="closed"))
            await at.write(outcomes)
            assert await at.new() == [text("a")]
            assert "row-level security" in await at.db.fetchval("SELECT error FROM pg_task WHERE id = $1", second.id)
            await connection.execute("RESET ROLE")
            await at.db.execute("DROP OWNED BY plain; DROP ROLE plain")

    run(main())


# --- bounds


def test_statement_is_bounded_by_its_new_tasks(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of few outcomes may insert many rows; an outcome is never divided."""
    monkeypatch.setattr(writer, "MAX_ROWS", 10)

    async def main() -> None:
        async with bench(dsn) as at:
            at.flush._writer._max_rows = 10
            leases = await at.take(4)
            outcomes = filled(leases[:3], "done", new("a"))
            outcomes.new_tasks.clear()
            for number, lease in enumerate(leases[:3]):
                outcomes.add_new_tasks(lease, new(*(f"{number}.{other}" for other in range(6))))
            add(outcomes, leases[3], "done", new(*(f"3.{other}" for other in range(30))))
            await at.link.open()
            before = at.link.statements
            await at.write(outcomes)
            assert at.link.statements - before == 4
            assert len(await at.new()) == 48

    run(main())


def test_poll_is_due_with_the_first_new_task(dsn: str) -> None:
    async def main() -> None:
        async with bench(dsn) as at:
            leases = await at.take(3)
            await at.write(filled(leases[:1], "done", new("a", delay=70.0) + new("b", delay=50.0)))
            await at.write(filled(leases[1:2], "done", new("c", at=FAR)))
            await at.write(filled(leases[2:], "done", []))
            assert at.due[0] == 50.0
            assert at.due[1] > 365 * 86400
            assert len(at.due) == 2

    run(main())
