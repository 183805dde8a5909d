"""`pgtask retry`, `pgtask cancel` and `pgtask stats`."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from fix_commands import EXPIRED, FILL, LEASED, PARKED, UNKNOWN_ID, Command, Said, insert, query, with_connection

from pgtask._cli import bulk
from pgtask._cli.commands import stats
from pgtask._postgres import listing, statistics

# --- retry and cancel


STATE = "SELECT tried, error, claims, wakeup_at <= now(), locked_by IS NULL FROM pg_task WHERE id = $1"
AFRESH = [(0, None, 0, True, True)]


def test_retry_makes_tasks_due_with_all_their_retries(database: str, command: Command) -> None:
    tasks = [
        insert(database, **PARKED),
        insert(database, tried="2", wakeup_at="now() + interval '1 h'"),
        insert(database, **EXPIRED),
        insert(database, **PARKED, wakeup_at="'infinity'"),
    ]
    assert command("retry", *tasks, tasks[0]) == (0, "4 tasks made due\n", "")
    for task in tasks:
        assert query(database, STATE, UUID(task)) == AFRESH
    assert command("retry", tasks[0]) == (0, "1 task made due\n", "")


def test_retry_keeps_the_place_of_a_task_that_is_due(database: str, command: Command) -> None:
    task = insert(database, wakeup_at="'2026-01-01 00:00+00'", tried="1")
    assert command("retry", task).code == 0
    assert query(database, "SELECT wakeup_at, tried FROM pg_task") == [(datetime(2026, 1, 1, tzinfo=UTC), 0)]


def test_retry_names_what_it_left_alone(database: str, command: Command) -> None:
    parked, leased = insert(database, **PARKED), insert(database, **LEASED)
    said = command("retry", leased, UNKNOWN_ID, parked)
    assert (said.code, said.out) == (1, "1 task made due\n")
    assert said.err.splitlines() == [
        f"pgtask: {leased}: it is being run, under a live lease",
        f"pgtask: {UNKNOWN_ID}: there is no such task: finished, cancelled, or never existed",
    ]
    assert query(database, STATE, UUID(parked)) == AFRESH
    assert query(database, STATE, UUID(leased)) == [(0, None, 1, True, False)]


@pytest.mark.parametrize("columns", [PARKED, EXPIRED], ids=["parked", "expired"])
def test_retry_wakes_workers(columns: dict[str, str], database: str, command: Command) -> None:
    task = insert(database, **columns)

    async def listen(connection: Any) -> None:
        heard = asyncio.Event()
        await connection.add_listener("pg_task_changed", lambda *_: heard.set())
        await asyncio.to_thread(command, "retry", task)
        await asyncio.wait_for(heard.wait(), 10)
        await connection.reset()

    with_connection(database, listen)


@pytest.mark.parametrize(
    ("words", "condition"),
    [
        ("", "true"),
        ("--queue emails", "queue = 'emails'"),
        ("--task Mailer", "step LIKE '%Mailer%'"),
        ("--step Greeter.SayHello --queue emails", "step LIKE '%SayHello%' AND queue = 'emails'"),
    ],
)
def test_retry_parked_takes_filters_and_limits(
    words: str, condition: str, database: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PORTION", 7)
    monkeypatch.setattr(listing, "SCAN_LIMIT", 5)
    query(
        database,
        """
        INSERT INTO pg_task (step, queue, error, tried)
        SELECT
            CASE i % 2 WHEN 0 THEN '{"Mailer":{"Flush":null}}' ELSE '{"Greeter":{"SayHello":{}}}' END,
            CASE i % 3 WHEN 0 THEN 'emails' ELSE 'default' END,
            CASE WHEN i % 5 > 0 THEN 'boom' END,
            3
        FROM generate_series(1, 100) AS i
        """,
    )
    ((expected, parked),) = query(
        database, f"SELECT count(*) FILTER (WHERE {condition}), count(*) FROM pg_task WHERE error IS NOT NULL"
    )
    assert command("retry", "--parked", *words.split(), "--limit", "2").out == "2 tasks made due\n"
    assert command("retry", "--parked", *words.split()) == (0, f"{expected - 2} tasks made due\n", "")
    left = f"SELECT count(*) FILTER (WHERE {condition}), count(*) FROM pg_task WHERE error IS NOT NULL"
    assert query(database, left) == [(0, parked - expected)]
    assert query(database, f"SELECT DISTINCT tried FROM pg_task WHERE error IS NULL AND {condition}") == [(0,), (3,)]


def test_retry_parked_ends_while_tasks_park_again(
    database: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PORTION", 3)
    for _ in range(10):
        insert(database, **PARKED)
    query(
        database,
        """
        CREATE FUNCTION fail_again() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN NEW.error = 'again'; NEW.wakeup_at = clock_timestamp(); RETURN NEW; END $$
        """,
    )
    query(database, "CREATE TRIGGER fail BEFORE UPDATE ON pg_task FOR EACH ROW EXECUTE FUNCTION fail_again()")
    assert command("retry", "--parked") == (0, "10 tasks made due\n", "")


def test_retry_parked_and_list_choose_by_error_and_age(database: str, command: Command) -> None:
    old, new = [
        insert(database, error=f"'OSError: {name}'", wakeup_at=f"now() - interval '{hours} h'")
        for name, hours in (("disk", 5), ("net", 1))
    ]
    other = insert(database, **PARKED, wakeup_at="now() - interval '5 h'")
    assert [row["id"] for row in command("list", "--error", "OSError%", "--json").objects] == [new, old]
    assert {row["id"] for row in command("list", "--age", "2h", "--json").objects} == {old, other}
    assert command("list", "--error", "x", "--state", "ready").err.endswith(
        "--error is of parked tasks: leave out --state\n"
    )
    assert command("retry", "--parked", "--error", "OSError%", "--age", "2h").out == "1 task made due\n"
    assert query(database, "SELECT id::text FROM pg_task WHERE error IS NULL") == [(old,)]


def test_move_changes_queue_and_priority(database: str, command: Command) -> None:
    waiting, parked, leased = insert(database), insert(database, **PARKED), insert(database, **LEASED)
    said = command("move", waiting, parked, leased, "--queue", "slow", "--priority", "-2")
    assert (said.code, said.out) == (1, "2 tasks moved\n")
    assert said.err == f"pgtask: {leased}: it is being run, under a live lease\n"
    rows = query(database, "SELECT id::text, queue, priority FROM pg_task WHERE queue <> 'default'")
    assert sorted(rows) == sorted([(waiting, "slow", -2), (parked, "slow", -2)])
    for words, says in [
        ((), "give --queue, --priority, or both (see pgtask move --help)"),
        (("-q", "a,b"), "without a comma"),
        (("--priority", "40000"), "must be a whole number"),
    ]:
        said = command("move", waiting, *words)
        assert (said.code, says in said.err) == (2, True)


def test_cancel_removes_tasks_without_a_live_lease(database: str, command: Command) -> None:
    gone = [insert(database, **columns) for columns in (PARKED, {}, EXPIRED)]
    leased = insert(database, **LEASED)
    said = command("cancel", *gone, leased, UNKNOWN_ID)
    assert (said.code, said.out) == (1, "3 tasks cancelled\n")
    assert said.err.splitlines() == [
        f"pgtask: {leased}: it is being run, under a live lease",
        f"pgtask: {UNKNOWN_ID}: there is no such task: finished, cancelled, or never existed",
    ]
    assert query(database, "SELECT id::text FROM pg_task") == [(leased,)]
    assert command("cancel", "--force", leased) == (0, "1 task cancelled\n", "")
    assert query(database, "SELECT count(*) FROM pg_task") == [(0,)]


@pytest.mark.parametrize(("name", "done"), [("retry", "made due"), ("cancel", "cancelled")])
def test_tasks_are_named_by_their_first_digits_too(name: str, done: str, database: str, command: Command) -> None:
    one, two, three = (f"'0192{n:04}-0000-7000-8000-{n:012}'" for n in (1, 2, 3))
    twins = [f"'0193abcd-0000-7000-8000-{n:012}'" for n in (1, 2)]
    for task in (one, two, three, *twins):
        insert(database, id=task, **PARKED)
    said = command(name, "01920001", "0192-0002-0000", three.strip("'"), "01920001-0")
    assert said == (0, f"3 tasks {done}\n", "")
    said = command(name, "0193ABCD", "01990000")
    both = [twin.strip("'") for twin in twins]
    assert (said.code, said.out) == (1, f"0 tasks {done}\n")
    assert said.err.splitlines() == [
        "pgtask: 0193ABCD: more than one task has these digits, give more of them:",
        *(f"pgtask:   {twin}  parked  Greeter.SayHello" for twin in both),
        "pgtask: 01990000: there is no such task: finished, cancelled, or never existed",
    ]
    assert query(database, "SELECT count(*) FROM pg_task WHERE error IS NOT NULL") == [(2,)]


@pytest.mark.parametrize("name", ["retry", "cancel"])
def test_task_claimed_meanwhile_is_left_alone(name: str, database: str, command: Command) -> None:
    task = insert(database)

    async def claim_meanwhile(connection: Any) -> Said:
        claim = connection.transaction()
        await claim.start()
        await connection.execute(
            "UPDATE pg_task SET locked_by = gen_random_uuid(), lock_expires_at = now() + interval '1 min'"
        )
        calling = asyncio.create_task(asyncio.to_thread(command, name, task))
        waiting = f"SELECT FROM pg_stat_activity WHERE application_name = 'pgtask {name}' AND wait_event_type = 'Lock'"
        while not await connection.fetch(waiting):
            await connection.execute("SELECT pg_stat_clear_snapshot()")
            await asyncio.sleep(0)
        await claim.commit()
        return await calling

    said = with_connection(database, claim_meanwhile)
    assert (said.code, said.out.split()[0]) == (1, "0")
    assert said.err == f"pgtask: {task}: another session took or changed it just now; try again\n"
    assert query(database, "SELECT locked_by IS NOT NULL FROM pg_task") == [(True,)]


# --- stats


def test_stats_counts_by_lane_and_state(database: str, command: Command) -> None:
    for columns, times in (({}, 3), ({"wakeup_at": "now() + interval '1 h'"}, 2), (PARKED, 4), (LEASED, 1)):
        for _ in range(times):
            insert(database, **columns)
    insert(database, queue="'emails'", priority="5", wakeup_at="now() - interval '10 min'")
    insert(database, queue="'only parked'", **PARKED)
    query(database, "ANALYZE pg_task")
    said = command("stats")
    assert (said.code, said.err) == (0, "")
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0] == ["queue", "prio", "ready", "scheduled", "leased", "parked", "oldest", "due", "next", "due"]
    assert lines[1][:6] == ["default", "0", "3", "2", "1", "4"]
    assert lines[1][-2:] == ["in", "60m"]
    assert lines[2] == ["emails", "5", "1", "0", "0", "0", "10m", "ago", "-"]
    assert lines[3] == ["only", "parked", "0", "0", "0", "0", "1", "-", "-"]
    assert "about 12 rows" in said.out
    assert "warning" not in said.out
    (report,) = command("stats", "--json").objects
    assert [(lane["queue"], lane["ready"], lane["at_least"]) for lane in report["lanes"]] == [
        ("default", 3, []),
        ("emails", 1, []),
        ("only parked", 0, []),
    ]
    assert report["rows"] == 12


def test_stats_says_where_it_stopped_counting(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    query(database, FILL)
    monkeypatch.setattr(statistics, "COUNT_LIMIT", 20)
    monkeypatch.setattr(statistics, "_MIN_LIMIT", 10)
    out = command("stats").out
    lane = next(line for line in out.splitlines() if line.startswith("default     1"))
    ready, scheduled, leased, parked = lane.split()[2:6]
    assert (ready, scheduled) == ("20+", "20+")
    assert leased.endswith("+")
    assert parked.endswith("+")
    (report,) = command("stats", "--json").objects
    assert all({"leased", "parked"} <= set(lane["at_least"]) for lane in report["lanes"])
    monkeypatch.setattr(statistics, "_TOTAL_LIMIT", 40)
    assert {lane["ready"] for lane in command("stats", "--json").objects[0]["lanes"]} == {10}


def test_stats_of_an_empty_table(database: str, command: Command) -> None:
    assert command("stats").out.startswith("no tasks\n\ntable   not estimated yet, 0 dead; ")


def test_stats_warns_of_problems(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    insert(database, **EXPIRED)

    async def look_meanwhile(connection: Any) -> tuple[int, str, Any]:
        async with connection.transaction(isolation="repeatable_read"):
            pid = await connection.fetchval("SELECT pg_backend_pid() FROM pg_task")
            await connection.execute("SET application_name = 'a report'")
            quiet = await asyncio.to_thread(command, "stats")
            assert "transaction" not in quiet.out
            monkeypatch.setattr(stats, "LONG_TRANSACTION", 0.0)
            out = (await asyncio.to_thread(command, "stats")).out
            (found,) = (await asyncio.to_thread(command, "stats", "--json")).objects
        return pid, out, found["oldest_transaction"]

    pid, out, oldest = with_connection(database, look_meanwhile)
    assert "warning: 1 lease has expired and no worker has claimed the task: is one running?\n" in out
    assert f"warning: pid {pid} (a report, idle in transaction): a transaction open for " in out
    assert (oldest["pid"], oldest["name"], oldest["state"]) == (pid, "a report", "idle in transaction")
    assert oldest["seconds"] >= 0
