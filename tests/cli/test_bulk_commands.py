"""`retry`, `cancel`, `move` and `reschedule` by filters, and `pgtask actions`."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import asyncpg
import pytest
from fix_commands import LEASED, PARKED, Command, insert, process, query, with_connection

from pgtask._cli import bulk, bulk_progress
from pgtask._postgres import task_changes

FILL = """
    INSERT INTO pg_task (step, queue, error, tried, wakeup_at)
    SELECT
        format('{"Shop":{"%s":{"customer":%s,"address":{"city":"%s"},"tags":["a"]}}}', step, i % 10, city),
        CASE WHEN i % 2 = 0 THEN 'slow' ELSE 'default' END,
        CASE WHEN i % 4 < 2 THEN 'OSError: ' || i END,
        3,
        now() + CASE WHEN i % 4 = 2 THEN interval '1 day' ELSE - interval '1 day' END
    FROM generate_series(1, 100) AS i
    CROSS JOIN LATERAL (
        SELECT
            CASE WHEN i % 5 = 0 THEN 'Pay' ELSE 'Ship' END AS step,
            CASE WHEN i % 3 = 0 THEN 'Bern' ELSE 'Oslo' END AS city
    ) AS names
"""
CUSTOMER_4 = "step LIKE '%\"customer\":4,%'"
ACTIONS = "SELECT action, filter, tasks, state, ended_at IS NOT NULL FROM pg_task_actions ORDER BY id"


def count(database: str, condition: str) -> int:
    return int(query(database, f"SELECT count(*) FROM pg_task WHERE {condition}")[0][0])


@pytest.mark.parametrize(
    ("words", "condition", "after"),
    [
        (["retry", "--where", "customer=4"], f"error IS NOT NULL AND {CUSTOMER_4}", "error IS NULL AND tried = 0"),
        (["retry", "--all"], "error IS NOT NULL", "error IS NULL AND tried = 0"),
        (["retry", "--state", "scheduled"], "error IS NULL AND wakeup_at > now()", "tried = 0"),
        (["cancel", "--step", "Shop.Pay", "-q", "slow"], "step LIKE '%Pay%' AND queue = 'slow'", None),
        (["cancel", "--parked"], "error IS NOT NULL", None),
        (["move", "-q", "new", "--from", "slow"], "queue = 'slow'", "queue = 'new'"),
        (["move", "--priority", "7", "--where", "address.city=Bern"], "step LIKE '%Bern%'", "priority = 7"),
        (["reschedule", "--after", "2h", "--error", "OSError%"], "error IS NOT NULL", "wakeup_at > now() + '1 h'"),
        (["reschedule", "--at", "2100-01-01T00:00Z", "--age", "1h"], "wakeup_at < now()", "wakeup_at > now() + '1 y'"),
    ],
)
def test_bulk_changes_what_the_filter_chooses(
    words: list[str],
    condition: str,
    after: str | None,
    database: str,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bulk, "PORTION", 7)
    query(database, FILL)
    ids = [row[0] for row in query(database, f"SELECT id FROM pg_task WHERE {condition}")]
    others = query(database, "SELECT id, xmin FROM pg_task WHERE id <> ALL ($1) ORDER BY id", ids)
    said = command(*words, "--dry-run")
    assert (said.code, said.out.split(" would")[0]) == (0, f"{len(ids)} tasks")
    assert query(database, ACTIONS) == []
    assert command(*words, "--rate", "1000000/s").out.startswith(f"{len(ids)} tasks ")
    changed = query(database, f"SELECT count(*) FROM pg_task WHERE id = ANY ($1) AND {after or 'true'}", ids)
    assert changed == [(0 if after is None else len(ids),)]
    assert query(database, "SELECT id, xmin FROM pg_task WHERE id <> ALL ($1) ORDER BY id", ids) == others
    ((action, _, tasks, state, has_ended),) = query(database, ACTIONS)
    assert (action.split()[0], tasks, state, has_ended) == (words[0], len(ids), "done", True)
    assert command(*words, "--dry-run").out.startswith("0 tasks would") or words[0] == "reschedule"


@pytest.mark.parametrize("words", [("retry", "--all"), ("reschedule", "--all", "--after", "1h")])
def test_bulk_revives_the_record_of_a_failed_run(words: tuple[str, ...], database: str, command: Command) -> None:
    run = insert(database, **PARKED)
    query(database, "INSERT INTO pg_task_runs (id, name, state, error) VALUES ($1, 'W', 'ERROR', 'no')", run)
    assert command(*words).out.startswith("1 task ")
    assert query(database, "SELECT state, error, ended_at FROM pg_task_runs") == [(None, None, None)]


@pytest.mark.parametrize(
    ("words", "times"),
    [(("retry", "--all"), 1), (("move", "-q", "x", "--all"), 1), (("cancel", "--all"), 0)],
)
def test_bulk_tells_workers_once_and_calls_no_trigger(
    words: tuple[str, ...], times: int, database: str, command: Command
) -> None:
    query(database, FILL)
    for function in ("pg_task_notify", "pg_task_run_revived", "pg_task_touch"):
        query(
            database,
            f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE 'row by row'; END $$",
        )

    async def listen_and_change(db: Any) -> None:
        told: list[str] = []
        await db.add_listener("pg_task_changed", lambda *args: told.append(args[-1]))
        said = await asyncio.to_thread(command, *words)
        assert said.code == 0, said.err
        await db.fetchval("SELECT 1")
        assert told == [""] * times

    with_connection(database, listen_and_change)


def test_limit_ends_a_bulk_change(database: str, command: Command) -> None:
    query(database, FILL)
    assert command("cancel", "--all", "-n", "30") == (0, "30 tasks cancelled\n", "")
    assert count(database, "true") == 70


@pytest.mark.parametrize(
    ("step", "where", "is_chosen"),
    [
        ('{"T":{"S":{"a":1}}}', ["a=1"], True),
        ('{"T":{"S":{"a":"1"}}}', ["a=1"], True),
        ('{"T":{"S":{"a":null}}}', ["a=null"], True),
        ('{"T":{"S":{"b":null}}}', ["a=null"], False),
        ('{"T":{"S":{"a":{"b":[5,"x y"]}}}}', ["a.b.1=x y", "a.b.0=5"], True),
        ('{"T":{"S":{"a":{"b":[5,"x y"]}}}}', ["a.b.1=x y", "a.b.0=6"], False),
        ('{"T":{"S":{"a":"\\u0000"}}}', ["a=1"], False),
        ('{"T": {"S": {"a" :  1 , "b": 12}}}', ["a=1", "b=12"], True),
        ('{"T":{"S":{"\\u0061":"\\u0031/\\/"}}}', ["a=1//"], True),
        ('{"T":{"S":{"a":12,"b":{"x":1}}}}', ["a=1"], False),
        ('{"T":{"S":{"a":12,"b":{"x":1}}}}', ['b={"x":1}'], True),
        ('{"T":{"S":["x",12]}}', ["1=12"], True),
        ('{"T":{"S":{"a_%":"50% [a]_(b)"}}}', ["a_%=50% [a]_(b)"], True),
        ('{"T":{"S":{"ab":"50x"}}}', ["a_=50%"], False),
        ('{"T":{"S":{"a":""}}}', ["a="], True),
        ('{"T":{"S":"a"}}', ["a=1"], False),
        ('{"T":{"S":null}}', ["a=1"], False),
        ('{"T":7}', ["a=1"], False),
        ("[1]", ["a=1"], False),
        ("no JSON", ["a=1"], False),
        ('{"T":{"S":{"a":' + "[" * 100_000, ["a=1"], False),
    ],
)
def test_where_compares_fields_of_any_row(
    step: str, where: list[str], is_chosen: bool, database: str, command: Command
) -> None:
    query(database, "INSERT INTO pg_task (step) VALUES ($1)", step)
    words = [word for one in where for word in ("--where", one)]
    assert len(command("list", "--json", *words).objects) == is_chosen
    assert command("cancel", *words).out == f"{int(is_chosen)} task{'' if is_chosen else 's'} cancelled\n"


def test_bulk_passes_over_what_a_worker_runs(database: str, command: Command) -> None:
    insert(database, **LEASED)
    for words in (["cancel"], ["move", "-q", "x"], ["reschedule", "--after", "1"], ["retry", "--state", "leased"]):
        every = [] if words[0] == "retry" else ["--all"]
        assert command(*words, *every, "--dry-run").out.startswith("0 tasks would be")
        assert command(*words, *every).out.startswith("0 tasks ")
    assert command("cancel", "--all", "--force").out == "1 task cancelled\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cancel"], "give IDs, a filter such as --task, or --all"),
        (["retry", "--dry-run"], "give IDs, a filter such as --task, or --all"),
        (["cancel", "--all", "--task", "A"], "--all is for a command without filters"),
        (["cancel", "12345678", "--task", "A"], "give either IDs or filters"),
        (["move", "-q", "x", "12345678", "--dry-run"], "give either IDs or filters"),
        (["retry", "--parked", "--state", "ready"], "exclude each other"),
        (["retry", "--where", "customer"], "is not a field and its text"),
        (["retry", "--where", "a..b=1"], "is not a field and its text"),
        (["retry", "--all", "--rate", "0/s"], "is not a rate such as 500/s"),
        (["retry", "--all", "--rate", "5/y"], "is not a rate such as 500/s"),
        (["reschedule", "--all"], "--after"),
        (["reschedule", "--all", "--at", "2026-01-01"], "has no time zone"),
    ],
)
def test_wrong_bulk_words_are_refused(words: list[str], says: str, database: str, command: Command) -> None:
    task = insert(database, **PARKED)
    said = command(*words)
    assert (said.code, said.out) == (2, "")
    assert says in said.err
    assert query(database, "SELECT id::text FROM pg_task WHERE error IS NOT NULL") == [(task,)]


def test_limit_holds_for_the_two_tasks_of_a_key(database: str, command: Command) -> None:
    for key in ("'Greeter/k'", "'/Greeter/k'"):
        insert(database, key=key)
    words = ("cancel", "--task", "Greeter", "--key", "k", "-n", "1")
    assert "1 task would be" in command(*words, "--dry-run").out
    assert command(*words).out == "1 task cancelled\n"
    assert query(database, "SELECT count(*) FROM pg_task") == [(1,)]


def test_change_leaves_out_what_is_enqueued_after_its_start(
    database: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends, though others enqueue as fast as it goes."""
    monkeypatch.setattr(bulk, "PORTION", 5)
    for _ in range(12):
        insert(database)

    async def change_and_enqueue(connection: Any, *args: Any, **options: Any) -> Any:
        done = await task_changes.change_portion(connection, *args, **options)
        await connection.execute("INSERT INTO pg_task (step) SELECT step FROM pg_task_new, generate_series(1, 5)")
        return done

    query(database, "CREATE TABLE pg_task_new AS SELECT step FROM pg_task LIMIT 1")
    monkeypatch.setattr(bulk, "change_portion", change_and_enqueue)
    assert command("cancel", "-q", "default").out == "12 tasks cancelled\n"
    assert query(database, "SELECT count(*) FROM pg_task") == [(15,)]


def test_rate_paces_a_change(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times at which portions commit lie on the line of the rate."""
    query(database, FILL)
    assert command("retry", "--all", "--rate", "100/s").out == "50 tasks made due\n"
    # 50 tasks at 100/s in portions of 20: the last one begins after 40 tasks, at 0.4 s.
    ((seconds,),) = query(database, "SELECT extract(epoch FROM ended_at - began_at)::float8 FROM pg_task_actions")
    assert seconds >= 0.4
    assert query(database, ACTIONS)[0][1] == "--all --rate 100/s"


def test_interrupt_leaves_whole_portions(database: str) -> None:
    """Also a portion under way: it commits, and its tasks are counted."""
    query(database, FILL)

    async def interrupt(db: Any) -> None:
        watch = await asyncpg.connect(database)
        child = process("cancel", "--all", "--rate", "50/s", environ={"PGTASK_DSN": database})
        try:
            async with asyncio.timeout(30):
                while await watch.fetchval("SELECT count(*) FROM pg_task") > 80:
                    pass
            child.send_signal(signal.SIGINT)
            out, err = await asyncio.to_thread(child.communicate, timeout=30)
        finally:
            child.kill()
            await watch.close()
        left = await db.fetchval("SELECT count(*) FROM pg_task")
        assert child.returncode == 130, err
        assert out == f"{100 - left} tasks cancelled\n"
        assert left % 10 == 0
        assert 0 < left < 100
        assert err.startswith("pgtask: stopped: the other tasks are as they were")
        assert await db.fetchrow("SELECT tasks, state FROM pg_task_actions") == (100 - left, "stopped")

    with_connection(database, interrupt)


def test_failure_is_recorded_with_its_count(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PORTION", 10)
    query(database, FILL)
    query(
        database,
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF (SELECT count(*) FROM pg_task) < 80 THEN RAISE 'enough'; END IF;
                RETURN OLD;
            END $$
        """,
    )
    query(database, "CREATE TRIGGER refuse BEFORE DELETE ON pg_task FOR EACH ROW EXECUTE FUNCTION refuse()")
    said = command("cancel", "--all")
    assert (said.code, "enough" in said.err) == (5, True)
    left = count(database, "true")
    assert query(database, ACTIONS) == [("cancel", "--all", 100 - left, "failed", True)]


def test_progress_comes_now_and_then(database: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PORTION", 20)
    monkeypatch.setattr(bulk_progress, "NOTE_INTERVAL", 0.0)
    query(database, FILL)
    assert command("cancel", "--all").err.splitlines()[0] == "pgtask: 20 tasks cancelled so far"


def test_actions_tell_who_did_what(database: str, command: Command) -> None:
    assert command("actions") == (0, "", "pgtask: no actions\n")
    insert(database, **PARKED)
    command("retry", "--task", "Greeter", "--error", "bo%", "--where", "name=you")
    command("pause", "reports", "--task", "Crawl")
    command("pause", "reports")
    command("resume", "--all")
    actions = command("actions", "--json").objects
    assert [(one["action"], one["filter"], one["tasks"]) for one in actions] == [
        ("resume", "queue reports, task Crawl", 0),
        ("pause", "queue reports, task Crawl", 0),
        ("retry", "--task Greeter --error bo% --where name=you", 1),
    ]
    assert all("@" in one["done_by"] and one["state"] == "done" and one["ended_at"] for one in actions)
    shown = command("actions", "-n", "1").out.splitlines()
    assert (len(shown), "resume" in shown[1]) == (2, True)


def test_prune_removes_old_actions(database: str, command: Command) -> None:
    command("pause", "a")
    command("pause", "b")
    query(database, "UPDATE pg_task_actions SET began_at = now() - interval '1 y' WHERE filter = 'queue a'")
    assert "1 action removed\n" in command("prune", "--older-than", "30d").out
    assert query(database, "SELECT filter FROM pg_task_actions") == [("queue b",)]
    for number in range(5):
        command("pause", f"q{number}")
    assert command("prune", "--actions", "--older-than", "0", "--batch", "2").out == "6 actions removed\n"


def test_tasks_parked_for_one_time_are_all_changed(
    database: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index scan backwards returns those of one index tuple forwards."""
    monkeypatch.setattr(bulk, "PORTION", 100)
    query(
        database,
        "INSERT INTO pg_task (step, error, tried, wakeup_at) "
        "SELECT '{}', 'no', 3, '2026-01-01' FROM generate_series(1, 3000)",
    )
    query(database, "REINDEX INDEX pg_task_parked_idx")
    assert command("retry", "--all").out == "3,000 tasks made due\n"
    assert count(database, "error IS NOT NULL") == 0
