"""`pgtask schedules`: the list, and what it does to a schedule."""

from __future__ import annotations

from uuid import UUID

import pytest
from fix_commands import Command, query
from fix_database import run
from scheduled import Stage, Sweep

from pgtask import Schedule
from pgtask._occurrences import scheduled_time

NEXT = "SELECT next_at = look_at FROM pg_task_schedules"


def declare(dsn: str, *schedules: Schedule) -> None:
    async def look() -> None:
        stage = Stage(dsn, schedules)
        await stage.look()
        await stage.link.close()

    run(look())


def test_schedules_are_listed_paused_resumed_and_run(database: str, command: Command) -> None:
    assert command("schedules") == (0, "", "pgtask: no schedules\n")
    nightly = Schedule("nightly", "0 3 * * *", Sweep("n"), zone="Europe/Berlin", queue="night", priority=4)
    declare(database, nightly, Schedule("yearly", "@yearly", Sweep("y")))
    head, first, second = command("schedules").out.splitlines()
    assert head.split() == ["schedule", "next", "last", "state", "cron", "zone", "queue"]
    assert first.split()[0] == "nightly"
    assert first.endswith("on     0 3 * * *  Europe/Berlin  night")
    assert second.split()[0] == "yearly"

    assert (
        command("schedules", "pause", "nightly", "yearly").out
        == "schedule nightly is paused\nschedule yearly is paused\n"
    )
    again = command("schedules", "pause", "nightly", "nigthly")
    assert (again.code, again.out) == (1, "")
    assert "there is no schedule nigthly; did you mean nightly?" in again.err
    assert "schedule nightly was paused before" in again.err
    assert command("schedules", "resume", "yearly").out == "schedule yearly goes on\n"
    started = command("schedules", "run", "nightly").out
    assert started.startswith("schedule nightly is started: ")
    id = UUID(started.split()[-1])
    assert query(database, "SELECT id, queue, priority FROM pg_task") == [(id, "night", 4)]

    (one, other) = sorted(command("schedules", "--json").objects, key=lambda fields: fields["name"])
    assert (one["state"], one["task"], one["last_task"]) == ("paused", "waiting", str(id))
    assert (other["state"], other["task"], other["cron"]) == ("on", None, "@yearly")
    assert scheduled_time(id) is not None
    assert [one["action"] for one in command("actions", "--json").objects] == ["run", "resume", "pause"]


def test_states_of_schedules(database: str, command: Command) -> None:
    declare(database, *(Schedule(name, "@yearly", Sweep("s")) for name in ("late", "failed", "gone")))
    query(database, "UPDATE pg_task_schedules SET next_at = now() - interval '1 hour' WHERE name = 'late'")
    query(database, "UPDATE pg_task_schedules SET error = 'it cannot' WHERE name = 'failed'")
    declare(database, *(Schedule(name, "@yearly", Sweep("s")) for name in ("late", "failed")))
    states = {one["name"]: one["state"] for one in command("schedules", "--json").objects}
    assert states == {"late": "late", "failed": "failed", "gone": "removed"}
    assert command("schedules", "run", "gone").code == 1
    assert command("schedules", "resume", "gone").out == "schedule gone goes on\n"
    assert query(database, f"{NEXT} WHERE name = 'gone' AND removed_at IS NULL") == [(True,)]


@pytest.mark.parametrize(
    ("words", "says"),
    [(["pause"], "name the schedules to pause"), (["stop", "nightly"], "invalid choice"), (["cron"], "did you mean")],
)
def test_wrong_words_are_refused(database: str, command: Command, words: list[str], says: str) -> None:
    result = command(*(words if words == ["cron"] else ["schedules", *words]))
    assert result.code == 2
    assert says in result.err
