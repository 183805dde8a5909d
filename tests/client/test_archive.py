"""Finished tasks are kept where their app says so, by the statement that finishes them, and pruned when old."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from archives import Begin, End, Once, Whisper, app, keeps_all
from fix_database import run
from fleet import Fleet, Rows
from sessions import connected
from writers import flushing

from pgtask import App, Client, Context, DefinitionError, Done, Task
from pgtask._cli.main import main
from pgtask._fastpath import Leases, Outcomes
from pgtask._postgres import prune as module
from pgtask._postgres.store import statement


def work_off(dsn: str, *steps: Task, app: str = "archives:app", code: int = 0) -> None:
    async def enqueue() -> None:
        async with Client(dsn) as client:
            for number, step in enumerate(steps):
                await client.enqueue(step, queue="night", priority=number, key=f"key {number}")

    run(enqueue())
    with Fleet(dsn, "--burst", app=app) as fleet:
        assert fleet.ends() == code


# --- what is kept


def test_only_finished_tasks_with_archive_are_kept(dsn: str) -> None:
    work_off(dsn, Begin(0), Begin(1), Begin(2), Once(3), Whisper(), code=1)
    rows = Rows(dsn)
    kept = rows("SELECT step, queue, priority, key, tried, outcome FROM pg_task_archive ORDER BY priority")
    assert [tuple(row) for row in kept] == [
        ('{"Kept":{"End":{"number":0}}}', "night", 0, "Kept/key 0", 0, "done"),
        ('{"Kept":{"End":{"number":1}}}', "night", 1, "Kept/key 1", 1, "done"),
    ]
    (times,) = rows("SELECT bool_and(created_at <= finished_at AND now() - finished_at < '1 min') FROM pg_task_archive")
    assert times[0]
    (parked,) = rows("SELECT step FROM pg_task")
    assert parked["step"] == '{"Kept":{"End":{"number":2}}}'


def test_an_app_may_keep_all_its_tasks_but_those_that_say_no(dsn: str) -> None:
    work_off(dsn, Begin(), Once(), Whisper(), app="archives:keeps_all")
    kept = Rows(dsn)("SELECT split_part(step, '\"', 4) AS step FROM pg_task_archive ORDER BY 1")
    assert [row["step"] for row in kept] == ["End", "Once"]


def test_archive_is_set_by_step_then_task_then_app() -> None:
    def archived(app: App) -> dict[str, bool]:
        return {definition.name: definition.archive for definition in app}

    assert archived(app) == {"Begin": True, "End": True, "Once": False, "Whisper": False}
    assert archived(keeps_all) == {"Begin": True, "End": True, "Once": True, "Whisper": False}


def test_a_field_cannot_be_named_archive() -> None:
    class Wrong(Task):
        pass

    class Step(Wrong):
        archive: str  # type: ignore[misc,assignment]

        async def run(self, ctx: Context) -> Done:
            return Done()

    with pytest.raises(DefinitionError, match="a field cannot be named 'archive'"):
        App(Wrong)


def test_worker_without_archived_tasks_needs_no_privilege(dsn: str) -> None:
    Rows(dsn)("DROP TABLE pg_task_archive")
    work_off(dsn, Once(), Whisper())
    assert Rows(dsn).value("SELECT count(*) FROM pg_task") == 0


async def claimed(db: Any, leases: Leases, number: int) -> list[Any]:
    await db.execute("INSERT INTO pg_task (step) SELECT '{}' FROM generate_series(1, $1)", number)
    token = await db.fetchval("SELECT gen_random_uuid()")
    rows = await db.fetch(statement("claim"), "default", 0, number, token, 60.0, 1000, 0.0)
    return leases.add_claimed(rows, token, 0.0)[0]


def test_lost_lease_archives_nothing_and_spares_its_batch(dsn: str) -> None:
    async def check() -> None:
        async with flushing(dsn) as at, connected(dsn) as db:
            flush, leases = at.flush, at.leases
            lost, kept, plain, moved, gone_on = await claimed(db, leases, 5)
            await db.execute("UPDATE pg_task SET locked_by = gen_random_uuid() WHERE id = $1", lost.id)
            outcomes = Outcomes()
            outcomes.add_archived(lost)
            outcomes.add_archived(kept)
            outcomes.add_done(plain)
            outcomes.add_rescheduled(moved, None, 1, "broken", 0.0)
            outcomes.add_continued(gone_on, '{"T":{"Next":null}}')
            assert len(outcomes) == 5
            assert await at.write(outcomes) == [gone_on]
            assert (flush.done, flush.lost, flush.parked) == (2, 1, 1)
            assert [row["id"] for row in await db.fetch("SELECT id FROM pg_task_archive")] == [kept.id]
            left = {row["id"] for row in await db.fetch("SELECT id FROM pg_task")}
            assert left == {lost.id, moved.id, gone_on.id}
            assert leases.get(gone_on.id) is gone_on
            assert len(leases) == 1

    run(check())


def test_row_refused_by_the_archive_is_parked_alone(dsn: str) -> None:
    async def check() -> None:
        async with flushing(dsn) as at, connected(dsn) as db:
            flush, leases = at.flush, at.leases
            held = await claimed(db, leases, 7)
            await db.execute(f"ALTER TABLE pg_task_archive ADD CHECK (id <> '{held[3].id}')")
            outcomes = Outcomes()
            for lease in held:
                outcomes.add_archived(lease)
            await at.write(outcomes)
            assert (flush.done, flush.parked, len(leases)) == (6, 1, 0)
            (parked,) = await db.fetch("SELECT id, error FROM pg_task")
            assert parked["id"] == held[3].id
            assert "was refused by the database" in parked["error"]
            assert await db.fetchval("SELECT count(*) FROM pg_task_archive") == 6

    run(check())


def test_a_locked_row_to_be_archived_holds_up_no_other(dsn: str) -> None:
    async def check() -> None:
        async with flushing(dsn) as at, connected(dsn) as db, connected(dsn) as other:
            flush, leases = at.flush, at.leases
            locked, free = await claimed(db, leases, 2)
            outcomes = Outcomes()
            outcomes.add_archived(locked)
            outcomes.add_archived(free)
            async with other.transaction():
                await other.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", locked.id)
                await at.write(outcomes)
                assert [row["id"] for row in await db.fetch("SELECT id FROM pg_task_archive")] == [free.id]
                assert (flush.blocked, leases.get(locked.id)) == (1, locked)
            await at.settle()
            assert await db.fetchval("SELECT count(*) FROM pg_task_archive") == 2

    run(check())


def test_a_consumer_archives_as_its_clients_app_says(dsn: str) -> None:
    async def check() -> None:
        async with Client(dsn, app=app) as client, connected(dsn) as db:
            for step in (End(1), Once(2), End(3)):
                await client.enqueue(step)
            await db.execute("INSERT INTO pg_task (step) VALUES ('garbage')")
            async with client.consumer() as consumer:
                leases = await consumer.claim()
                await db.execute("UPDATE pg_task SET locked_by = gen_random_uuid() WHERE id = $1", leases[2].task_id)
                assert await consumer.done(leases) == [leases[2]]
            kept = await db.fetch("SELECT step FROM pg_task_archive")
            assert [row["step"] for row in kept] == ['{"Kept":{"End":{"number":1}}}']
            assert await db.fetchval("SELECT count(*) FROM pg_task") == 1

    run(check())


# --- pruning


def fill(dsn: str) -> None:
    """Archived tasks that are 0 to 99 days old, and parked ones as well, and a waiting one and a leased one."""
    Rows(dsn)("""
        INSERT INTO pg_task_archive (id, step, queue, priority, tried, created_at, finished_at, outcome)
        SELECT gen_random_uuid(), '{}', 'q', 0, 0, now() - interval '1 year', now() - make_interval(days => n), 'done'
        FROM generate_series(0, 99) AS n
    """)
    Rows(dsn)("""
        INSERT INTO pg_task (step, error, wakeup_at)
        SELECT '{}', 'broken', now() - make_interval(days => n) FROM generate_series(0, 99) AS n
    """)
    Rows(dsn)("INSERT INTO pg_task (step, wakeup_at) VALUES ('{}', now() - interval '1 year')")
    Rows(dsn)("""
        INSERT INTO pg_task (step, error, wakeup_at, locked_by, lock_expires_at)
        VALUES ('{}', 'set while it runs', now() - interval '1 year', gen_random_uuid(), now() + interval '1 hour')
    """)


def counts(dsn: str) -> tuple[int, int]:
    rows = Rows(dsn)
    return rows.value("SELECT count(*) FROM pg_task_archive"), rows.value("SELECT count(*) FROM pg_task")


def prune(dsn: str, *words: str) -> int:
    return main(["prune", "--dsn", dsn, *words])


def test_prune_removes_the_archived_tasks_that_are_older(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill(dsn)
    assert prune(dsn, "--older-than", "30d") == 0
    assert capsys.readouterr().out == "70 archived tasks removed\n0 ended runs removed\n0 actions removed\n"
    assert counts(dsn) == (30, 102)
    assert Rows(dsn).value("SELECT max(now() - finished_at) < '30 days' FROM pg_task_archive")
    assert prune(dsn, "--older-than", "30d") == 0
    assert capsys.readouterr().out == "0 archived tasks removed\n0 ended runs removed\n0 actions removed\n"


def test_prune_removes_parked_tasks_only_on_request(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill(dsn)
    assert prune(dsn, "--parked", "--older-than", "30d", "--batch", "7") == 0
    assert capsys.readouterr().out == "70 parked tasks removed\n"
    assert counts(dsn) == (100, 32)


def test_prune_speaks_json(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill(dsn)
    assert prune(dsn, "--parked", "--archive", "--older-than", "2w", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"kind": "parked", "removed": 86}, {"kind": "archive", "removed": 86}]


def test_prune_goes_by_batches_and_says_how_far_it_is(
    dsn: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgtask._cli.commands.prune.NOTE_INTERVAL", 0.0)
    fill(dsn)
    assert prune(dsn, "--archive", "--older-than", "0s", "--batch", "40") == 0
    said = capsys.readouterr()
    assert said.out == "100 archived tasks removed\n"
    assert said.err.splitlines() == [f"pgtask: {n} archived tasks removed so far" for n in (40, 80, 100)]


def test_each_batch_of_a_prune_is_bounded_and_committed(dsn: str) -> None:
    fill(dsn)

    async def check() -> None:
        async with connected(dsn) as db, connected(dsn) as other:
            left = []

            def removed(total: int) -> None:
                assert not db.is_in_transaction()
                left.append(total)

            await other.execute("BEGIN; SELECT FROM pg_task_archive ORDER BY finished_at LIMIT 3 FOR UPDATE")
            done = await module.prune(db, "archive", older_than=timedelta(0), batch=50, removed=removed)
            assert (done, left) == (97, [50, 97])
            await other.execute("ROLLBACK")

    run(check())


@pytest.mark.parametrize("age", ["d", "-3d", "3 days", "", "1e3s", "1h 3d"])
def test_prune_refuses_a_text_that_is_no_age(dsn: str, age: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune(dsn, f"--older-than={age}") == 2
    assert "is not a number of seconds, nor a time span such as 90s, 5m" in capsys.readouterr().err


def test_prune_reads_the_tables_by_their_indexes(dsn: str) -> None:
    """Not the whole of a large table for each batch: what is younger is not read."""

    async def check() -> None:
        async with connected(dsn) as db:
            await db.execute("""
                INSERT INTO pg_task_archive (id, step, queue, priority, tried, created_at, finished_at, outcome)
                SELECT gen_random_uuid(), '{}', 'q', 0, 0, now(), now() - make_interval(secs => n), 'done'
                FROM generate_series(0, 20000) AS n;
                INSERT INTO pg_task (step, error, wakeup_at)
                SELECT '{}', 'broken', now() - make_interval(secs => n) FROM generate_series(0, 20000) AS n
            """)
            for name in ("prune_archive", "prune_parked"):
                async with db.transaction():
                    await db.fetch(statement("index_scans"))
                    text = statement(name).replace("$1", "now() - interval '19990 s'")
                    text = text.replace("$2", "100").replace("$3", "'-infinity'").replace("$4", "1000")
                    plan = json.loads(await db.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {text}"))[0]["Plan"]
                    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 300, name

    run(check())
