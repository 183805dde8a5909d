"""Two apps on one table: each worker skips the tasks of the other one, at a bounded cost."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from claim_kit import wait_of
from fix_database import run
from fleet import Fleet, Rows, working

from pgtask import Client
from pgtask._postgres.store import Link
from pgtask._worker import claim as claim_module
from pgtask._worker import foreign as foreign_module
from pgtask._worker.claim import Claim
from pgtask._worker.foreign import pattern_of

pytestmark = pytest.mark.timeout(120)

APP = """
import asyncio
from pathlib import Path
from pgtask import App, Context, Done, Task

class NAME(Task): pass

class Step(NAME):
    number: int = 0
    async def run(self, ctx: Context) -> Done:
        return Done()

class Wait(NAME):
    path: str
    async def run(self, ctx: Context) -> Done:
        while not Path(self.path).exists():
            await asyncio.sleep(0.02)
        return Done()

app = App(NAME)
"""


@pytest.fixture(autouse=True)
def apps_of_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the modules web and ml to the working directory of the supervisor."""
    for name in ("Web", "Ml"):
        (tmp_path / f"{name.lower()}.py").write_text(APP.replace("NAME", name))
    monkeypatch.chdir(tmp_path)


def insert(rows: Rows, family: str, count: int, step: str = "Step", seconds: float = 0.0, **fields: Any) -> None:
    """Tasks of one moment, due in so many seconds."""
    rows(
        "INSERT INTO pg_task (step, wakeup_at, queue, priority)"
        " SELECT $1, now() + make_interval(secs => $2), $3, $4 FROM generate_series(1, $5)",
        f'{{"{family}":{{"{step}":{{}}}}}}',
        seconds,
        fields.get("queue", "default"),
        fields.get("priority", 0),
        count,
    )


def left(rows: Rows, family: str) -> None:
    rows.until("SELECT count(*) = 0 FROM pg_task WHERE step LIKE $1", f'%"{family}"%')


# --- whose is it --------------------------------------------------------------------------------------------------

OURS = ["Web", "Web.api", "Größe", "a/b", 'quo"ted', "back\\slash", "smile 😀"]


@pytest.mark.parametrize(
    ("envelope", "is_foreign"),
    [
        ('{"Web":{"Step":{}}}', False),
        (' \t\r\n{ \n "Web" : { "Step" : null } }', False),
        ('{"\\u0057eb":{"Step":{}}}', False),
        ('{"\\u0057\\u0065\\u0062":{"Step":{}}}', False),
        ('{"Web.api":{"Step":{}}}', False),
        ('{"Größe":{"Step":{}}}', False),
        ('{"Gr\\u00F6\\u00dfe":{"Step":{}}}', False),
        ('{"a/b":{"Step":{}}}', False),
        ('{"a\\/b":{"Step":{}}}', False),
        ('{"quo\\"ted":{"Step":{}}}', False),
        ('{"back\\\\slash":{"Step":{}}}', False),
        ('{"smile 😀":{"Step":{}}}', False),
        ('{"smile \\ud83d\\uDE00":{"Step":{}}}', False),
        ("[]", False),
        ("no JSON", False),
        ("", False),
        ('{"Ml":null}', False),
        ('{"Ml', False),
        (" " * 5000 + '{"Ml":{"Step":{}}}', False),
        ('{"Ml":{"Step":{}}}', True),
        ('{"Website":{"Step":{}}}', True),
        ('{"We":{"Step":{}}}', True),
        ('{"web":{"Step":{}}}', True),
        ('{"WebXapi":{"Step":{}}}', True),
        (' { "Ml" : { "Web" : {} } }', True),
        ('{"M\\u006c":{"Step":{}}}', True),
        ('{"Ml \\"Web\\"":{"Step":{}}}', True),
        ('{"":{"Step":{}}}', True),
    ],
)
def test_family_is_known_in_any_json_spelling(rows: Rows, envelope: str, is_foreign: bool) -> None:
    assert rows.value("SELECT left($1, 2000) ~ $2", envelope, pattern_of(OURS)) is is_foreign


# --- the claims of one worker -------------------------------------------------------------------------------------


@asynccontextmanager
async def claiming(dsn: str) -> AsyncIterator[Claim]:
    link = Link(dsn, "claimer")
    try:
        yield Claim(
            link,
            worker=bytes(8),
            queues=(),
            lease_timeout=60.0,
            max_step_bytes=1000,
            min_poll=1.0,
            max_poll=30.0,
            families=["Web"],
        )
    finally:
        await link.close()


def play(dsn: str, scenario: Callable[[Claim], Awaitable[None]]) -> None:
    async def main() -> None:
        async with claiming(dsn) as claim:
            await scenario(claim)

    run(main())


async def meet(dsn: str, claim: Claim, count: int = 1) -> None:
    """Claim foreign tasks, and give them back."""
    rows, token, _ = await claim.claim_batch(count)
    assert len(rows) == count
    claim.skip_foreign(token)
    db = await asyncpg.connect(dsn)
    await db.execute("UPDATE pg_task SET locked_by = NULL, lock_expires_at = NULL, claims = 0")
    await db.close()


async def claimed(claim: Claim, limit: int = 100) -> list[str]:
    """The steps of the next claims, until one brings nothing."""
    steps: list[str] = []
    claim.poll_soon()
    claim.next_poll = 0.0
    while True:
        rows, _, _ = await claim.claim_batch(limit)
        if not rows:
            return steps
        steps += [row[1] for row in rows]


def test_lane_with_foreign_tasks_is_claimed_around_them(dsn: str, rows: Rows) -> None:
    insert(rows, "Ml", 10)
    insert(rows, "Web", 5)
    insert(rows, "Ml", 10)
    rows("INSERT INTO pg_task (step) VALUES ('garbage')")

    async def scenario(claim: Claim) -> None:
        await meet(dsn, claim, 10)
        steps = await claimed(claim)
        assert sorted(steps) == ["garbage"] + ['{"Web":{"Step":{}}}'] * 5

    play(dsn, scenario)
    assert rows.value("SELECT count(*) FROM pg_task WHERE locked_by IS NULL AND claims = 0") == 20


def test_lane_without_foreign_tasks_is_claimed_as_before(dsn: str, rows: Rows) -> None:
    insert(rows, "Ml", 1, priority=5)
    insert(rows, "Ml", 1)

    async def scenario(claim: Claim) -> None:
        await meet(dsn, claim)
        assert claim.foreign is not None
        assert claim.foreign.is_mixed("default", 5)
        assert not claim.foreign.is_mixed("default", 0)
        assert len(await claimed(claim)) == 1

    play(dsn, scenario)


@pytest.mark.parametrize("one_moment", [True, False])
def test_own_task_is_found_behind_many_foreign_ones(
    dsn: str, rows: Rows, monkeypatch: pytest.MonkeyPatch, one_moment: bool
) -> None:
    monkeypatch.setattr(foreign_module, "READ_LIMIT", 50)
    monkeypatch.setattr(claim_module, "READ_LIMIT", 50)
    for _ in range(1 if one_moment else 20):
        insert(rows, "Ml", 1000 if one_moment else 50)
    insert(rows, "Web", 1)

    async def scenario(claim: Claim) -> None:
        await meet(dsn, claim)
        assert len(await claimed(claim)) == 1
        insert_later = 'INSERT INTO pg_task (step) VALUES (\'{"Web":{"Step":{}}}\')'
        db = await asyncpg.connect(dsn)
        await db.execute(insert_later)
        before = claim._link.statements
        assert len(await claimed(claim)) == 1
        assert claim._link.statements - before < 20, "what lies before is not read again"
        await db.close()

    play(dsn, scenario)


def test_task_released_with_an_old_time_is_found(dsn: str, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_module, "SEARCH_SHARE", 0)
    insert(rows, "Ml", 500)

    async def scenario(claim: Claim) -> None:
        await meet(dsn, claim)
        assert await claimed(claim) == []
        db = await asyncpg.connect(dsn)
        await db.execute(
            "INSERT INTO pg_task (step, wakeup_at) VALUES ('{\"Web\":{\"Step\":{}}}', now() - interval '1 h')"
        )
        assert len(await claimed(claim)) == 1
        await db.close()

    play(dsn, scenario)


def test_polls_of_foreign_tasks_only_get_rarer(dsn: str, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_module, "SEARCH_SHARE", 0)
    insert(rows, "Ml", 20)

    async def scenario(claim: Claim) -> None:
        await meet(dsn, claim)
        waits = []
        for _ in range(6):
            claim.next_poll = 0.0
            assert (await claim.claim_batch(100))[0] == []
            assert not claim.may_find_tasks
            assert claim.next_due is None, "nothing of this app's is due"
            waits.append(wait_of(claim))
        assert waits[0] > 0.5
        assert waits[-1] > 20
        claim.poll_soon()
        assert claim.next_poll - time.monotonic() < 1, "a notification wakes it all the same"

    play(dsn, scenario)


def test_own_future_task_behind_foreign_ones_is_polled(dsn: str, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_module, "SEARCH_SHARE", 0)
    insert(rows, "Ml", 20)
    insert(rows, "Ml", 20, seconds=100)
    insert(rows, "Web", 1, seconds=12)

    async def scenario(claim: Claim) -> None:
        await meet(dsn, claim)
        for _ in range(8):
            claim.next_poll = 0.0
            assert (await claim.claim_batch(100))[0] == []
            assert claim.next_due is not None
            assert claim.next_due - time.monotonic() < 12.5
        assert 5 < claim.next_poll - time.monotonic() < 12.5

    play(dsn, scenario)


def test_search_stops_after_a_tenth_of_a_second(dsn: str, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that has not ended continues, and finds its task."""
    monkeypatch.setattr(foreign_module, "READ_LIMIT", 10)
    monkeypatch.setattr(foreign_module, "MAX_SEARCH_TIME", 0.0)
    for _ in range(10):
        insert(rows, "Ml", 10)
    insert(rows, "Web", 1)

    async def scenario(claim: Claim) -> None:
        await meet(dsn, claim)
        for attempt in range(30):
            claim.next_poll = min(claim.next_poll, 0.0)
            if (await claim.claim_batch(100))[0]:
                assert attempt > 3
                return
            assert claim.next_poll - time.monotonic() < 1.0, "it goes on soon"
        raise AssertionError("not found")

    play(dsn, scenario)


@contextmanager
def two_apps(dsn: str) -> Iterator[tuple[Fleet, Fleet]]:
    with Fleet(dsn, procs=2, app="web:app") as web, Fleet(dsn, procs=2, app="ml:app") as ml:
        for fleet in (web, ml):
            fleet.until("worker.ready", times=2)
        yield web, ml
        for fleet in (web, ml):
            fleet.send(signal.SIGTERM)
            assert fleet.ends() == 0, fleet.output


# --- whole fleets -------------------------------------------------------------------------------------------------


def test_two_apps_on_one_table_do_not_delay_each_other(dsn: str, rows: Rows) -> None:
    with two_apps(dsn) as (web, ml):
        for _ in range(10):
            insert(rows, "Web", 3)
            insert(rows, "Ml", 3)
        rows.until("SELECT count(*) = 0 FROM pg_task", timeout=20)
        for fleet in (web, ml):
            assert fleet.output.count("task.foreign") <= 2, "once for each worker"
        assert "task.foreign" in web.output + ml.output
        assert "--queue" in web.output + ml.output
        assert "step.unknown" not in web.output + ml.output


def test_foreign_task_is_left_unchanged(dsn: str, rows: Rows) -> None:
    insert(rows, "Ml", 300, seconds=-100)
    before = rows("SELECT id, wakeup_at FROM pg_task ORDER BY id")
    with working(dsn, app="web:app") as fleet:
        insert(rows, "Web", 50)
        left(rows, "Web")
        fleet.until("task.foreign")
    assert rows("SELECT id, wakeup_at FROM pg_task WHERE claims = 0 AND tried = 0 ORDER BY id") == before


def test_workers_of_two_apps_do_not_wake_each_other(dsn: str, rows: Rows) -> None:
    with two_apps(dsn) as (web, ml):
        insert(rows, "Nobody", 100)
        web.until("task.foreign", times=2)
        ml.until("task.foreign", times=2)
        commits = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        rows("SELECT pg_sleep(2.5)")
        began, before = time.monotonic(), rows.value(commits)
        rows("SELECT pg_sleep(3)")
        after = rows.value(commits)
        assert (after - before) / (time.monotonic() - began) < 20


def test_burst_ends_despite_foreign_tasks(dsn: str, rows: Rows, tmp_path: Path) -> None:
    with working(dsn, app="ml:app"):
        rows(
            "INSERT INTO pg_task (step) SELECT $1 FROM generate_series(1, 5)",
            f'{{"Ml":{{"Wait":{{"path":"{tmp_path}/go"}}}}}}',
        )
        rows.until("SELECT count(*) = 5 FROM pg_task WHERE locked_by IS NOT NULL")
        rows("""INSERT INTO pg_task (step, error) VALUES ('{"Ml":{"Step":{}}}', 'parked by another')""")
        insert(rows, "Nobody", 10)
        insert(rows, "Web", 200)
        with Fleet(dsn, "--burst", procs=2, app="web:app") as burst:
            assert burst.ends() == 0, burst.output
        assert rows.value("SELECT count(*) FROM pg_task") == 16
        (tmp_path / "go").touch()


def test_burst_waits_for_own_task_behind_foreign_ones(dsn: str, rows: Rows) -> None:
    insert(rows, "Ml", 50)
    insert(rows, "Web", 1, seconds=2)
    with Fleet(dsn, "--burst", "--burst-horizon", "30", app="web:app") as burst:
        assert burst.ends() == 0, burst.output
    assert rows.value("SELECT count(*) FROM pg_task WHERE step LIKE '%Web%'") == 0


def test_unknown_tasks_are_parked_on_request(dsn: str, rows: Rows) -> None:
    insert(rows, "Ml", 3)
    with Fleet(dsn, "--burst", "--unknown", "park", app="web:app") as burst:
        assert burst.ends() == 1
    assert rows.value("SELECT count(*) FROM pg_task WHERE error LIKE 'unknown step Ml.Step%'") == 3


def test_unknown_step_of_known_family_is_put_back(dsn: str, rows: Rows) -> None:
    insert(rows, "Web", 1, step="Later")
    with working(dsn, app="web:app") as fleet:
        assert "hint=" in fleet.until("step.unknown step=Web.Later")
        rows.until("SELECT count(*) = 1 FROM pg_task WHERE locked_by IS NULL AND wakeup_at > now() + interval '10 s'")


def test_consumer_takes_any_task_of_its_queue(dsn: str, rows: Rows) -> None:
    """It has asked for that queue by name; a worker without --queue leaves those tasks alone."""
    insert(rows, "Elsewhere", 20, queue="consumed")

    async def consume() -> int:
        async with Client(dsn) as client, client.consumer("consumed") as consumer:
            return len(await consumer.claim(limit=100))

    with working(dsn, app="web:app") as fleet:
        fleet.until("task.foreign")
        rows.until("SELECT count(*) = 20 FROM pg_task WHERE locked_by IS NULL AND claims = 0")
        assert run(consume()) == 20


def test_removed_future_task_is_no_longer_expected(dsn: str, rows: Rows) -> None:
    """It does not poll again and again for a task that was due."""
    insert(rows, "Ml", 20)
    insert(rows, "Web", 1, seconds=0.5)

    async def scenario(claim: Claim) -> None:
        await meet(dsn, claim)
        db = await asyncpg.connect(dsn)
        claim.next_poll = 0.0
        assert (await claim.claim_batch(100))[0] == []
        assert claim.foreign is not None
        for passed in claim.foreign._lanes.values():
            passed.again_at = float("inf")  # no search from the first task on
        await db.execute("DELETE FROM pg_task WHERE step LIKE '%Web%'")
        await db.fetch("SELECT pg_sleep(0.6)")
        for _ in range(3):
            claim.next_poll = 0.0
            assert (await claim.claim_batch(100))[0] == []
            assert wait_of(claim) > 0.05
        await db.close()

    play(dsn, scenario)
