"""The claim of a limit: what each rule of a limit allows, for rows that wait for it."""

from __future__ import annotations

from collections import Counter
from typing import Any
from uuid import UUID, uuid4

import pytest
from fix_database import run
from fleet import Rows
from sessions import connected

pytestmark = pytest.mark.timeout(60)

CLAIM = "SELECT * FROM pg_task_claim_limited($1, $2, $3, $4, $5, 60, 100000, $6, $7, $8, $9, $10)"
WAIT = """
INSERT INTO pg_task (step, limit_key, limit_at, wakeup_at, priority, queue, limit_cost)
SELECT $1, $2, now() + make_interval(secs => $4 + n / 1e6), 'infinity', $5, $6, $7
FROM generate_series(1, $3) AS n
"""


def limit(rows: Rows, name: str = "one", **columns: Any) -> None:
    names = ["name", *columns]
    values = ", ".join(f"${at}" for at in range(1, len(names) + 1))
    rows(f"INSERT INTO pg_task_limits ({', '.join(names)}) VALUES ({values})", name, *columns.values())


def wait(
    rows: Rows,
    key: str = "",
    count: int = 1,
    *,
    after: float = -1,
    priority: int = 0,
    queue: str = "default",
    limit: str = "one",
    cost: float | None = None,
) -> None:
    rows(WAIT, '{"Task":{"Step":null}}', f"{limit} {key}", count, float(after), priority, queue, cost)


class Claimed:
    """The answer of a claim: `keys` of the leased tasks, and the first row."""

    def __init__(self, answer: list[Any], token: UUID, prefix: str) -> None:
        first, *rows = answer
        assert first["id"] is None
        self.after, self.is_busy, self.full, self.due = first["step"], first["tried"], first["claims"], first["due"]
        self.ids = [row["id"] for row in rows]
        self.keys = [row["limit_key"].removeprefix(prefix) for row in rows]
        self.counts = Counter(self.keys)
        self.token = token
        self.failures = [row["failures"] for row in rows]

    def __len__(self) -> int:
        return len(self.ids)


def claim(
    rows: Rows,
    most: int = 100,
    *,
    name: str = "one",
    served: list[str] | None = None,
    skipped: tuple[str, ...] = (),
    others: str | None = None,
    suspects: bool = True,
    first: tuple[str, ...] = (),
    after: str | None = None,
    reads: int = 300,
) -> Claimed:
    token = uuid4()
    answer = rows(
        CLAIM,
        name,
        served,
        list(skipped),
        most,
        token,
        others,
        suspects,
        [f"{name} {key}" for key in first],
        after,
        reads,
    )
    return Claimed(answer, token, f"{name} ")


def end(rows: Rows, claimed: Claimed, count: int | None = None) -> None:
    rows("DELETE FROM pg_task WHERE id = ANY ($1)", claimed.ids[:count])


# --- concurrency


def test_each_key_has_its_places(rows: Rows) -> None:
    limit(rows, concurrency=2)
    for key in "abc":
        wait(rows, key, 5)
    first = claim(rows)
    assert first.counts == {"a": 2, "b": 2, "c": 2}
    again = claim(rows)
    assert len(again) == 0
    assert again.full == 3
    end(rows, first, 1)
    assert claim(rows).keys == [first.keys[0]]


def test_lease_that_ends_in_any_way_frees_its_place(rows: Rows) -> None:
    limit(rows, concurrency=1)
    wait(rows, "a", 9)
    for change in (
        "locked_by = NULL, lock_expires_at = NULL, wakeup_at = now() + interval '1 hour'",
        "locked_by = NULL, lock_expires_at = NULL, error = 'no'",
        "locked_by = NULL, lock_expires_at = NULL, wakeup_at = now(), limit_key = NULL",
        "wakeup_at = now()",
    ):
        claimed = claim(rows)
        assert len(claimed) == 1
        assert len(claim(rows)) == 0
        rows(f"UPDATE pg_task SET {change} WHERE id = $1", claimed.ids[0])
    released = claim(rows)
    rows("UPDATE pg_task SET locked_by = NULL, lock_expires_at = NULL WHERE id = $1", released.ids[0])
    assert claim(rows).ids == released.ids, "it waits for its limit again"


def test_claims_of_two_sessions_share_the_places(dsn: str, rows: Rows) -> None:
    """The second one begins while the first is not committed."""
    limit(rows, concurrency=3)
    wait(rows, "a", 9)

    async def main() -> None:
        async with connected(dsn) as one, connected(dsn) as two:
            args: tuple[Any, ...] = ("one", None, [], 100, uuid4(), None, True, [], None, 300)
            async with one.transaction():
                assert len(await one.fetch(CLAIM, *args)) == 4
                (busy,) = await two.fetch(CLAIM, *args)
                assert busy["tried"] == 1
            (full,) = await two.fetch(CLAIM, *args)
            assert (full["tried"], full["claims"]) == (0, 1)

    run(main())


def test_row_that_another_session_has_locked_is_skipped(dsn: str, rows: Rows) -> None:
    limit(rows, concurrency=5)
    wait(rows, "a", 3)

    async def main() -> None:
        async with connected(dsn) as other, other.transaction():
            await other.execute("SELECT FROM pg_task ORDER BY limit_at LIMIT 1 FOR UPDATE")
            async with connected(dsn) as one:
                rows = await one.fetch(CLAIM, "one", None, [], 100, uuid4(), None, True, [], None, 300)
                assert len(rows) == 3

    run(main())


# --- which tasks


def test_claim_takes_the_highest_priority_then_the_oldest(rows: Rows) -> None:
    limit(rows, concurrency=2)
    wait(rows, "a", after=-5)
    wait(rows, "a", after=-9)
    wait(rows, "a", after=-1, priority=3)
    ids = [row[0] for row in rows("SELECT id FROM pg_task ORDER BY priority DESC, limit_at")]
    assert set(claim(rows).ids) == set(ids[:2])


def test_claim_obeys_queues_pauses_apps_and_suspicion(rows: Rows) -> None:
    limit(rows, concurrency=9)
    wait(rows, "a", 2, queue="left")
    wait(rows, "b", 2, queue="right")
    assert claim(rows, served=["right"], skipped=("right",)).keys == []
    assert claim(rows, others='^{"Task"').keys == []
    rows("UPDATE pg_task SET claims = 1 WHERE queue = 'left'")
    assert claim(rows, suspects=False).counts == {"b": 2}
    assert claim(rows, served=["left"]).counts == {"a": 2}


def test_tasks_of_later_and_of_other_limits_wait(rows: Rows) -> None:
    limit(rows, concurrency=9)
    limit(rows, "one-more", concurrency=9)
    wait(rows, "a", after=5)
    wait(rows, "b", after=9, priority=5)
    wait(rows, "a", limit="one-more")
    claimed = claim(rows)
    assert len(claimed) == 0
    assert 3 < claimed.due <= 5
    assert claim(rows, name="one-more").keys == ["a"]


def test_later_task_of_a_lane_waits_behind_a_due_one(rows: Rows) -> None:
    limit(rows, concurrency=9)
    wait(rows, "a")
    wait(rows, "a", after=60)
    assert len(claim(rows)) == 1


def test_limit_whose_row_is_gone_limits_nothing(rows: Rows) -> None:
    wait(rows, "a", 5)
    assert len(claim(rows)) == 5


def test_walk_goes_on_behind_its_last_key(rows: Rows) -> None:
    limit(rows, concurrency=1)
    for number in range(7):
        wait(rows, f"{number}", 2)
    first = claim(rows, reads=3)
    assert (sorted(first.keys), first.after) == (["0", "1", "2"], "one 2")
    second = claim(rows, reads=3, after=first.after, first=("0", "6"))
    assert (sorted(second.keys), second.after) == (["3", "4", "5", "6"], "one 5")
    third = claim(rows, reads=3, after=second.after)
    assert (third.keys, third.after) == ([], None)


# --- rates and costs


def test_rate_gives_its_burst_then_the_next_start(rows: Rows) -> None:
    """One start in 100 seconds: this test is faster than that on any machine."""
    limit(rows, rate=0.01, burst=4.0)
    wait(rows, "a", 20)
    wait(rows, "b", 1)
    claimed = claim(rows)
    assert claimed.counts == {"a": 4, "b": 1}
    after = claim(rows)
    assert len(after) == 0
    assert 0 < after.due <= 100, "not before then"
    for seconds, starts in ((250.0, 2), (60.0, 1), (99999.0, 4)):
        rows("UPDATE pg_task_limit_keys SET next_at = next_at - make_interval(secs => $1)", seconds)
        assert len(claim(rows)) == starts


def test_cost_may_run_into_debt_once(rows: Rows) -> None:
    limit(rows, cost_rate=100.0, cost_burst=50.0, cost_of="tokens")
    wait(rows, "a", 1, cost=1000.0)
    assert len(claim(rows)) == 1, "or a large task would never start"
    wait(rows, "a", 1, cost=1.0)
    assert 9 < claim(rows).due < 10
    rows("UPDATE pg_task_limit_keys SET cost_next_at = cost_next_at - interval '10 seconds'")
    assert len(claim(rows)) == 1


def test_charge_and_refund_move_the_cost(rows: Rows) -> None:
    limit(rows, cost_rate=10.0, cost_burst=10.0, cost_of="tokens")
    charge = (
        "SELECT pg_task_note_limits(ARRAY['one a'], ARRAY[0], ARRAY[false], ARRAY[NULL::float8], ARRAY[$1::float8])"
    )
    rows(charge, 100.0)
    wait(rows, "a", 1)
    assert 8 < claim(rows).due <= 10
    rows(charge, -95.0)
    assert len(claim(rows)) == 1


# --- pauses of a key


def test_paused_key_and_paused_limit_wait(rows: Rows) -> None:
    limit(rows, concurrency=9)
    wait(rows, "a")
    wait(rows, "b")
    rows("SELECT pg_task_note_limits(ARRAY['one a'], ARRAY[0], ARRAY[false], ARRAY[30.0], ARRAY[NULL::float8])")
    claimed = claim(rows)
    assert claimed.keys == ["b"]
    assert 29 < claimed.due <= 30
    wait(rows, "b")
    rows("UPDATE pg_task_limits SET paused_until = now() + interval '1 hour'")
    assert len(claim(rows)) == 0


NOTE = "SELECT pg_task_note_limits('{one a}', ARRAY[$1::integer], ARRAY[$2::boolean], '{NULL}', '{NULL}')"


def test_breaker_opens_probes_and_closes(rows: Rows) -> None:
    limit(rows, failures=3, pause=30.0)
    wait(rows, "a", 9)
    wait(rows, "b", 2)
    rows(NOTE, 2, False)
    first = claim(rows, 4)
    assert len(first) == 4
    end(rows, first)
    rows(NOTE, 1, False)
    opened = claim(rows)
    assert "a" not in opened.keys
    assert 29 < opened.due <= 30
    elapse = "UPDATE pg_task_limit_keys SET paused_until = paused_until - interval '31 seconds'"
    rows(elapse)
    probe = claim(rows)
    assert len(probe) == 1, "one probe"
    assert probe.failures == [3]
    assert len(claim(rows)) == 0
    rows(NOTE, 1, False)
    end(rows, probe)
    assert len(claim(rows)) == 0, "it opens again"
    rows(elapse)
    second = claim(rows)
    assert len(second) == 1
    rows(NOTE, 0, True)
    end(rows, second)
    assert len(claim(rows)) > 1, "closed"


def test_success_ends_the_row_of_failures(rows: Rows) -> None:
    limit(rows, failures=3, pause=30.0)
    for _ in range(5):
        rows(NOTE, 2, False)
        rows(NOTE, 0, True)
    wait(rows, "a", 2)
    assert len(claim(rows)) == 2


# --- turns


def test_keys_take_turns(rows: Rows) -> None:
    limit(rows, is_shared=True)
    wait(rows, "a", 1000)
    for key in "bcde":
        wait(rows, key, 30)
    counts = claim(rows, 50).counts
    assert set(counts) == set("abcde")
    assert max(counts.values()) - min(counts.values()) <= 1


def test_weights_divide_the_turns(rows: Rows) -> None:
    limit(rows, is_shared=True, weights='{"a": 3, "b": 1}')
    wait(rows, "a", 1000)
    wait(rows, "b", 1000)
    counts = claim(rows, 400).counts
    assert abs(counts["a"] - 300) <= 2


def test_turns_hold_from_claim_to_claim(rows: Rows) -> None:
    limit(rows, is_shared=True, weights='{"a": 3}')
    for key in "abc":
        wait(rows, key, 100)
    counts = Counter(claim(rows, 1).keys[0] for _ in range(25))
    assert abs(counts["a"] - 15) <= 1
    assert abs(counts["b"] - 5) <= 1
    wait(rows, "new", 100)
    counts = Counter(claim(rows, 1).keys[0] for _ in range(12))
    assert 1 <= counts["new"] <= 3, "it has no turns saved up"


def test_oldest_comes_first_where_keys_do_not_take_turns(rows: Rows) -> None:
    limit(rows, concurrency=5)
    wait(rows, "a", after=-5)
    wait(rows, "b", after=-9)
    wait(rows, "c", after=-7)
    assert [claim(rows, 1).keys[0] for _ in range(3)] == ["b", "c", "a"]


def test_one_key_alone_has_all_turns(rows: Rows) -> None:
    limit(rows, is_shared=True)
    wait(rows, "a", 1000)
    assert len(claim(rows, 400)) == 400


def test_strict_order_waits_for_a_retry_and_a_parked_one(rows: Rows) -> None:
    limit(rows, concurrency=1, is_strict=True)
    wait(rows, "a", 3)
    first = claim(rows)
    free = "locked_by = NULL, lock_expires_at = NULL"
    rows(f"UPDATE pg_task SET {free}, wakeup_at = now() + interval '1 hour' WHERE id = $1", first.ids[0])
    assert len(claim(rows)) == 0
    rows("UPDATE pg_task SET wakeup_at = now(), error = 'no' WHERE id = $1", first.ids[0])
    assert len(claim(rows)) == 0
    end(rows, first)
    assert len(claim(rows)) == 1


def test_strict_order_does_not_pass_what_this_worker_leaves_out(rows: Rows) -> None:
    limit(rows, concurrency=1, is_strict=True)
    wait(rows, "a", after=-9)
    wait(rows, "a", after=-5, queue="other", priority=9)
    assert claim(rows, served=["other"]).keys == []
    rows("UPDATE pg_task SET claims = 1 WHERE queue = 'default'")
    assert claim(rows, suspects=False).keys == []
    assert len(claim(rows)) == 1
    assert rows.value("SELECT queue FROM pg_task WHERE locked_by IS NOT NULL") == "default"


def test_tasks_of_another_queue_cost_nothing(rows: Rows) -> None:
    """By the blocks that a claim reads."""
    limit(rows, concurrency=1)
    wait(rows, "a", 20_000, queue="other")
    wait(rows, "a", 1, queue="served")
    rows("VACUUM ANALYZE pg_task")
    reads = "SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes WHERE indexrelname = 'pg_task_limited_idx'"
    before = rows.value(reads) or 0
    assert claim(rows, served=["served"]).keys == ["a"]
    assert (rows.value(reads) or 0) - before < 100


# --- turns, which run short steps while a transaction has their keys locked


HOLD = "SELECT pg_task_hold_limits($1)"


def test_turn_has_its_keys_for_itself(dsn: str, rows: Rows) -> None:
    limit(rows, concurrency=2)
    wait(rows, "a", 5)

    async def hold() -> None:
        async with connected(dsn) as one, connected(dsn) as other:
            turn = one.transaction()
            await turn.start()
            assert await one.fetchval(HOLD, ["one a", "one b"]) == [2, 2]
            async with other.transaction():
                assert await other.fetchval(HOLD, ["one a", "one c"]) == [0, 2]
            assert (await other.fetch(CLAIM, "one", None, [], 9, uuid4(), None, True, [], None, 300))[0]["claims"] == 1
            # A step that goes on after the turn has its lease by then.
            await one.execute(
                "UPDATE pg_task SET locked_by = $1, lock_expires_at = now() + interval '1 minute'"
                " WHERE id = (SELECT id FROM pg_task LIMIT 1)",
                uuid4(),
            )
            await turn.commit()
            assert await other.fetchval(HOLD, ["one a", "one c"]) == [1, 2]

    run(hold())
    assert claim(rows).counts == {"a": 1}
    assert rows.value(HOLD, ["one a"]) == [-1], "it is full"


@pytest.mark.parametrize(
    "columns",
    [{"rate": 9.0, "burst": 1.0}, {"cost_rate": 9.0, "cost_burst": 1.0}, {"is_shared": True}, {"is_strict": True}],
)
def test_turn_leaves_to_claims_what_needs_an_account(rows: Rows, columns: dict[str, Any]) -> None:
    limit(rows, concurrency=1, **columns)
    assert rows.value(HOLD, ["one a", "unknown a"]) == [-1, -1]


def test_turn_obeys_pauses_and_failures(rows: Rows) -> None:
    limit(rows, failures=3, pause=60.0)
    rows("INSERT INTO pg_task_limit_keys (limit_key, failures) VALUES ('one failing', 1)")
    rows("INSERT INTO pg_task_limit_keys (limit_key, paused_until) VALUES ('one paused', now() + interval '1 minute')")
    rows("INSERT INTO pg_task_limit_keys (limit_key, paused_until) VALUES ('one over', now() - interval '1 minute')")
    keys = [f"one {key}" for key in ("failing", "paused", "over", "new")]
    assert rows.value(HOLD, keys) == [-1, -1, 1_000_000, 1_000_000]
    rows("UPDATE pg_task_limits SET paused_until = now() + interval '1 minute'")
    assert rows.value(HOLD, keys) == [-1, -1, -1, -1]
