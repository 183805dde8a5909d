"""The ids of tasks, and what a producer imports."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from client_kit import count, numbered, play
from post import Write

from pgtask import Client
from pgtask._ids import TaskIds

pytestmark = pytest.mark.one_database


def test_task_ids_are_a_sequence() -> None:
    first = UUID("018f0000-0000-7000-9fff-ffffffffff00")
    plain = [UUID(int=first.int + n) for n in range(1000)]
    ids = TaskIds(first, 1000)
    assert (len(ids), list(ids), list(reversed(ids))) == (1000, plain, plain[::-1])
    for index in (0, 1, 999, -1, -1000):
        assert ids[index] == plain[index]
    for index in (1000, -1001):
        with pytest.raises(IndexError):
            ids[index]
    for part in (slice(None), slice(5), slice(-5, None), slice(10, 2, -3), slice(900, 2000, 7), slice(3, 3)):
        assert ids[part] == plain[part]
    assert all(task in ids for task in (plain[0], plain[-1]))
    assert all(
        thing not in ids for thing in (UUID(int=first.int - 1), UUID(int=first.int + 1000), str(first), None, first.int)
    )
    assert (ids.index(plain[7]), ids.count(plain[7])) == (7, 1)
    assert repr(ids) == "<TaskIds 1000>"
    assert list(TaskIds(first, 0)) == []


def test_ten_million_ids_take_no_room() -> None:
    ids = TaskIds(UUID("018f0000-0000-7000-9000-000000000000"), 10_000_000)
    tracemalloc.start()
    assert ids[9_999_999] in ids
    assert UUID(int=ids[-1].int + 1) not in ids
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()


def test_ids_are_uuids_of_version_7_and_grow_with_time(dsn: str) -> None:
    async def scenario(client: Client, db: Any) -> None:
        ids: list[UUID] = []
        for _ in range(20):
            before = int(datetime.now(UTC).timestamp() * 1000)
            batch = [
                await client.enqueue(Write("x")),
                *await client.enqueue_many(numbered(50)),
                *await client.enqueue_many(numbered(5), key=lambda step: f"{len(ids)} {step.n}"),
            ]
            after = int(datetime.now(UTC).timestamp() * 1000)
            for task in batch:
                assert isinstance(task, UUID)
                assert (task.version, task.variant) == (7, "specified in RFC 4122")
                assert before <= task.int >> 80 <= after
            ids += batch
        assert len(set(ids)) == len(ids) == await count(db)
        by_time = [task for _, task in sorted(((task.int >> 80, n), task) for n, task in enumerate(ids))]
        assert by_time == ids

    play(dsn, scenario)


PRODUCES = """
import asyncio, sys
import pgtask

class Mail(pgtask.Task): pass
class Send(Mail):
    to: str

@pgtask.workflow("greet")
async def greet(ctx: pgtask.WorkflowContext, name: str) -> str:
    return name

async def main() -> None:
    async with pgtask.Client(sys.argv[1]) as client:
        await client.enqueue(Send("ada"))
        await client.enqueue_many([Send("ada"), Send("bob")])
        await client.trigger(greet, "ada")

asyncio.run(main())
prefixes = ("pgtask._worker", "pgtask._workflow", "pgtask._consumer", "pgtask.consumer", "pgtask._supervisor")
print([name for name in sys.modules if name.startswith(prefixes)])
print(pgtask.Consumer.__name__, pgtask.Lease.__name__)
"""


def test_producer_imports_no_part_of_a_worker(dsn: str) -> None:
    result = subprocess.run([sys.executable, "-c", PRODUCES, dsn], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == ["[]", "Consumer Lease"], result.stderr
