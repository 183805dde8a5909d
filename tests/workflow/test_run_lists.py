"""Lists of runs: they have runs that plain SQL has triggered, and fetch nothing that they do not show."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import asyncpg
import edge_flows
import pytest
from fix_commands import Command
from fix_database import run
from fleet import Rows

from pgtask import Client
from pgtask._postgres.runs import input_of, list_runs

PICK = '{"pick":{"Run":1}}'
BY_HAND = """INSERT INTO pg_task (step, error) VALUES ($1, $2) RETURNING id"""


def test_run_triggered_by_sql_is_listed_before_it_begins(
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:
    rows = Rows(dsn)
    monkeypatch.setenv("PGTASK_DSN", dsn)
    by_hand = rows.value(BY_HAND, '{"pick": {"Run": [1, 2, 3]}}', None)
    parked = rows.value(BY_HAND, '{"pick":{"Run":"x"}}', "it cannot be decoded")
    rows(BY_HAND, '{"Greeter":{"ReadName":{"Run":1}}}', None)  # a task that is none

    async def main() -> None:
        async with Client(dsn) as client:
            with_record = await client.trigger(edge_flows.reader)
            every = [with_record.id, UUID(int=parked.int), UUID(int=by_hand.int)]
            assert [one.id for one in await client.runs()] == every
            assert [one.id for one in await client.runs("pick")] == every[1:]
            assert [one.id for one in await client.runs("nobody")] == []
            (queued,) = await client.runs("pick", state="QUEUED")
            assert (queued.id, queued.name, queued.input, queued.recorded) == (every[2], "pick", "[1, 2, 3]", 0)
            assert [one.id for one in await client.runs(state="ERROR")] == [every[1]]
            assert [one.id for one in await client.runs(state="QUEUED")] == [every[0], every[2]]
            assert await client.runs(state="SUCCESS") == []
            pages, before = [], None
            while page := await client.runs(limit=1, before=before):
                pages += [one.id for one in page]
                before = page[-1].id
            assert pages == every

    run(main())
    listed = command("runs")
    assert [line.split()[2] for line in listed.out.splitlines()[1:] if str(parked) not in line][:2] == [
        "reader",
        "pick",
    ]


def test_pages_of_both_kinds_have_each_run_once_and_in_order(dsn: str) -> None:
    rows = Rows(dsn)

    async def main() -> None:
        async with Client(dsn) as client:
            for number in range(12):
                await client.trigger_many(edge_flows.reader, [None] * (number % 4))
                for _ in range(number % 3):
                    await asyncio.to_thread(rows, BY_HAND, PICK, None)
            every = [
                UUID(int=row[0].int) for row in await asyncio.to_thread(rows, "SELECT id FROM pg_task ORDER BY id DESC")
            ]
            for limit in (1, 3, 5, 100):
                for state in (None, "QUEUED"):
                    found: list[UUID] = []
                    before = None
                    while page := await client.runs(state=state, limit=limit, before=before):
                        found += [one.id for one in page]
                        before = page[-1].id
                    assert found == every

    run(main())


class Counted:
    """A connection that remembers what it has fetched."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.steps = 0

    async def fetch(self, query: str, *args: Any) -> Any:
        found = await self._connection.fetch(query, *args)
        self.steps += sum(len(row["step"]) for row in found if "step" in row)
        return found


def test_a_listing_by_state_fetches_nothing_of_the_others(dsn: str) -> None:
    rows = Rows(dsn)

    async def main() -> None:
        async with Client(dsn) as client:
            await client.trigger_many(edge_flows.leaving, ["x" * 100_000] * 50)
        park = "UPDATE pg_task SET error = 'no' WHERE id = (SELECT id FROM pg_task ORDER BY id OFFSET 20 LIMIT 1)"
        await asyncio.to_thread(rows, park)
        connection = await asyncpg.connect(dsn)
        counted = Counted(connection)
        found, following = await list_runs(counted, name=None, state="ERROR", limit=10, before=None)
        assert (len(found), following) == (1, None)
        assert counted.steps < 110_000
        counted.steps = 0
        found, following = await list_runs(counted, name=None, state="QUEUED", limit=3, before=None)
        assert (len(found), following) == (3, found[-1].id)
        assert counted.steps < 310_000
        await connection.close()

    run(main())


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ('{"pick":{"Run":{"amount":1200}}}', '{"amount":1200}'),
        ('{ "pick" : { "Run" : null } }', "null"),
        ('{"pick":{"Run":"x"}}', '"x"'),
        ('{"pick":{"Walk":1}}', None),
        ('{"pick":{}}', None),
        ('{"pick":"Run"}', None),
        ('{"a":{"Run":1},"b":{"Run":1}}', None),
        ("{", None),
        (None, None),
    ],
)
def test_the_input_is_what_is_in_the_envelope(step: str | None, expected: str | None) -> None:
    assert input_of(step) == expected
