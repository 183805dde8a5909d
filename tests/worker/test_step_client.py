"""`ctx.client`: a client on the connections of `ctx.db`, for steps on the loop of their worker."""

from __future__ import annotations

from uuid import UUID

import enqueuing
import pytest
from fix_database import run
from fleet import Fleet, Rows

from pgtask import Client, Context, EnqueueError, Task
from pgtask.testing import MemoryWorker, run_task

EVERYTHING = sorted(
    [
        "one",
        *(f"many {number}" for number in range(10)),
        "in a transaction",
        "keyed",
        "from a run",
        "42 True SUCCESS []",
    ]
)
IN_A_THREAD = (
    "ctx.client belongs to the worker's event loop, and this code runs in a thread: define the step by async def"
)


def enqueue(dsn: str, *steps: Task) -> None:
    async def main() -> None:
        async with Client(dsn) as client:
            await client.enqueue_many(steps)

    run(main())


@pytest.mark.parametrize("flags", [(), ("--no-listen",)], ids=str)
def test_step_enqueues_on_the_connections_of_its_worker(dsn: str, rows: Rows, flags: tuple[str, ...]) -> None:
    rows("CREATE TABLE noted (text text)")
    enqueue(dsn, enqueuing.Begin())
    with Fleet(dsn, "--burst", "--concurrency", "20", *flags, app="enqueuing:app") as fleet:
        assert fleet.ends() == 0
    assert sorted(row[0] for row in rows("SELECT text FROM noted")) == EVERYTHING


def test_step_enqueues_where_the_default_isolation_is_another(dsn: str, rows: Rows) -> None:
    """The sessions of `ctx.db` have the settings of the database, not ours."""
    rows("CREATE TABLE noted (text text)")
    rows(f"ALTER DATABASE {rows.value('SELECT current_database()')} SET default_transaction_isolation = 'serializable'")
    enqueue(dsn, enqueuing.Begin())
    with Fleet(dsn, "--burst", app="enqueuing:app") as fleet:
        assert fleet.ends() == 0
    assert rows.value("SELECT count(*) FROM noted WHERE text LIKE '42 True %'") == 1


def test_step_in_a_thread_is_told_to_be_async(dsn: str, rows: Rows) -> None:
    enqueue(dsn, enqueuing.BeginInThread(), enqueuing.CallThread())
    with Fleet(dsn, "--burst", app="enqueuing:app") as fleet:
        assert fleet.ends() == 1
    errors = [row[0] for row in rows("SELECT error FROM pg_task")]
    assert len(errors) == 2
    assert all(error.startswith(IN_A_THREAD) for error in errors)


def test_step_in_memory_enqueues_by_the_client_of_its_worker() -> None:
    async def main() -> None:
        noted: list[str] = []

        class Notes:
            async def execute(self, query: str, text: str) -> None:
                noted.append(text)

        async with MemoryWorker(enqueuing.app, db=Notes()) as worker:
            started = await worker.client.trigger(enqueuing.doubled, 4)
            await worker.run()
            assert await started.result() == 8
            worker.client.assert_enqueued(enqueuing.note("from a run"), times=1)
            assert noted == ["from a run"]

    run(main())


@pytest.mark.parametrize("step", [enqueuing.BeginInThread(), enqueuing.CallThread()], ids=repr)
def test_step_in_a_thread_is_told_so_in_memory(step: Task) -> None:
    assert (run_task(enqueuing.app, step).error or "").startswith(IN_A_THREAD)


def test_context_made_by_hand_has_no_client() -> None:
    with pytest.raises(EnqueueError, match=r"^ctx\.client: no worker has made this context; in a test, run the step"):
        Context(UUID(int=1), 1, None, None).client  # noqa: B018


def test_client_is_made_once_it_is_asked_for() -> None:
    from pgtask._worker.step_client import StepClient

    made: list[object] = []

    async def main() -> None:
        client = StepClient(lambda: made.append(object()) or made[-1])  # type: ignore[func-returns-value]
        assert not made
        assert client.get() is client.get() is made[0]
        await StepClient(list).close()

    run(main())
    assert len(made) == 1
