"""Schedules: each occurrence starts its task once, whatever workers and clocks do; the rules of missed and overlap."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import pytest
from fix_database import run
from scheduled import MINUTE, NOON, Sweep, app, at, count_up, stages

from pgtask import Schedule
from pgtask._due import DueSchedule, Firing, plan_firing
from pgtask._occurrences import occurrence_id
from pgtask._postgres.schedules import pause_schedules, read_schedules, resume_schedules, run_schedule

pytestmark = pytest.mark.timeout(60)


def each_minute(**options: Any) -> Schedule:
    return Schedule("m", "* * * * *", Sweep("m"), **options)


def test_occurrence_starts_when_its_time_has_come(dsn: str) -> None:
    async def scenario() -> None:
        async with stages(dsn, each_minute()) as ([stage], clock):
            assert not await stage.look()
            assert await clock.times() == []
            await clock.set(at(1) + timedelta(milliseconds=1))
            assert await stage.look()
            assert not await stage.look()
            assert await clock.times() == [at(1)]
            row = await clock.row("m")
            assert (row["next_at"], row["look_at"], row["last_at"]) == (at(2), at(2), at(1))
            assert row["last_task"] == occurrence_id("m", at(1))

    run(scenario())


@pytest.mark.parametrize(
    ("missed", "overlap", "started"),
    [
        ("skip", "allow", [at(60)]),  # half a minute late
        ("latest", "allow", [at(60)]),
        ("all", "allow", [at(minute) for minute in range(31, 61)]),  # the last thirty
        ("skip", "skip", [at(60)]),
        ("latest", "skip", [at(60)]),
        ("all", "skip", [at(31)]),  # the next ones wait for it
    ],
)
def test_missed_times_after_an_outage(dsn: str, missed: Any, overlap: Any, started: list[Any]) -> None:
    async def scenario() -> None:
        schedule = each_minute(missed=missed, overlap=overlap, max_missed=30)
        async with stages(dsn, schedule) as ([stage], clock):
            await clock.set(NOON + 60 * MINUTE)
            await stage.look()
            await stage.look()
            assert await clock.times() == started
            row = await clock.row("m")
            assert row["next_at"] == (at(32) if (missed, overlap) == ("all", "skip") else at(61))
            assert row["skipped_at"] == at(1)

    run(scenario())


def test_skip_drops_what_is_a_minute_late(dsn: str) -> None:
    async def scenario() -> None:
        hourly = Schedule("h", "0 * * * *", Sweep("h"), missed="skip")
        async with stages(dsn, hourly) as ([stage], clock):
            await clock.set(at(60) + timedelta(seconds=59))
            await stage.look()
            assert await clock.times() == [at(60)]
            await clock.db.execute("DELETE FROM pg_task")
            await clock.set(at(120) + timedelta(seconds=61))
            await stage.look()
            assert await clock.times() == []
            row = await clock.row("h")
            assert (row["next_at"], row["skipped_at"], row["last_at"]) == (at(180), at(120), at(60))

    run(scenario())


@pytest.mark.parametrize("missed", ["skip", "latest", "all"])
def test_overlap_skips_until_the_task_before_ends(dsn: str, missed: Any) -> None:
    async def scenario() -> None:
        async with stages(dsn, each_minute(missed=missed)) as ([stage], clock):
            await clock.set(at(1))
            await stage.look()
            for state in ("", ", locked_by = gen_random_uuid(), lock_expires_at = now()"):
                await clock.db.execute(f"UPDATE pg_task SET tried = 0{state}")
                await clock.set(at(2))
                await stage.look()
                assert await clock.times() == [at(1)]
                row = await clock.row("m")
                assert (row["next_at"], row["skipped_at"]) == ((at(2), None) if missed == "all" else (at(3), at(2)))
            await clock.db.execute("UPDATE pg_task SET locked_by = NULL, lock_expires_at = NULL, error = 'it fails'")
            await clock.set(at(3) + timedelta(seconds=2))
            for _ in range(2):
                await stage.look()
                await clock.set(at(3) + timedelta(seconds=5))
            second = {"skip": at(3), "latest": at(3), "all": at(2)}[missed]
            assert await clock.times() == [at(1), second], "a parked task holds up nothing"
            await clock.db.execute("DELETE FROM pg_task")
            await clock.set(at(3) + timedelta(seconds=50))
            await stage.look()
            assert await clock.times() == ([at(3)] if missed == "all" else []), "none is missing with all"

    run(scenario())


def test_clock_steps_repeat_and_lose_nothing(dsn: str) -> None:
    async def scenario() -> None:
        async with stages(dsn, each_minute(missed="all", overlap="allow")) as ([stage], clock):
            for minutes in (5, 125, 5, 3, 130, 10, 131):
                await clock.set(at(minutes))
                await stage.look()
                await clock.db.execute("CREATE TABLE IF NOT EXISTS ran (id uuid)")
                await clock.db.execute(
                    "WITH gone AS (DELETE FROM pg_task RETURNING id) INSERT INTO ran SELECT id FROM gone"
                )
            ids = [row[0] for row in await clock.db.fetch("SELECT id FROM ran ORDER BY id")]
            assert ids == [occurrence_id("m", at(minute)) for minute in range(1, 132)]

    run(scenario())


def test_many_workers_start_each_time_once(dsn: str) -> None:
    async def scenario() -> None:
        schedules = [Schedule(f"s{number}", "* * * * *", Sweep("s"), overlap="allow") for number in range(50)]
        async with stages(dsn, *schedules, count=8) as (several, clock):
            await clock.db.execute("CREATE TABLE ran (id uuid, name text)")
            for minute in range(1, 11):
                await clock.set(at(minute))
                await asyncio.gather(*(stage.look() for stage in several))
                await clock.db.execute(
                    "WITH gone AS (DELETE FROM pg_task RETURNING id, step) INSERT INTO ran SELECT id, step FROM gone"
                )
                await asyncio.gather(*(stage.look() for stage in several))  # their tasks are gone: no primary key helps
            counts = await clock.db.fetchrow("SELECT count(*), count(DISTINCT id) FROM ran")
            assert tuple(counts) == (500, 500)
            assert await clock.times() == []

    run(scenario())


def test_worker_that_comes_late_changes_nothing(dsn: str) -> None:
    """It has planned what another one has started meanwhile, and the task is gone, so that no id conflicts."""

    async def scenario() -> None:
        async with stages(dsn, each_minute(), count=2) as ([stage, late], clock):
            await clock.set(at(1))
            async with late.held_before_fire() as go_on:
                await stage.look()
                await clock.db.execute("DELETE FROM pg_task")
                before = await clock.row("m")
                go_on()
            assert await clock.times() == []
            assert await clock.row("m") == before
            assert late.stage.due_at < time.monotonic() + 2, "the other one might have died before its commit"

            await clock.set(at(2))
            async with late.held_before_fire() as go_on:
                changed = type(stage)(dsn, [Schedule("m", "*/2 * * * *", Sweep("m"))])
                await changed.look()
                go_on()
            assert await clock.times() == [], "it was planned by the expression of before"
            assert (await clock.row("m"))["next_at"] == at(4)
            await changed.link.close()

    run(scenario())


def test_schedule_that_is_not_due_stays_as_it_is() -> None:
    one = DueSchedule("m", "* * * * *", "UTC", "all", 10, "allow", at(5), False, False)
    assert plan_firing(one, at(3)) == Firing([], at(5), at(5))


def test_pause_resume_and_run_now(dsn: str) -> None:
    async def scenario() -> None:
        async with stages(dsn, each_minute(missed="all", overlap="allow")) as ([stage], clock):
            assert await pause_schedules(clock.db, ["m", "other"], "me") == {"m"}
            assert await pause_schedules(clock.db, ["m"], "me") == set()
            await clock.set(at(3))
            await stage.look()
            (listed,) = await read_schedules(clock.db)
            assert (listed.state, listed.paused_by, listed.next_at, listed.skipped_at) == ("paused", "me", at(4), at(3))
            id = await run_schedule(clock.db, "m", "me")
            assert id == occurrence_id("m", at(3))
            assert await run_schedule(clock.db, "m", "me") is None, "twice in a second"
            assert await run_schedule(clock.db, "other", "me") is None
            assert await resume_schedules(clock.db, ["m"], "me") == {"m"}
            await clock.set(at(5))
            await stage.look()
            assert await clock.times() == [at(3), at(4), at(5)], "what passed while it was paused is left out"
            done = await clock.db.fetch("SELECT action, filter, tasks FROM pg_task_actions ORDER BY id")
            assert [tuple(row) for row in done] == [
                ("pause", "schedule m", 0),
                ("run", "schedule m", 1),
                ("resume", "schedule m", 0),
            ]

    run(scenario())


def test_apps_are_reconciled_where_they_differ(dsn: str) -> None:
    async def scenario() -> None:
        other = Schedule("other", "@daily", Sweep("other"), queue="q", priority=3)
        async with stages(dsn, each_minute(), other) as ([stage], clock):
            await clock.set(at(1))
            await stage.look()
            before = await clock.row("m")
            again = type(stage)(dsn, [each_minute(), other])
            await again.look()
            assert await clock.row("m") == before, "the same declaration writes nothing"
            changed = type(stage)(dsn, [Schedule("m", "* * * * *", Sweep("changed"))])
            await changed.look()
            row = await clock.row("m")
            assert "changed" in row["step"]
            assert row["next_at"] == at(2), "another step keeps the time"
            assert (await clock.row("other"))["removed_at"] is not None
            await clock.set(at(1) + timedelta(days=2))
            await changed.look()
            assert [time for time in await clock.times() if time.minute == 0] == [], "removed ones start nothing"
            await stage.link.close()
            back = type(stage)(dsn, [Schedule("m", "*/5 * * * *", Sweep("changed")), other])
            await back.look()
            row = await clock.row("other")
            assert (row["removed_at"], row["queue"], row["priority"]) == (None, "q", 3)
            assert row["next_at"] == at(0) + timedelta(days=2, hours=12), "what passed meanwhile was not missed"
            assert (await clock.row("m"))["next_at"] == at(5) + timedelta(days=2)
            for one in (again, changed, back):
                await one.link.close()

    run(scenario())


def test_schedule_starts_a_run_of_a_workflow(dsn: str) -> None:
    async def scenario() -> None:
        async with stages(dsn, Schedule("runs", "* * * * *", count_up, 3)) as ([stage], clock):
            await clock.set(at(1))
            await stage.look()
            id = occurrence_id("runs", at(1))
            assert tuple(await clock.db.fetchrow("SELECT id, step FROM pg_task")) == (id, '{"count_up":{"Run":3}}')
            assert tuple(await clock.db.fetchrow("SELECT id, name FROM pg_task_runs")) == (id, "count_up")

    run(scenario())


def test_what_cannot_start_says_why_and_holds_up_no_other(dsn: str) -> None:
    async def scenario() -> None:
        schedules = [Schedule(f"s{number}", "* * * * *", Sweep(str(number))) for number in range(9)]
        async with stages(dsn, *schedules) as ([stage], clock):
            await clock.db.execute("ALTER TABLE pg_task ADD CONSTRAINT no_seven CHECK (step NOT LIKE '%\"7\"%')")
            await clock.db.execute("UPDATE pg_task_schedules SET zone = 'Mars/Olympus' WHERE name = 's3'")
            await clock.set(at(1))
            await stage.look()
            assert len(await clock.times()) == 7
            assert "no_seven" in (await clock.row("s7"))["error"]
            assert "time zone" in (await clock.row("s3"))["error"]
            assert {one.name for one in await read_schedules(clock.db) if one.state == "failed"} == {"s3", "s7"}
            await clock.db.execute("ALTER TABLE pg_task DROP CONSTRAINT no_seven")
            await clock.set(at(1) + timedelta(seconds=61))
            await stage.look()
            assert occurrence_id("s7", at(2)) in [row[0] for row in await clock.db.fetch("SELECT id FROM pg_task")]
            assert (await clock.row("s7"))["error"] is None

    run(scenario())


def test_app_of_the_fleet_has_schedules() -> None:
    assert list(app.schedules) == ["each second", "each minute", "yearly"]
