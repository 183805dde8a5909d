"""sleep: which workers a write notifies, and no order of events in which a sleeping worker misses a task."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
import uvloop
from fix_database import execute, fresh_database, memory, run
from fleet import Rows, ready
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schema_kit import payloads, play, with_path
from sessions import connected, until

from pgtask._postgres import embedded
from pgtask._postgres.migrate import migrate
from pgtask._postgres.store import statement
from pgtask._worker import sleep as module
from pgtask._worker.sleep import Sleep
from pgtask._worker.wake import Wake

INSERT = "INSERT INTO pg_task (step, queue) VALUES ('{}', 'mail')"
NONE_ASLEEP = "SELECT NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock')"


async def table_oid(db: Any) -> int:
    oid: int = await db.fetchval(statement("table_oid"))
    return oid


# --- which sleepers a write notifies


@pytest.mark.parametrize(
    ("sleeps", "told"),
    [(None, []), ([], ["mail"]), (["mail"], ["mail"]), (["other"], []), (["other", "mail"], ["mail"])],
    ids=str,
)
def test_write_notifies_only_sleepers_of_its_queue(dsn: str, sleeps: list[str] | None, told: list[str]) -> None:
    async def scenario(db: Any) -> None:
        oid = await table_oid(db)
        for write in (INSERT, "UPDATE pg_task SET tried = 1"):
            found = await payloads(dsn, lambda write=write: db.execute(write), sleeps=sleeps)  # type: ignore[misc]
            assert found == [f"{oid} {queue}" for queue in told]

    play(dsn, scenario)


def test_statement_notifies_once_a_queue(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        oid = await table_oid(db)
        queues = "SELECT '{}', q FROM unnest(ARRAY['a', 'b', repeat('c', 5000), 'a']) AS q"
        found = await payloads(dsn, lambda: db.execute(f"INSERT INTO pg_task (step, queue) {queues}"), sleeps=[])
        assert sorted(found) == ["", f"{oid} a", f"{oid} b"], "a payload has a bound"
        queues = "SELECT '{}', n FROM generate_series(1, 300) AS n"
        assert await payloads(dsn, lambda: db.execute(f"INSERT INTO pg_task (step, queue) {queues}"), sleeps=[]) == [""]

    play(dsn, scenario)


@pytest.mark.parametrize("isolation", ["read_committed", "repeatable_read", "serializable"])
def test_sleeper_of_now_counts_in_every_isolation_level(dsn: str, isolation: str) -> None:
    """The snapshot of the writer is older than the sleep."""

    async def scenario(db: Any) -> None:
        async with connected(dsn) as writer:
            transaction = writer.transaction(isolation=isolation)
            await transaction.start()
            await writer.fetchval("SELECT count(*) FROM pg_task")

            async def write() -> None:
                await writer.execute(INSERT)
                await transaction.commit()

            assert len(await payloads(dsn, write, sleeps=["mail"])) == 1

    play(dsn, scenario)


def test_sleeper_of_another_schema_does_not_count(empty_dsn: str) -> None:
    async def scenario(db: Any) -> None:
        await db.execute("CREATE SCHEMA one; CREATE SCHEMA two")
        one, two = (with_path(empty_dsn, schema) for schema in ("one", "two"))
        await migrate(one)
        await migrate(two)
        for schema, told in (("one", 1), ("two", 0)):
            insert = f"INSERT INTO {schema}.pg_task (step) VALUES ('{{}}')"
            assert len(await payloads(one, lambda insert=insert: db.execute(insert), sleeps=[])) == told  # type: ignore[misc]

    play(empty_dsn, scenario)


def test_dead_sleeper_is_forgotten(dsn: str) -> None:
    async def scenario(db: Any) -> None:
        async with connected(dsn) as sleeper:
            await sleeper.fetch(statement("sleep"), ["mail"])
            assert len(await payloads(dsn, lambda: db.execute(INSERT))) == 1
            await db.execute("SELECT pg_terminate_backend($1)", sleeper.get_server_pid())
            await until(db, NONE_ASLEEP)
            assert await payloads(dsn, lambda: db.execute(INSERT)) == []

    play(dsn, scenario)


# --- the order of events


class Table:
    """Writers of tasks and a sleeping worker, whose statements come in a given order."""

    def __init__(self, db: Any, listener: Any, writers: list[Any], events: list[str]) -> None:
        self._db, self._listener, self._writers = db, listener, writers
        self._events = iter(events)
        self._open: dict[int, Any] = {}
        self.due = asyncio.Event()
        self._wants_look = False
        self.seen: set[int] = set()
        self._written = 0
        self.sleep = Sleep(("mail",), look=self._want_look, advance_soon=self.due.set)

    def _want_look(self) -> None:
        self._wants_look = True

    def hear(self, *_: object) -> None:
        self.sleep.count_notification()
        self._wants_look = True

    async def happen(self) -> bool:
        """Let the next event happen. Returns false after the last one."""
        event = next(self._events, None)
        if event is None:
            return False
        kind, _, number = event.partition(" ")
        if kind == "write":
            await self._write(int(number))
        elif kind == "commit":
            await self._commit(int(number))
        elif kind == "look":
            await self.look()
        else:
            self.sleep.set_waiting(kind == "wait")
        return True

    async def _write(self, number: int) -> None:
        if number not in self._open:
            self._open[number] = self._writers[number].transaction(isolation=LEVELS[number])
            await self._open[number].start()
        self._written += 1
        await self._writers[number].execute("INSERT INTO pg_task (step, queue) VALUES ($1, 'mail')", str(self._written))

    async def _commit(self, number: int) -> None:
        if transaction := self._open.pop(number, None):
            await transaction.commit()

    async def look(self) -> None:
        self._wants_look = False
        self.seen |= {int(row[0]) for row in await self._db.fetch("SELECT step FROM pg_task")}

    # --- as a connection of `Sleep`

    async def execute(self, query: str) -> None:
        await self.happen()
        await self._listener.execute(query)

    async def fetch(self, query: str, *args: Any) -> Any:
        await self.happen()
        return await self._listener.fetch(query, *args)

    async def play(self) -> None:
        """Let all happen, and all transactions end. What the worker then waits for is a timer or a notification."""
        self.sleep.set_waiting(True)
        while await self.happen():
            await self.sleep.advance(self)
            if self._wants_look:
                await self.look()
        for number in list(self._open):
            await self._commit(number)
        await self._listener.fetchval("SELECT 1")  # what was sent has arrived by the time of this answer
        self.sleep.set_waiting(True)
        await self.sleep.advance(self)  # its timer rings
        if self._wants_look:
            await self.look()
        assert self.seen == set(range(1, self._written + 1))


LEVELS = ("read_committed", "read_committed", "repeatable_read")
EVENTS = st.sampled_from(
    [*(f"{kind} {number}" for kind in ("write", "commit") for number in range(len(LEVELS))), "look", "wait", "work"]
)


@asynccontextmanager
async def table(dsn: str, events: list[str]) -> AsyncIterator[Table]:
    async with connected(dsn) as db, connected(dsn) as listener:
        writers = [await asyncpg.connect(dsn) for _ in LEVELS]
        try:
            await db.execute("DELETE FROM pg_task")
            made = Table(db, listener, writers, events)
            await listener.add_listener("pg_task_changed", made.hear)
            yield made
            await listener.remove_listener("pg_task_changed", made.hear)
        finally:
            for writer in writers:
                await writer.close()


def play_events(dsn: str, events: list[str]) -> None:
    async def main() -> None:
        async with table(dsn, events) as made:
            await made.play()

    run(main())


MISSES = {
    "commits while the worker falls asleep": ["write 0", "commit 0", "look"],
    "wrote before the sleep": ["write 0", "look", "look", "look", "commit 0"],
    "wrote before the sleep, beside one that goes on": [
        "write 0",
        "write 1",
        "look",
        "look",
        "look",
        "commit 0",
        "look",
    ],
    "wrote between the sleep and the list": ["look", "write 0", "commit 0"],
    "begins between the sleep and the list": ["look", "look", "write 0", "look", "commit 0"],
    "has an old snapshot": ["write 2", "look", "look", "write 2", "commit 2"],
}


@pytest.mark.parametrize("events", MISSES.values(), ids=MISSES)
def test_writer_is_not_missed_when_it(dsn: str, events: list[str]) -> None:
    play_events(dsn, events)


def test_worker_looks_when_one_of_two_writers_ends(dsn: str) -> None:
    async def main() -> None:
        async with alone(dsn) as (one, _), connected(dsn) as first, connected(dsn) as second:
            for writer in (first, second):
                await writer.execute(f"BEGIN; {INSERT}")
            one.sleep.set_waiting(True)
            await one.advance()
            for looks, writer in ((2, first), (3, second)):
                await one.advance()
                assert one.looks == looks - 1
                await writer.execute("COMMIT")
                await one.advance()
                assert one.looks == looks

    run(main())


@pytest.fixture(scope="module")
def lasting_dsn(cluster: str, template: str) -> Iterator[str]:
    yield from fresh_database(cluster, template)


@pytest.fixture(params=[0.0, 1e6], ids=["gets up at once", "stays asleep"])
def busy_after(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_AFTER", request.param)


@pytest.mark.usefixtures("busy_after")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(events=st.lists(EVENTS, max_size=16))
def test_no_order_of_events_hides_a_task(lasting_dsn: str, events: list[str]) -> None:
    play_events(lasting_dsn, events)


def test_prepared_transaction_is_not_missed() -> None:
    """And a writer that says `pgtask.notify = off` can prepare, though a worker sleeps."""
    directory = Path(tempfile.mkdtemp(prefix="pgtask-test-", dir=memory()))
    try:
        run(execute(embedded.start(directory), "ALTER SYSTEM SET max_prepared_transactions = 5"))
        embedded.stop(directory)
        dsn = embedded.start(directory)
        run(migrate(dsn))
        run(play_prepared(dsn))
    finally:
        embedded.stop(directory)
        shutil.rmtree(directory, ignore_errors=True)


async def play_prepared(dsn: str) -> None:
    async with connected(dsn) as db, connected(dsn) as writer, connected(dsn) as listener:
        looks: list[int] = []
        due = asyncio.Event()
        await writer.execute(f"BEGIN; {INSERT}")
        sleep = Sleep((), look=lambda: looks.append(1), advance_soon=due.set)
        sleep.set_waiting(True)
        await sleep.advance(listener)
        await writer.execute("PREPARE TRANSACTION 'one'")
        await sleep.advance(listener)
        looks.clear()
        await db.execute("COMMIT PREPARED 'one'")
        await sleep.advance(listener)
        assert looks == [1]
        with pytest.raises(asyncpg.FeatureNotSupportedError, match="NOTIFY"):
            await writer.execute(f"BEGIN; {INSERT}; PREPARE TRANSACTION 'two'")
        await writer.execute("ROLLBACK")
        await writer.execute(f"BEGIN; SET LOCAL pgtask.notify = off; {INSERT}; PREPARE TRANSACTION 'two'")
        await db.execute("COMMIT PREPARED 'two'")
        assert await db.fetchval("SELECT count(*) FROM pg_task") == 2


# --- when it sleeps


class Alone:
    """The sleep of a worker of one queue on a connection of its own, without a worker."""

    def __init__(self, listener: Any, queues: tuple[str, ...] = ()) -> None:
        self.listener = listener
        self.due = asyncio.Event()
        self.looked = asyncio.Event()
        self.looks = 0
        self.sleep = Sleep(queues, look=self._look, advance_soon=self.due.set)

    def _look(self) -> None:
        self.looks += 1
        self.looked.set()

    async def advance(self) -> None:
        """Wait until it is time, and advance."""
        await self.due.wait()
        self.due.clear()
        await self.sleep.advance(self.listener)


@asynccontextmanager
async def alone(dsn: str, *queues: str) -> AsyncIterator[tuple[Alone, Any]]:
    async with connected(dsn) as listener, connected(dsn) as db:
        yield Alone(listener, queues), db


def test_worker_with_tasks_gets_up(dsn: str) -> None:
    async def main() -> None:
        async with alone(dsn) as (one, db):
            one.sleep.set_waiting(True)
            await one.advance()
            assert not await db.fetchval(NONE_ASLEEP)
            one.sleep.set_waiting(False)
            while one.sleep.is_asleep:
                await one.advance()
            assert await db.fetchval(NONE_ASLEEP)
            one.sleep.set_waiting(True)
            await one.advance()
            assert one.looks == 2, "a task may have come in between"

    run(main())


def test_short_work_sends_no_statement(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_AFTER", 1e6)

    async def main() -> None:
        async with alone(dsn) as (one, _):
            one.sleep.set_waiting(True)
            await one.advance()
            for _ in range(3):
                one.sleep.set_waiting(False)
                one.sleep.set_waiting(True)
            assert not one.due.is_set()
            assert one.looks == 1

    run(main())


def crowd(sleep: Sleep) -> None:
    for _ in range(module.CROWD):
        sleep.count_notification()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_worker_looks_while_a_crowd_writes(dsn: str, loop: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CROWD_TIME", 1e6)

    async def main() -> None:
        async with alone(dsn) as (one, db), asyncio.timeout(60):
            one.sleep.set_waiting(True)
            await one.advance()
            crowd(one.sleep)
            await one.advance()
            assert await db.fetchval(NONE_ASLEEP)
            looks = one.looks
            while not one.sleep.is_asleep:
                await one.advance()
            # It also looked when it fell asleep.
            assert one.looks - looks >= 4
            assert not await db.fetchval(NONE_ASLEEP)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


def test_watch_lasts_longer_while_crowds_go_on(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("CROWD_TIME", 1e6), ("INITIAL_WATCH", 1000.0), ("MAX_WATCH", 3000.0)):
        monkeypatch.setattr(module, name, seconds)

    async def main() -> None:
        async with alone(dsn) as (one, _):
            now = 1e6
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
            for lasts, calm in ((1000, 0.5), (2000, 0.5), (3000, 2.0), (1000, 0.5), (2000, 0.5)):
                one.sleep.set_waiting(True)
                await one.sleep.advance(one.listener)
                assert one.sleep.is_asleep
                crowd(one.sleep)
                await one.sleep.advance(one.listener)
                now += lasts - 1
                await one.sleep.advance(one.listener)
                assert not one.sleep.is_asleep
                now += 1 + calm
                one.sleep.set_waiting(False)

    run(main())


# --- in a worker


def test_listener_hears_only_its_queues_of_its_table(dsn: str) -> None:
    async def main() -> None:
        hints: list[int] = []
        heard = asyncio.Event()

        def hint() -> None:
            hints.append(1)
            heard.set()

        wake = Wake(dsn, name="test listen", queues=("mail", "news"), hint=hint, stop=None)
        async with connected(dsn) as db:
            await wake.open()
            running = asyncio.create_task(wake.run())
            hints.clear()
            oid = await table_oid(db)
            others = (f"{oid} other", f"{oid + 1} mail", f"{oid} mail2")
            for payload, expected in ((f"{oid} mail", 1), (f"{oid} news", 2), ("", 3), ("of another program", 4)):
                heard.clear()
                for ignored in others:
                    await db.execute("SELECT pg_notify('pg_task_changed', $1)", ignored)
                await db.execute("SELECT pg_notify('pg_task_changed', $1)", payload)
                await heard.wait()
                assert len(hints) == expected
            running.cancel()
            await asyncio.wait([running])

    run(main())


def test_task_open_when_the_worker_fell_asleep_starts(dsn: str, rows: Rows) -> None:
    """Its polls are too rare to find it in this time."""

    async def main() -> None:
        async with connected(dsn) as writer, connected(dsn) as db:
            transaction = writer.transaction()
            await transaction.start()
            await writer.execute("""INSERT INTO pg_task (step) VALUES ('{"Odd":{"Mark":{}}}')""")
            with ready(dsn):
                await until(db, f"SELECT NOT ({NONE_ASLEEP})")
                await transaction.commit()
                await until(db, "SELECT count(*) = 1 FROM mark")

    run(main())
