"""Limits: workers start no more of a key than its limit allows, whatever happens; others do not wait for it."""

from __future__ import annotations

import itertools
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from fleet import Rows, burst, put, ready, stop
from limited import TABLE, Begin, Broken, Free, Fused, Keyed, Killer, Ordered, Paced, Short, Told, Turn

pytestmark = pytest.mark.timeout(120)

ROWS = "SELECT count(*) FROM pg_task"
RAN = "SELECT count(*) FROM ran"
LEFT = "SELECT count(*) FROM pg_task WHERE error IS NULL"


@pytest.fixture(autouse=True)
def ran(rows: Rows) -> None:
    rows(TABLE)


def none(value: int) -> bool:
    return value == 0


def most_at_once(rows: Rows, step: str) -> dict[str, int]:
    """Return, by key, how many steps ran at once, by the clock of the database."""
    events = sorted(
        event
        for key, began, ended in rows("SELECT key, began, ended FROM ran WHERE step = $1", step)
        for event in ((began, 1, key), (ended, -1, key))
    )
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()
    for _, change, key in events:
        now[key] += change
        most[key] = max(most[key], now[key])
    return dict(most)


def test_no_key_exceeds_its_limit(dsn: str, rows: Rows) -> None:
    """With two workers; and what a burst leaves is done."""
    put(dsn, *(Keyed(f"{number % 7}", 0.005) for number in range(140)), *(Free() for _ in range(20)))
    burst(dsn, app="limited:app", procs=2)
    assert rows.value(ROWS) == 0
    assert rows.value(RAN) == 160
    assert set(most_at_once(rows, "Keyed").values()) == {2}, "all of it is used, and no more"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHORT_LOG", str(tmp_path / "ran"))
    return tmp_path / "ran"


def assert_one_at_once(log: Path, least: int) -> None:
    """Check that no two `Short` of a key ran at once, and that so many ran."""
    ran: dict[str, list[tuple[int, int]]] = {}
    for key, began, ended in map(str.split, log.read_text().splitlines()):
        ran.setdefault(key, []).append((int(began), int(ended)))
    for spans in ran.values():
        spans.sort()
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
    assert sum(map(len, ran.values())) >= least


def test_turns_obey_limits(dsn: str, rows: Rows, log: Path) -> None:
    """No two steps of a key run at once, and a turn writes no lease; then with workers that die."""
    put(dsn, *(Short(f"{number % 400}") for number in range(6_000)))
    burst(dsn, procs=2, app="limited:app")
    rows("SELECT pg_stat_force_next_flush()")
    updates = rows.value("SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'pg_task'")
    assert updates < 15_000, "a task that is claimed under its limit is written three times"
    put(dsn, *(Short(f"{number % 40}") for number in range(3_000)))
    with ready(dsn, procs=2, app="limited:app") as fleet:
        for left in (2_500, 2_000, 1_500):
            rows.until(f"SELECT count(*) < {left} FROM pg_task")
            os.kill(fleet.family()[0].pid, signal.SIGKILL)
        rows.until(ROWS, holds=none)
        stop(fleet, dsn)
    assert_one_at_once(log, 9_000)


def test_steps_that_suspend_in_a_turn_obey_limits(dsn: str, rows: Rows, log: Path) -> None:
    """The first one shows that its class suspends: the others of the turn start under leases, one by one."""
    short = [Short(f"{number % 400}", 0.0) for number in range(3_000)]
    put(dsn, *short, *(Short(f"{number % 4}", 0.02, suspends=True) for number in range(60)))
    burst(dsn, app="limited:app")
    assert_one_at_once(log, 3_060)


def test_throttled_in_a_turn_stops_its_key(dsn: str, rows: Rows, log: Path) -> None:
    """The other steps of the key in that turn wait as well."""
    short = [Short(f"{number % 400}", 0.0) for number in range(3_000)]
    put(dsn, *short, *(Short("x", 0.0, throttles=True) for _ in range(60)))
    burst(dsn, app="limited:app")
    began = sorted(int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("x "))
    assert len(began) == 61
    assert began[1] - began[0] > 0.45e9


def test_step_without_a_key_is_not_limited(dsn: str, rows: Rows) -> None:
    put(dsn, *(Keyed(None, 0.3) for _ in range(8)))
    burst(dsn, app="limited:app")
    assert rows.value("SELECT count(*) FROM ran AS one JOIN ran AS other ON other.began < one.ended") > 16


def test_rate_is_never_exceeded(dsn: str, rows: Rows) -> None:
    """By the times at which the rows were claimed, which the claims have counted."""
    rows("CREATE TABLE claimed (at timestamptz)")
    rows(
        "CREATE FUNCTION note_claim() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO claimed VALUES (clock_timestamp()); RETURN NULL; END $$"
    )
    rows(
        "CREATE TRIGGER note_claim AFTER UPDATE ON pg_task FOR EACH ROW"
        " WHEN (OLD.locked_by IS NULL AND NEW.locked_by IS NOT NULL AND NEW.wakeup_at = 'infinity')"
        " EXECUTE FUNCTION note_claim()"
    )
    put(dsn, *(Paced(number) for number in range(60)))
    burst(dsn, app="limited:app", procs=2)
    times = [row[0].timestamp() for row in rows("SELECT at FROM claimed ORDER BY at")]
    assert len(times) == 60
    for first, last in itertools.combinations(range(60), 2):
        seconds = times[last] - times[first] + 0.02  # the row counts from a little before the trigger
        assert last - first + 1 <= 40 * seconds + 4 + 1e-6


def test_others_go_on_beside_a_full_key(dsn: str, rows: Rows) -> None:
    put(dsn, *(Keyed("full", 60.0) for _ in range(500)))
    with ready(dsn, "--concurrency", "5", app="limited:app"):
        rows.until("SELECT count(*) FROM pg_task WHERE wakeup_at = 'infinity'", holds=lambda count: count == 500)
        put(dsn, *(Free() for _ in range(50)), *(Keyed("other") for _ in range(50)))
        rows.until(ROWS, holds=lambda count: count == 500)


def test_key_goes_on_after_its_holder_was_killed(dsn: str, rows: Rows) -> None:
    put(dsn, Killer("a"))
    put(dsn, *(Killer("a") for _ in range(3)))
    with ready(dsn, procs=2, app="limited:app") as fleet:
        rows.until(ROWS, holds=none)
        fleet.until("worker.died")
    assert rows.value("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL") == 0
    assert rows.value(RAN) == 5


def test_next_step_waits_for_its_limit_and_leaves_it(dsn: str, rows: Rows) -> None:
    put(dsn, *(Begin(f"{number % 2}") for number in range(40)))
    burst(dsn, app="limited:app", procs=2)
    assert Counter(row[0] for row in rows("SELECT step FROM ran")) == {"Middle": 40, "Free": 40}
    assert max(most_at_once(rows, "Middle").values()) <= 2


def test_strict_order_holds_through_retries(dsn: str, rows: Rows) -> None:
    for number in range(6):
        put(dsn, *(Ordered(key, number, fails=int(number % 3 == 1)) for key in "ab"))
    burst(dsn, app="limited:app", procs=2)
    for key in "ab":
        tries = [int(row[0]) for row in rows("SELECT step FROM ran WHERE key = $1 ORDER BY number", key)]
        assert tries == [0, 1, 1, 2, 3, 4, 4, 5]


def test_parked_step_holds_up_those_behind_it(dsn: str, rows: Rows) -> None:
    put(dsn, Ordered("a", 0, fails=5))
    put(dsn, Ordered("a", 1), Ordered("b", 0))
    with ready(dsn, app="limited:app"):
        rows.until("SELECT count(*) FROM ran WHERE key = 'b'")
        rows.until("SELECT count(*) FROM pg_task WHERE error IS NOT NULL")
        rows("DELETE FROM pg_task WHERE error IS NOT NULL")
        rows.until(ROWS, holds=none)
    assert [row[0] for row in rows("SELECT step FROM ran WHERE key = 'a' ORDER BY number")] == ["0", "0", "1"]


def test_breaker_stops_a_key_and_a_probe_starts_it(dsn: str, rows: Rows) -> None:
    rows("CREATE TABLE down ()")
    put(dsn, *(Fused("a") for _ in range(4)))
    with ready(dsn, "--concurrency", "1", app="limited:app"):
        rows.until("SELECT count(*) FROM pg_task_limit_keys WHERE failures >= 3 AND paused_until > now()")
        before = rows.value(RAN)
        assert before <= 4
        put(dsn, *(Fused("b") for _ in range(1)))
        rows("DROP TABLE down")
        rows.until(ROWS, holds=none)
    began = [row[0] for row in rows("SELECT began FROM ran WHERE key = 'a' ORDER BY number")]
    assert (began[before] - began[before - 1]).total_seconds() > 0.5
    assert rows.value("SELECT failures FROM pg_task_limit_keys WHERE limit_key = 'fused a'") == 0


def test_throttled_pauses_the_key_and_costs_no_try(dsn: str, rows: Rows) -> None:
    rows("CREATE TABLE down ()")
    put(dsn, Told("a"))
    with ready(dsn, app="limited:app") as fleet:
        rows.until("SELECT count(*) FROM pg_task_limit_keys WHERE paused_until > now() + interval '20 seconds'")
        rows("DROP TABLE down")
        put(dsn, *(Told("a") for _ in range(5)))
        put(dsn, Told("b"), Free())
        rows.until("SELECT count(*) FROM ran WHERE key = 'b' OR step = 'Free'", holds=lambda count: count == 2)
        fleet.until("step.throttled")
    assert rows.value("SELECT count(*) FROM ran WHERE key = 'a'") == 1
    assert rows.value("SELECT max(tried) FROM pg_task") == 0


def test_limit_changes_while_workers_run(dsn: str, rows: Rows) -> None:
    with ready(dsn, app="limited:app"):
        rows.until("SELECT count(*) FROM pg_task_limits", holds=lambda count: count >= 5)
        rows("UPDATE pg_task_limits SET concurrency = 0, changed = '{concurrency}' WHERE name = 'keyed'")
        put(dsn, *(Keyed("a") for _ in range(3)), Free())
        rows.until(RAN, holds=lambda count: count == 1)
        rows.until("SELECT count(*) FROM pg_task WHERE wakeup_at = 'infinity'", holds=lambda count: count == 3)
        rows("UPDATE pg_task_limits SET concurrency = 1 WHERE name = 'keyed'")
        rows.until(ROWS, holds=none)
    put(dsn, *(Keyed("a", 0.02) for _ in range(6)))
    burst(dsn, app="limited:app", procs=2)
    assert most_at_once(rows, "Keyed") == {"a": 1}, "the code does not undo what a person has changed"


def test_flood_of_one_key_does_not_hold_up_another(dsn: str, rows: Rows) -> None:
    put(dsn, *(Turn("flood", 0.05) for _ in range(2000)))
    with ready(dsn, "--concurrency", "10", app="limited:app"):
        rows.until("SELECT count(*) FROM ran")
        put(dsn, *(Turn("small") for _ in range(10)))
        rows.until("SELECT count(*) FROM ran WHERE key = 'small'", holds=lambda count: count == 10)
        assert rows.value(LEFT) > 100


def test_key_function_that_raises_fails_the_try(dsn: str, rows: Rows) -> None:
    put(dsn, Broken(0), Broken(1))
    burst(dsn, app="limited:app", code=1)
    assert "ZeroDivisionError" in rows.value("SELECT error FROM pg_task")


def test_worker_that_stops_leaves_nothing_leased(dsn: str, rows: Rows) -> None:
    put(dsn, *(Keyed(f"{number % 3}", 60.0) for number in range(9)))
    with ready(dsn, procs=2, app="limited:app") as fleet:
        rows.until("SELECT count(*) FROM pg_task WHERE locked_by IS NOT NULL", holds=lambda count: count == 6)
        stop(fleet, dsn, signal.SIGQUIT)
    assert rows.value("SELECT count(*) FROM pg_task WHERE locked_by IS NULL AND claims = 0") == 9


# --- what a deploy, a person or another app changes meanwhile


def test_task_whose_key_changes_runs_under_the_new_one(dsn: str, rows: Rows) -> None:
    """It waits for another key than its step has now, as after a deploy."""
    put(dsn, *(Keyed("new") for _ in range(5)))
    rows("UPDATE pg_task SET limit_key = 'gone old', limit_at = wakeup_at, wakeup_at = 'infinity'")
    burst(dsn, app="limited:app")
    assert rows.value(RAN) == 5


def test_tasks_of_a_limit_without_a_row_run(dsn: str, rows: Rows) -> None:
    """Its code is gone, and a person has deleted its row: nothing limits them."""
    put(dsn, *(Free() for _ in range(5)))
    rows("UPDATE pg_task SET limit_key = 'gone ', limit_at = wakeup_at, wakeup_at = 'infinity'")
    burst(dsn, app="limited:app")
    assert rows.value(RAN) == 5


def test_refused_claim_of_a_limit_stops_no_other_work(dsn: str, rows: Rows) -> None:
    rows("ALTER FUNCTION pg_task_claim_limited RENAME TO pg_task_claim_nothing")
    put(dsn, Keyed("a"), Free())
    with ready(dsn, app="limited:app") as fleet:
        fleet.until("limits.refused")
        rows.until(RAN)
        rows("ALTER FUNCTION pg_task_claim_nothing RENAME TO pg_task_claim_limited")
        rows.until(ROWS, holds=none)
        assert not fleet.process.poll()


def test_worker_without_a_right_to_note_works_beside_a_limit(dsn: str, rows: Rows) -> None:
    """A role with the rights of the version before: it has a limit of another app in its table."""
    rows("INSERT INTO pg_task_limits (name, rate, burst) VALUES ('other', 1, 1)")
    put(dsn, Free(), Free())
    rows(
        "UPDATE pg_task SET limit_key = 'other ', limit_at = wakeup_at, wakeup_at = 'infinity'"
        " WHERE id = (SELECT min(id::text)::uuid FROM pg_task)"
    )
    rows("ALTER TABLE pg_task_limit_keys RENAME TO pg_task_limit_other")
    with ready(dsn, app="limited:app") as fleet:
        rows.until(ROWS, holds=lambda count: count == 1)
        fleet.until("limits.refused")
        rows("ALTER TABLE pg_task_limit_other RENAME TO pg_task_limit_keys")
        rows.until(ROWS, holds=none)


def test_burst_ends_beside_what_cannot_start(dsn: str, rows: Rows) -> None:
    """What is behind a parked task, in a paused queue, or of a limit that is stopped."""
    rows("INSERT INTO pg_task_pauses (kind, name) VALUES ('queue', 'paused')")
    put(dsn, Ordered("a", 0, fails=5), Ordered("a", 1))
    put(dsn, Keyed("a"), queue="paused")
    rows(
        "UPDATE pg_task SET limit_key = 'keyed a', limit_at = wakeup_at, wakeup_at = 'infinity' WHERE queue = 'paused'"
    )
    burst(dsn, app="limited:app", code=1)
    assert rows.value(ROWS) == 3
    rows("DELETE FROM pg_task")
    rows("UPDATE pg_task_limits SET concurrency = 0, changed = '{concurrency}' WHERE name = 'keyed'")
    put(dsn, Keyed("a"))
    burst(dsn, app="limited:app")
    assert rows.value(ROWS) == 1


def test_other_rate_is_obeyed_at_once(rows: Rows) -> None:
    rows("INSERT INTO pg_task_limits (name, rate, burst) VALUES ('one', 0.0001, 1)")
    rows("INSERT INTO pg_task_limit_keys (limit_key, next_at) VALUES ('one a', now() + interval '10000 seconds')")
    rows("UPDATE pg_task_limits SET rate = 100")
    assert rows.value("SELECT extract(epoch FROM next_at - now())::float8 FROM pg_task_limit_keys") < 1
