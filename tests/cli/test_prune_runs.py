"""The pruning of runs: old ended runs go with all their records; no run loses records that a replay may read."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from fix_database import run
from fleet import Rows
from plans import Session
from sessions import our_session, until_waiting

from pgtask import Client
from pgtask._cli.main import main
from pgtask._ids import earliest_id
from pgtask._postgres import prune as module
from pgtask._postgres.prune import prune as prune_kind
from pgtask._postgres.store import statement

RUN = """
    WITH record AS (
        INSERT INTO pg_task_runs (id, name, parent, state, step, error, created_at, ended_at)
        VALUES ($1, 'flow', $2, $3, '{"flow":{"Run":null}}', CASE WHEN $3 = 'ERROR' THEN 'broken' END,
            now() - make_interval(days => $4), CASE WHEN $3 IS NOT NULL THEN now() - make_interval(days => $4) END)
        RETURNING id
    ),
    checkpoints AS (
        INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result)
        SELECT id, n, n::text, 'step', 's' || n, '1' FROM record, generate_series(1, 3) AS n
    ),
    signals AS (
        INSERT INTO pg_task_signals (run, name, payload) SELECT id, 'go', '1' FROM record
    )
    INSERT INTO pg_task (id, step, error, wakeup_at)
    SELECT id, '{"flow":{"Run":null}}', CASE WHEN $3 = 'ERROR' THEN 'broken' END, now() - make_interval(days => $4)
    FROM record WHERE $5
"""


class Made:
    """Runs of a test, by short names."""

    def __init__(self, dsn: str) -> None:
        self.rows = Rows(dsn)
        self.names: dict[UUID, str] = {}
        self.ids: dict[str, UUID] = {}

    def add(self, name: str, state: str | None, days: int, *, parent: str | None = None, live: bool = False) -> None:
        """In this order, which is that of the ids. A live run has a task; one that is live as ERROR is parked."""
        id = UUID(int=2**120 + len(self.ids))
        self.ids[name], self.names[id] = id, name
        self.rows(RUN, id, None if parent is None else self.ids[parent], state, days, live)

    def left(self) -> str:
        """The names of those whose records are left; their checkpoints and signals are as well, and no others."""
        left = {UUID(int=row[0].int) for row in self.rows("SELECT id FROM pg_task_runs")}
        for table, each in (("pg_task_checkpoints", 3), ("pg_task_signals", 1)):
            found = self.rows(f"SELECT run, count(*) FROM {table} GROUP BY run")
            assert {UUID(int=row[0].int): row[1] for row in found} == dict.fromkeys(left, each), table
        return " ".join(sorted(self.names[id] for id in left))


@pytest.fixture
def made(dsn: str) -> Made:
    return Made(dsn)


def prune(dsn: str, *words: str) -> int:
    return main(["prune", "--dsn", dsn, "--older-than", "30d", *words])


def test_old_ended_runs_are_pruned_with_their_records(dsn: str, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    for days in (40, 20):
        for state in ("SUCCESS", "CANCELLED"):
            made.add(f"{state}-{days}", state, days)
    made.add("failed", "ERROR", 40, live=True)
    made.add("paused", None, 40, live=True)
    made.add("revived", "ERROR", 40, live=True)
    made.rows("UPDATE pg_task SET error = NULL WHERE id = $1", made.ids["revived"])
    assert prune(dsn) == 0
    assert capsys.readouterr().out == "0 archived tasks removed\n2 ended runs removed\n0 actions removed\n"
    assert made.left() == "CANCELLED-20 SUCCESS-20 failed paused revived"
    assert made.rows.value("SELECT count(*) FROM pg_task") == 3


def test_prune_removes_only_the_named_kinds(dsn: str, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.add("old", "SUCCESS", 40)
    made.add("failed", "ERROR", 40, live=True)
    assert prune(dsn, "--archive") == 0
    assert made.left() == "failed old"
    capsys.readouterr()
    assert prune(dsn, "--runs", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"kind": "runs", "removed": 1}
    assert made.left() == "failed"


def test_failed_runs_go_with_the_parked_tasks(dsn: str, made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.add("failed", "ERROR", 40, live=True)
    made.add("young", "ERROR", 20, live=True)
    made.add("old", "SUCCESS", 40)
    made.add("caller", None, 40, live=True)
    made.add("asked for", "ERROR", 40, parent="caller", live=True)
    made.rows("INSERT INTO pg_task (step, error, wakeup_at) VALUES ('{}', 'broken', now() - interval '40 days')")
    assert prune(dsn, "--parked") == 0
    assert capsys.readouterr().out == "2 parked tasks removed\n"
    assert made.left() == "asked for caller old young"


def test_run_with_a_deleted_task_is_pruned_when_old(dsn: str, made: Made) -> None:
    made.add("deleted", None, 40)
    made.add("deleted when failed", "ERROR", 40)
    made.add("deleted lately", None, 20)
    assert prune(dsn) == 0
    assert made.left() == "deleted lately"


@pytest.mark.parametrize(
    ("state", "live"), [(None, True), ("ERROR", True), ("CANCELLED", False)], ids=["live", "failed", "cancelled"]
)
def test_children_stay_while_their_parent_may_replay(dsn: str, made: Made, state: str | None, live: bool) -> None:
    made.add("parent", state, 20, live=live)
    made.add("child", "SUCCESS", 40, parent="parent")
    made.add("grandchild", "SUCCESS", 40, parent="child")
    made.add("stopped child", "CANCELLED", 40, parent="parent")
    made.add("its child", "SUCCESS", 40, parent="stopped child")
    assert prune(dsn) == 0
    assert made.left() == "child its child parent stopped child"


@pytest.mark.parametrize("batch", ["1", "2", "100"])
def test_children_are_pruned_with_or_after_their_ended_parent(dsn: str, made: Made, batch: str) -> None:
    made.add("well", "SUCCESS", 20)
    made.add("child of well", "SUCCESS", 40, parent="well")
    made.add("young child", "SUCCESS", 20, parent="well")
    made.add("stopped", "CANCELLED", 40)
    made.add("child of stopped", "CANCELLED", 40, parent="stopped")
    made.add("grandchild", "SUCCESS", 40, parent="child of stopped")
    assert prune(dsn, "--batch", batch) == 0
    assert made.left() == "well young child"


def test_a_pruned_parent_does_not_hold_up_a_child_that_runs(dsn: str, made: Made) -> None:
    made.add("parent", "SUCCESS", 40)
    made.add("child", None, 40, parent="parent", live=True)
    assert prune(dsn) == 0
    assert made.left() == "child"


def test_ids_that_are_not_in_the_order_of_time_are_found(dsn: str, made: Made) -> None:
    """Prune runs with ids such as SQL makes where the server has no uuidv7()."""
    made.rows("""
        INSERT INTO pg_task_runs (id, name, state, created_at, ended_at)
        SELECT gen_random_uuid(), 'flow', 'SUCCESS', now() - interval '40 days', now() - interval '40 days'
        FROM generate_series(1, 50)""")
    made.rows(
        "INSERT INTO pg_task_runs (id, name, state, ended_at) VALUES (gen_random_uuid(), 'flow', 'SUCCESS', now())"
    )
    assert prune(dsn, "--batch", "7") == 0
    assert made.rows.value("SELECT count(*) FROM pg_task_runs") == 1


def test_batch_is_bounded_and_skips_locked_runs(dsn: str, made: Made) -> None:
    for number in range(10):
        made.add(str(number), "SUCCESS", 40)

    async def check() -> None:
        async with our_session(dsn) as db, our_session(dsn) as other:
            totals = []

            def removed(total: int) -> None:
                assert not db.is_in_transaction()
                totals.append(total)

            await other.execute(f"BEGIN; SELECT FROM pg_task_runs WHERE id = '{made.ids['5']}' FOR UPDATE")
            assert await prune_kind(db, "runs", older_than=timedelta(days=30), batch=4, removed=removed) == 9
            assert totals == [4, 7, 9, 9]
            await other.execute("ROLLBACK")

    run(check())
    assert made.left() == "5"


def test_run_resumed_during_prune_stays_or_goes_whole(dsn: str, made: Made) -> None:
    made.add("stopped", "CANCELLED", 40)
    id = made.ids["stopped"]

    async def check() -> None:
        async with our_session(dsn) as db, our_session(dsn) as other, Client(dsn) as client:
            left = "SELECT (SELECT count(*) FROM pg_task_runs), (SELECT count(*) FROM pg_task)"
            async with db.transaction():
                assert await client.run(id).resume(conn=db)
                await prune_kind(other, "runs", older_than=timedelta(days=30), batch=4, removed=lambda total: None)
            assert tuple(await db.fetchrow(left)) == (1, 1)
            assert await client.run(id).cancel()
            async with db.transaction():
                await db.execute("DELETE FROM pg_task_runs")
                transaction = other.transaction()
                await transaction.start()
                resumed = asyncio.create_task(client.run(id).resume(conn=other))
                await until_waiting(db)
            assert not await resumed
            await transaction.commit()
            assert tuple(await db.fetchrow(left)) == (0, 0)

    run(check())


@pytest.mark.parametrize("kind", ["runs", "parked"])
def test_a_batch_is_bounded_by_checkpoints_too(
    dsn: str, made: Made, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prune runs of 3, 3, 17, 3, and 3 checkpoints: no transaction removes more than 5 of these."""
    monkeypatch.setattr(module, "CHECKPOINTS_PER_RUN", 1)
    state = "SUCCESS" if kind == "runs" else "ERROR"
    for number in range(5):
        made.add(str(number), state, 40, live=kind == "parked")
    made.rows(
        "INSERT INTO pg_task_checkpoints (run, number, place, kind, name)"
        " SELECT $1, n, n, 'step', 's' FROM generate_series(4, 17) AS n",
        made.ids["2"],
    )

    async def check() -> None:
        async with our_session(dsn) as db:
            await db.execute(COUNTED)
            totals: list[int] = []
            age = timedelta(days=30)
            assert await prune_kind(db, kind, older_than=age, batch=5, removed=totals.append) == 5
            assert sum(totals[-1:]) == 5
            removed = [row[0] for row in await db.fetch("SELECT count(*) FROM deleted GROUP BY xid ORDER BY xid")]
            assert max(removed) == 5
            assert sum(removed) == 29

    run(check())
    assert made.left() == ""


COUNTED = """
    CREATE TABLE deleted (xid bigint);
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN INSERT INTO deleted VALUES (txid_current()); RETURN NULL; END';
    CREATE TRIGGER note AFTER DELETE ON pg_task_checkpoints FOR EACH ROW EXECUTE FUNCTION note()
"""


def test_partly_pruned_run_is_not_resumed(dsn: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the prune between two of its batches."""
    monkeypatch.setattr(module, "CHECKPOINTS_PER_RUN", 1)
    made.add("stopped", "CANCELLED", 40)
    made.add("behind", "CANCELLED", 40)
    made.add("failed", "ERROR", 40, live=True)

    def enough(total: int) -> None:
        raise KeyboardInterrupt

    async def check() -> None:
        async with our_session(dsn) as db, Client(dsn) as client:
            for kind, name in (("runs", "stopped"), ("parked", "failed")):
                assert await client.run(made.ids[name]).status()
                with pytest.raises(KeyboardInterrupt):
                    await prune_kind(db, kind, older_than=timedelta(days=30), batch=2, removed=enough)
                assert await db.fetchval("SELECT count(*) FROM pg_task_checkpoints WHERE run = $1", made.ids[name]) == 1
                assert not await client.run(made.ids[name]).resume()
            assert await client.run(made.ids["behind"]).resume()

    run(check())
    assert prune(dsn) == 0
    assert made.left() == "behind"


def test_run_resumed_before_its_lock_is_kept(dsn: str, made: Made) -> None:
    """The statement is held up in its look, when it has its snapshot."""
    made.add("stopped", "CANCELLED", 40)
    id = made.ids["stopped"]
    held_up = statement("prune_runs").replace(
        "WHERE id >= $3\n", "WHERE id >= $3 AND pg_advisory_xact_lock_shared(1) IS NOT NULL\n"
    )

    async def check() -> None:
        async with our_session(dsn) as db, our_session(dsn) as other, Client(dsn) as client:
            await db.execute("SELECT pg_advisory_lock(1)")
            pruning = asyncio.create_task(
                other.fetchrow(held_up, datetime.now(UTC), 10, UUID(int=0), UUID(int=2**128 - 1), 10)
            )
            await until_waiting(db)
            assert await client.run(id).resume()
            await db.execute("SELECT pg_advisory_unlock(1)")
            assert (await pruning)[0] == 0

    run(check())
    assert made.left() == "stopped"


@pytest.mark.timeout(110)
def test_pruning_does_not_read_the_runs_that_began_after_the_cut(dsn: str) -> None:
    """Nor does it read all checkpoints and signals, with any statistics."""

    async def main() -> None:
        async with our_session(dsn) as db:
            session = Session(db)
            await db.execute("SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_sort = off")
            await session.prepare(["prune_runs"])
            await db.execute("""
                INSERT INTO pg_task_runs (id, name, state, created_at, ended_at)
                SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'flow', 'SUCCESS',
                    now() - make_interval(secs => 2000000 - n), now() - make_interval(secs => 2000000 - n)
                FROM generate_series(1, 200000) AS n""")
            await db.execute("""
                INSERT INTO pg_task_checkpoints (run, number, place, kind, name, result)
                SELECT id, 1, '1', 'step', 's', '1' FROM pg_task_runs ORDER BY id LIMIT 20000""")
            before = await db.fetchval("SELECT now() - interval '1999900 s'")
            ranges = (
                (UUID(int=0), UUID("00000000-0000-7000-8000-000000000064")),
                (earliest_id(before), UUID(int=2**128 - 1)),
            )
            for (first, end), most in zip(ranges, (3000, 60), strict=True):
                plan = await session.explain("prune_runs", before, 5000, first, end, 50_000)
                scanned = {node.get("Relation Name") for node in plan.nodes if node["Node Type"] == "Seq Scan"}
                assert not scanned
                assert plan.buffers < most, f"{plan.buffers} buffers for {first}"

    run(main())
