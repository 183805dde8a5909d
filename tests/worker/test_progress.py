"""`ctx.progress()` is kept in memory, and written as the lease is renewed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import reporting
from fix_commands import Command
from fix_database import run
from fleet import SHORT_LEASE, Fleet, Rows, put

from pgtask import App, Context, Done, Policy, Task
from pgtask._fastpath import Leases
from pgtask._postgres.store import statement
from pgtask.testing import MemoryWorker, Progress

SHOWN = "SELECT bool_or(progress ->> 'done' = '{}' AND progress ->> 'lease' = locked_by::text) FROM pg_task"


def only(command: Command, id: UUID) -> Any:
    """Return the task as `pgtask show --json` tells it, after a look at the page of it."""
    (row,) = command("show", str(id), "--json").objects
    return row


# --- in a worker


def test_progress_is_shown_and_cleared_when_the_task_goes_on(
    database: str, rows: Rows, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "go on"
    (id,) = put(database, reporting.Import(str(path)))
    with Fleet(database, *SHORT_LEASE, app="reporting:app") as fleet:
        rows.until(SHOWN.format(3))
        assert only(command, id)["progress"] == {"done": 3, "total": 10}
        assert "\nprogress    3 of 10 (30%)\n" in command("show", str(id)).out
        (listed,) = command("list", "--json").objects
        assert listed["progress"] == {"done": 3, "total": 10}
        path.touch()
        rows.until("SELECT step LIKE '%Check%' AND progress IS NULL AND locked_by IS NOT NULL FROM pg_task")
        assert only(command, id)["progress"] is None
        assert "\nprogress " not in command("show", str(id)).out
        Path(f"{path}.2").touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
        assert "lease.lost" not in fleet.output


def test_step_in_a_thread_reports_beside_one_that_does_not(
    database: str, rows: Rows, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "end"
    silent, counting = put(database, reporting.Check(str(path)), reporting.CountInThread(str(path)))
    with Fleet(database, *SHORT_LEASE, app="reporting:app") as fleet:
        rows.until(SHOWN.format(1_000_000))
        assert only(command, counting)["progress"] == {"done": 1_000_000, "total": None}
        assert only(command, silent)["progress"] is None
        before = rows("SELECT min(lock_expires_at) FROM pg_task")[0][0]
        rows.until(f"SELECT min(lock_expires_at) > '{before.isoformat()}' FROM pg_task")
        path.touch()
        rows.until("SELECT count(*) = 0 FROM pg_task")
        assert "lease.lost" not in fleet.output


def test_progress_of_an_earlier_lease_is_not_shown(database: str, rows: Rows, command: Command) -> None:
    """Another worker, of a version that does not know the column, has claimed the task since."""
    (id,) = put(database, reporting.Check("none"))
    rows(
        "UPDATE pg_task SET locked_by = $1, lock_expires_at = 'infinity',"
        " progress = jsonb_build_object('done', 7, 'total', 9, 'lease', $2::uuid)",
        *(UUID(int=1), UUID(int=2)),
    )
    assert only(command, id)["progress"] is None
    rows("UPDATE pg_task SET locked_by = $1", UUID(int=2))
    assert only(command, id)["progress"] == {"done": 7, "total": 9}


# --- the statement


def test_statement_renews_all_and_writes_under_their_leases_only(dsn: str, rows: Rows) -> None:
    ids, token = put(dsn, *(reporting.Check("none") for _ in range(4))), uuid4()
    rows("UPDATE pg_task SET locked_by = $1, lock_expires_at = now(), progress = '{\"done\":1}'", token)
    rows("UPDATE pg_task SET locked_by = $1 WHERE id = $2", UUID(int=9), ids[3])
    reports = ['{"done":2}', "null", '{"done":4}', '{"done":5}']
    held = rows(statement("renew_progress"), list(ids), [token] * 4, 60.0, reports)
    assert {UUID(int=row[0].int): row[1] for row in held} == dict.fromkeys(ids[:3], True)
    found = rows("SELECT progress, lock_expires_at > now() + '50 s'::interval FROM pg_task ORDER BY id")
    assert [tuple(row) for row in found] == [
        ('{"done": 2}', True),
        (None, True),
        ('{"done": 4}', True),
        ('{"done": 1}', False),
    ]


@pytest.mark.parametrize("how", ["continued", "rescheduled"])
def test_outcome_clears_the_progress(dsn: str, rows: Rows, how: str) -> None:
    ids, token = put(dsn, reporting.Check("none")), uuid4()
    rows("UPDATE pg_task SET locked_by = $1, lock_expires_at = now(), progress = '{\"done\":1}'", token)
    lease: list[list[Any]] = [list(ids), [token]]
    none: list[list[Any]] = [[], []]
    continued, rescheduled = (lease, none) if how == "continued" else (none, lease)
    fields = [[None] * len(rescheduled[0])] * 7
    rows(statement("flush"), *none, *continued, ["{}"] * len(continued[0]), 1, *rescheduled, *fields, False)
    assert [tuple(row) for row in rows("SELECT progress, locked_by IS NULL FROM pg_task")] == [
        (None, how == "rescheduled")
    ]


# --- the table of leases


def test_lease_without_a_report_has_nothing_to_write() -> None:
    leases = Leases()
    (first, second), _ = leases.add_claimed([(uuid4(), "{}", 0, 1, None), (uuid4(), "{}", 0, 1, None)], uuid4(), 0.0)
    assert leases.unwritten_progress([first, second]) is None
    leases.report_progress(first.id, 1, Progress(1))  # its step has not started
    leases.report_progress(uuid4(), 1, Progress(1))  # another worker's
    assert first.progress is None
    assert leases.unwritten_progress([first, second]) is None


# --- in memory


class Counting(Task):
    policy = Policy(retry_limit=1)


class Count(Counting):
    """Fails once."""

    to: int

    async def run(self, ctx: Context) -> Done:
        for number in range(self.to + 1):
            ctx.progress(number, self.to)
        if ctx.attempt == 1:
            raise OSError("no")
        return Done()


class CountInThread(Counting):
    to: int

    def run(self, ctx: Context) -> Done:
        ctx.progress(self.to)
        return Done()


class Silent(Counting):
    async def run(self, ctx: Context) -> Done:
        return Done()


class Keep(Counting):
    """Reports by the context of its first try, against what the documentation says."""

    async def run(self, ctx: Context) -> Done:
        ctx.resources.append(ctx)
        if ctx.attempt == 1:
            raise OSError("no")
        ctx.resources[0].progress(1)
        return Done()


def test_progress_is_kept_in_memory() -> None:
    async def main() -> None:
        async with MemoryWorker(App(Counting)) as worker:
            ids = [await worker.client.enqueue(step) for step in (Count(5), CountInThread(7), Silent())]
            assert [worker.progress(id) for id in ids] == [None, None, None]
            await worker.run()
            assert [worker.progress(id) for id in ids] == [Progress(5, 5), Progress(7), None]
            assert [one.progress for one in worker.task(ids[0]).tries] == [Progress(5, 5)] * 2

    run(main())


def test_late_report_of_a_try_that_is_over_is_dropped() -> None:
    async def main() -> None:
        async with MemoryWorker(App(Counting), resources=[]) as worker:
            id = await worker.client.enqueue(Keep())
            await worker.run()
            assert worker.task(id).state == "done"
            assert worker.progress(id) is None

    run(main())


# --- values


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((-1,), r"ctx\.progress\(done=-1\) must be a whole number, from 0 to"),
        ((True,), r"ctx\.progress\(done=True\) must be a whole number"),
        ((1.5,), r"ctx\.progress\(done=1\.5\) must be a whole number"),
        ((2**63,), r"ctx\.progress\(done=9223372036854775808\) must be a whole number"),
        ((1, "2"), r"ctx\.progress\(total='2'\) must be a whole number"),
        ((3, 2), r"ctx\.progress\(total=2\) must be 3, as done is, or more; or None"),
    ],
)
def test_progress_of_wrong_numbers_is_refused(arguments: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        Context(UUID(int=1), 1, None, None).progress(*arguments)


@pytest.mark.parametrize(
    ("progress", "shown"),
    [
        (Progress(0), "0"),
        (Progress(1_234_567), "1,234,567"),
        (Progress(0, 0), "0 of 0"),
        (Progress(999, 1000), "999 of 1,000 (99%)"),
    ],
    ids=str,
)
def test_progress_is_shown_for_people(progress: Progress, shown: str) -> None:
    assert str(progress) == shown
