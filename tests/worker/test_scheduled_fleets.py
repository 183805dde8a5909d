"""Schedules of fleets: each time starts one task, and none is missing, whatever is killed and however clocks step."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from random import Random

import apps
import pytest
from fleet import Fleet, Rows, burst, put, ready
from scheduled import CLOCK, TABLE

from pgtask._occurrences import scheduled_time

pytestmark = pytest.mark.timeout(300)

MADE = """
CREATE TABLE made (id uuid, step text, at timestamptz DEFAULT clock_timestamp());
CREATE FUNCTION note_made() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO made (id, step) VALUES (NEW.id, NEW.step); RETURN NEW; END';
CREATE TRIGGER note_made AFTER INSERT ON pg_task FOR EACH ROW EXECUTE FUNCTION note_made();
"""
SEEN = "SELECT count(*) FROM times WHERE name = 'each second'"


def prepare(rows: Rows, *scripts: str) -> None:
    for script in scripts:
        quoted = script.replace("$$", "$script$")
        rows(f"DO $outer$ BEGIN EXECUTE $text${quoted}$text$; END $outer$")


def made(rows: Rows, name: str) -> list[datetime]:
    """Return the times of a schedule whose tasks were inserted, as often as they were."""
    found = [scheduled_time(row[0]) for row in rows("SELECT id FROM made WHERE step LIKE $1", f'%"{name}"%')]
    return sorted(time for time in found if time is not None)


def assert_complete(times: list[datetime], interval: timedelta) -> None:
    assert len(times) == len(set(times)), "a time has started two tasks"
    assert times == [times[0] + number * interval for number in range(len(times))], "a time is missing"


def test_fleets_start_each_time_once(dsn: str, rows: Rows) -> None:
    prepare(rows, TABLE, MADE)
    with ready(dsn, app="scheduled:app", procs=2), ExitStack() as stack:
        other = stack.enter_context(ready(dsn, "--no-listen", app="scheduled:app", procs=2))
        rows.until(SEEN, holds=lambda count: count >= 2)
        os.kill(other.family()[0].pid, signal.SIGKILL)
        rows.until(SEEN, holds=lambda count: count >= 4)
        other.process.kill()
        rows.until(SEEN, holds=lambda count: count >= 6)
    assert_complete(made(rows, "each second"), timedelta(seconds=1))
    told = rows("SELECT first, second FROM times WHERE name = 'each second'")
    assert all(first == second for first, second in told), "both steps know the time"
    late = rows.value("SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY at - date_trunc('second', at)) FROM made")
    assert late < timedelta(milliseconds=500)
    assert rows.value("SELECT count(*) FROM pg_task_schedules WHERE app = 'scheduled:app'") == 3


def test_burst_starts_no_schedule(dsn: str, rows: Rows) -> None:
    burst(dsn, app="scheduled:app")
    assert rows.value("SELECT count(*) FROM pg_task_schedules") == 0


def test_workers_without_schedules_send_nothing_of_them(dsn: str, rows: Rows) -> None:
    rows("ALTER TABLE pg_task_schedules RENAME TO hidden")
    put(dsn, apps.Noop())
    with ready(dsn, app="apps:app") as fleet:
        rows.until("SELECT count(*) FROM pg_task", holds=lambda count: count == 0)
    assert "database.refused" not in fleet.output


def test_versions_of_a_deploy_agree_in_the_end(dsn: str, rows: Rows) -> None:
    prepare(rows, TABLE, MADE)
    row = "SELECT cron FROM pg_task_schedules WHERE removed_at IS NULL AND name = 'each minute'"
    with ready(dsn, app="scheduled:app"):
        rows.until(SEEN)
        rows("UPDATE pg_task_schedules SET app = 'scheduled:slower'")
        before = rows("SELECT * FROM pg_task_schedules ORDER BY name")
        with ready(dsn, app="scheduled:slower") as fleet:
            fleet.until('schedules.removed names="each second, yearly"')
            assert rows.value(row) == "*/2 * * * *"
            assert len(before) == rows.value("SELECT count(*) FROM pg_task_schedules")
            changed_at = rows.value("SELECT max(declared_at) FROM pg_task_schedules")
    assert rows.value("SELECT max(declared_at) FROM pg_task_schedules") == changed_at


@pytest.mark.faults
def test_clock_steps_and_kills_of_four_supervisors(dsn: str, rows: Rows) -> None:
    """The clock of the database steps by up to two hours, thirty times, while workers and supervisors are killed."""
    random = Random(os.environ.get("PYTEST_SEED", "8"))
    prepare(rows, TABLE, MADE, CLOCK)
    ends = time.monotonic() + 60
    with ExitStack() as stack:
        fleets = [stack.enter_context(ready(dsn, app="scheduled:app", procs=2)) for _ in range(4)]
        began = rows.value("SELECT clock.statement_timestamp()")
        farthest = began
        while time.monotonic() < ends:
            rows("UPDATE clock.step SET by = make_interval(mins => $1)", random.randint(-120, 120))
            # The looks of workers come after up to 100 seconds without a reason; a new worker looks at once.
            fleet = random.choice(fleets)
            if random.random() < 0.3:
                fleet.process.kill()
                fleets[fleets.index(fleet)] = stack.enter_context(Fleet(dsn, app="scheduled:app", procs=2))
            elif workers := fleet.family():
                os.kill(random.choice(workers).pid, signal.SIGKILL)
            rows("SELECT pg_sleep(1.5)")  # the pace of the kills
            farthest = max(farthest, rows.value("SELECT clock.statement_timestamp()"))
    assert_complete(made(rows, "each minute"), timedelta(minutes=1))
    assert_complete(made(rows, "each second"), timedelta(seconds=1))
    last = made(rows, "each minute")[-1]
    assert last.astimezone(UTC) <= farthest
    assert last - began > timedelta(minutes=60)
