"""No entry of the journal waits for an endless stream of another class: it is written within two statements."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from fix_database import run
from writers import journaling

from pgtask._ids import first_id
from pgtask._postgres.store import Link
from pgtask._workflow.entries import (
    Adopt,
    CollectResults,
    EndRun,
    LoadHistory,
    RecordCheckpoint,
    SpawnChildren,
    Suspend,
    TakeSignal,
)
from pgtask._workflow.journal import PostgresJournal
from pgtask._workflow.values import Checkpoint, ChildRow
from pgtask.errors import DataRefused

RUN = """
WITH task AS (
    INSERT INTO pg_task (id, step, locked_by, lock_expires_at, claims)
    SELECT id, '{"flow":{"Run":null}}', $2, now() + interval '1 hour', 1 FROM unnest($1::uuid[]) AS run (id)
)
INSERT INTO pg_task_runs (id, name) SELECT id, 'flow' FROM unnest($1::uuid[]) AS run (id)
"""


class CountedLink(Link):
    """Remembers the statements that it has begun; each is a transaction of its own."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn, "pgtask worker 1 journal")
        self.begun: list[tuple[str, set[UUID]]] = []
        self.began: Callable[[str], None] = lambda name: None

    async def run(self, name: str, *args: Any, **options: Any) -> list[Any]:
        self.begun.append((name, set(args[0])))
        self.began(name)
        return await super().run(name, *args, **options)

    async def statements_until(self, kind: str, lease: Any, entry: Awaitable[Any]) -> int:
        """Count the statements that begin until the one with the new entry, that one included."""
        before = len(self.begun)
        await asyncio.wait_for(entry, 20)
        mine = (
            at
            for at, (name, runs) in enumerate(self.begun[before:], 1)
            if name == f"journal/{kind}" and lease.id in runs
        )
        return next(mine)


class EndlessRuns:
    """Leased runs without end, and the entries of each kind for one of them."""

    def __init__(self, journal: PostgresJournal, pool: Any) -> None:
        self.journal, self.pool = journal, pool
        self._unused: list[Any] = []
        self._number = 0

    async def lease(self) -> Any:
        if not self._unused:
            token = uuid4()
            ids = [UUID(int=first_id()) for _ in range(200)]
            await self.pool.execute(RUN, ids, token)
            self._unused = [
                SimpleNamespace(id=id, token=token, label="flow.Run", clear_claims=lambda: None) for id in ids
            ]
        return self._unused.pop()

    def checkpoint(self, kind: str, **more: Any) -> Checkpoint:
        self._number += 1
        return Checkpoint(self._number, str(self._number), kind, f"n{self._number}", **more)

    def load(self, lease: Any) -> Awaitable[Any]:
        return self.journal.submit(LoadHistory(lease.id))

    def collect(self, lease: Any) -> Awaitable[Any]:
        return self.journal.submit(CollectResults([lease.id]))

    def adopt(self, lease: Any) -> Awaitable[Any]:
        return self.journal.submit(Adopt(lease, "flow"))

    def record(self, lease: Any) -> Awaitable[Any]:
        return self.journal.submit(RecordCheckpoint(lease, self.checkpoint("step", result="1"), 1))

    def spawn(self, lease: Any) -> Awaitable[Any]:
        child = ChildRow(UUID(int=first_id()), "flow", '{"flow":{"Run":null}}', "default", 0)
        return self.journal.submit(SpawnChildren(lease, self.checkpoint("spawn", result="1"), 1, [child]))

    def take(self, lease: Any) -> Awaitable[Any]:
        return self.journal.submit(TakeSignal(lease, self.checkpoint("signal"), 1))

    def suspend(self, lease: Any) -> Awaitable[Any]:
        """One that is refused, as something has come: so it can be asked again and again."""
        return self.journal.submit(Suspend(lease, None, None, 0, "signal go", False, []))

    def end(self, lease: Any) -> Awaitable[Any]:
        return self.journal.submit(EndRun(lease, output="1", error=None, tried=0, forgotten=[], version=1))


KINDS = ("load", "collect", "adopt", "record", "spawn", "take", "suspend", "end")


async def with_runs(dsn: str, work: Callable[[EndlessRuns, CountedLink], Awaitable[None]]) -> None:
    link = CountedLink(dsn)
    async with journaling(dsn, link) as journal, asyncpg.create_pool(dsn, min_size=1, max_size=2) as pool:
        await work(EndlessRuns(journal, pool), link)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("endless", KINDS)
def test_no_entry_waits_for_an_endless_stream_of_another_class(dsn: str, endless: str) -> None:
    async def work(runs: EndlessRuns, link: CountedLink) -> None:
        leases = [await runs.lease() for _ in range(1000)]
        entries: list[Awaitable[Any]] = []

        def feed(name: str) -> None:
            """While a statement of its kind is under way, the next entry comes: so there always is one."""
            if name == f"journal/{endless}" and leases:
                entries.append(getattr(runs, endless)(leases.pop()))

        link.began = feed
        entries += [getattr(runs, endless)(leases.pop()) for _ in range(2)]
        dice = random.Random(endless)
        for kind in [kind for kind in KINDS if kind != endless] * 3:
            lease = await runs.lease()
            for _ in range(dice.randrange(8)):  # at some time within a statement
                await asyncio.sleep(0)
            waited = await link.statements_until(kind, lease, getattr(runs, kind)(lease))
            assert waited <= 2, f"{kind} waited behind {endless}"
        assert leases, "the stream has ended before the test"
        leases.clear()
        await asyncio.wait_for(asyncio.gather(*entries), 20)

    run(with_runs(dsn, work), timeout=100)


def test_results_of_children_are_collected_by_one_statement(dsn: str) -> None:
    async def work(runs: EndlessRuns, link: CountedLink) -> None:
        leases = [await runs.lease() for _ in range(60)]
        await asyncio.gather(*(runs.end(lease) for lease in leases[:30]))
        before = len(link.begun)
        asked = [runs.journal.submit(CollectResults([lease.id, leases[0].id])) for lease in leases]
        found = await asyncio.wait_for(asyncio.gather(*asked), 20)
        assert len(link.begun) - before == 1
        for at, ended in enumerate(found):
            wanted = {leases[0].id, *([leases[at].id] if at < 30 else [])}
            assert set(ended) == wanted
            assert all(how == ("SUCCESS", "1", None) for how in ended.values())

    run(with_runs(dsn, work))


def test_search_for_a_refused_entry_holds_up_no_other_class(dsn: str) -> None:
    async def work(runs: EndlessRuns, link: CountedLink) -> None:
        entries = []
        for at in range(64):
            checkpoint = runs.checkpoint("step", result="a\0b" if at == 17 else "1")
            entries.append(runs.journal.submit(RecordCheckpoint(await runs.lease(), checkpoint, 1)))
        told = asyncio.gather(*entries, return_exceptions=True)
        lease = await runs.lease()
        assert await link.statements_until("take", lease, runs.take(lease)) <= 2
        assert not told.done()
        found = await asyncio.wait_for(told, 20)
        assert [at for at, one in enumerate(found) if one is not None] == [17]
        assert isinstance(found[17], DataRefused)

    run(with_runs(dsn, work))


@pytest.mark.parametrize("kind", ["load", "collect"])
def test_refused_read_fails_its_run_and_no_other(dsn: str, kind: str) -> None:
    """The journal halves the batch until it knows the entry, and goes on."""

    async def work(runs: EndlessRuns, link: CountedLink) -> None:
        leases = [await runs.lease() for _ in range(16)]
        unencodable: Any = SimpleNamespace(id="not a UUID")
        submit = getattr(runs, kind)
        entries = [submit(unencodable if at == 5 else lease) for at, lease in enumerate(leases)]
        found = await asyncio.wait_for(asyncio.gather(*entries, return_exceptions=True), 20)
        assert [at for at, one in enumerate(found) if isinstance(one, DataRefused)] == [5]
        assert not [one for at, one in enumerate(found) if isinstance(one, BaseException) and at != 5]
        assert [name for name, _ in link.begun] == [f"journal/{kind}"], "the search for it goes on aside"
        await asyncio.wait_for(runs.record(leases[0]), 20)

    run(with_runs(dsn, work))


def test_end_that_may_have_been_written_is_not_lost(dsn: str) -> None:
    """A first attempt hangs with its lock, and commits later; the second one finds the row locked."""

    async def work(runs: EndlessRuns, link: CountedLink) -> None:
        lease = await runs.lease()
        run_once = link.run
        attempts = 0

        async def run_in_doubt(name: str, *args: Any, **options: Any) -> list[Any]:
            nonlocal attempts
            if name == "journal/end" and (attempts := attempts + 1) == 1:
                options["on_loss"]()
            return await run_once(name, *args, **options)

        link.run = run_in_doubt  # type: ignore[method-assign]
        async with runs.pool.acquire() as first, first.transaction():
            await first.execute("DELETE FROM pg_task WHERE id = $1", lease.id)
            ended = asyncio.ensure_future(runs.end(lease))
            while attempts < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert await asyncio.wait_for(ended, 20) is None

    run(with_runs(dsn, work))
