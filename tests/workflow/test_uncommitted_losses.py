"""What a function has seen before its commit, and what the journal then did not write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flows
import pytest
from fix_acts import act, act_late, did
from fix_database import run
from fix_stores import Stores, World, in_postgres
from fleet import Rows
from run_kit import ask, marks, working

from pgtask import App, Client, Policy, RunFailed, WorkflowContext, workflow
from pgtask._workflow.entries import EndRun, LoadHistory, RecordCheckpoint
from pgtask._workflow.values import Checkpoint
from pgtask.errors import DataRefused, RunStopped

ONCE = Policy(retry_limit=0)
STEP = Checkpoint(1, "1", "step", "a", "1")


# --- the entry


async def claimed(world: World) -> Any:
    started = await world.client.trigger(flows.waiting, 0)
    return await world.claim(started.id)


@pytest.mark.parametrize("error", [None, "no"])
def test_end_records_the_checkpoints_that_it_carries(stores: Stores, error: str | None) -> None:
    async def main() -> None:
        async with stores() as world:
            lease, other = await claimed(world), await claimed(world)
            carried = [STEP, STEP._replace(number=2, place="2", name="b", error="late", result=None)]
            output = None if error else "1"
            end = EndRun(lease, 3, output=output, error=error, checkpoints=carried)
            await world.journal.submit(end)
            await world.journal.submit(EndRun(other, 1, output=output, error=error))
            assert await world.recorded(lease.id) == carried
            assert await world.recorded(other.id) == []
            status, without = [await world.client.run(id).status() for id in (lease.id, other.id)]
            assert (status.version, status.recorded) == (3, 2)
            assert status.started_at == status.ended_at
            assert without.started_at is None
            with pytest.raises(RunStopped):
                await world.journal.submit(end)
            assert await world.recorded(lease.id) == carried

    run(main())


def test_end_keeps_the_start_of_a_run_that_has_begun(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            lease = await claimed(world)
            await world.journal.submit(RecordCheckpoint(lease, STEP, 2))
            before = await world.client.run(lease.id).status()
            await world.journal.submit(EndRun(lease, 2, output="1", checkpoints=[STEP._replace(number=2, name="b")]))
            status = await world.client.run(lease.id).status()
            assert (status.started_at, status.version) == (before.started_at, 2)

    run(main())


def test_end_completes_a_step_that_was_put_off(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            lease = await claimed(world)
            put_off = STEP._replace(result=None, error="try 1", due_at=await world.now(), tried=1)
            await world.journal.submit(RecordCheckpoint(lease, put_off, 1))
            complete = Checkpoint(2, "2", "step", "b", "1")
            await world.journal.submit(RecordCheckpoint(lease, complete, None))
            late = complete._replace(result="2")  # a complete one stays
            done = put_off._replace(result="5", error=None)
            await world.journal.submit(EndRun(lease, 1, output="1", checkpoints=[done, late]))
            assert [(one.number, one.result, one.error, one.due_at) for one in await world.recorded(lease.id)] == [
                (1, "5", None, None),
                (2, "1", None, None),
            ]

    run(main())


def test_end_under_a_lost_lease_records_nothing(stores: Stores) -> None:
    async def main() -> None:
        async with stores() as world:
            late = await claimed(world)
            await world.expire(late)
            await world.claim(late.id)
            with pytest.raises(RunStopped):
                await world.journal.submit(EndRun(late, 1, output="1", checkpoints=[STEP]))
            history = await world.journal.submit(LoadHistory(late.id))
            assert (history.checkpoints, history.version) == ([], None)

    run(main())


# --- the lease


@pytest.mark.parametrize("then", ["asks", "ends", "swallows", "gathers"])
@pytest.mark.parametrize("how", ["expires", "is cancelled"])
def test_result_under_a_lost_lease_leads_nowhere(stores: Stores, how: str, then: str) -> None:
    async def main() -> None:
        async with stores() as world:

            async def lose(ctx: WorkflowContext) -> str:
                if "lost" not in did:
                    did.append("lost")
                    if how == "expires":
                        await world.expire(world.leases[ctx.run_id])
                    else:
                        assert await world.client.run(ctx.run_id).cancel()
                return "a"

            @workflow("losing")
            async def losing(ctx: WorkflowContext) -> str:
                if then == "gathers":
                    await ctx.gather(ctx.step("a", lose, ctx))
                else:
                    await ctx.step("a", lose, ctx)
                did.append("seen")
                try:
                    if then != "ends":
                        await ctx.step("b", act, "b")
                except BaseException:
                    if then != "swallows":
                        raise
                return "end"

            started = await world.client.trigger(losing)
            await world.drive(App(losing))
            status = await started.status()
            if how == "is cancelled":
                assert (status.state, did) == ("CANCELLED", ["lost", "seen"])
                assert await world.recorded(started.id) == []
            else:
                assert await started.result() == "end"
                assert did == ["lost", "seen", "seen", *([] if then == "ends" else ["b"])]

    run(main())


# --- the data


@pytest.mark.parametrize("then", ["asks", "ends", "swallows", "raises", "gathers"])
def test_checkpoint_that_is_refused_ends_its_run_by_name(dsn: str, rows: Rows, then: str) -> None:
    rows("ALTER TABLE pg_task_checkpoints ADD CHECK (name <> 'bad')")

    @workflow("refused", policy=ONCE)
    async def refused(ctx: WorkflowContext) -> str:
        if then == "gathers":
            await ctx.gather(ctx.step("bad", act_late, "bad"), ctx.step("good", act_late, "good"))
        else:
            await ctx.step("bad", act, "bad")
        try:
            if then == "raises":
                raise ValueError("of the function")
            if then != "ends":
                await ctx.step("after", act, "after")
        except BaseException:
            if then != "swallows":
                raise
        return "end"

    async def main() -> None:
        async with in_postgres(dsn) as world:
            started = await world.client.trigger(refused)
            await world.drive(App(refused))
            with pytest.raises(RunFailed, match=r"the database does not record step 'bad': .*23514"):
                await started.result(timeout=20)
            assert "after" not in did
            names = [one.name for one in await world.recorded(started.id)]
            assert names == (["good"] if then == "gathers" else [])

    run(main())


def test_end_that_is_refused_keeps_the_last_checkpoint(dsn: str, rows: Rows) -> None:
    rows("ALTER TABLE pg_task_runs ADD CHECK (output <> '\"bad\"')")

    @workflow("unstorable")
    async def unstorable(ctx: WorkflowContext) -> str:
        await ctx.step("good", act, "good")
        return "bad"

    async def main() -> None:
        async with in_postgres(dsn) as world:
            started = await world.client.trigger(unstorable)
            with pytest.raises(DataRefused):
                await world.drive(App(unstorable))
            assert [one.name for one in await world.recorded(started.id)] == ["good"]

    run(main())


# --- the process


def test_worker_that_is_killed_before_a_commit_repeats_the_step(dsn: str, rows: Rows, tmp_path: Path) -> None:
    async def question(client: Client) -> Any:
        started = await client.trigger(flows.killed_ahead, str(tmp_path))
        return started.id, await started.result(timeout=100)

    with working(dsn, *("--lease-timeout", "1", "--heartbeat-interval", "0.3"), procs=2) as fleet:
        id, done = ask(dsn, question)
        assert fleet.output.count("worker.died") == 3
    names = [f"step {number}" for number in range(3)]
    assert done == names
    assert marks(rows, id) == [name for name in names for _ in range(2)]
    assert [row[0] for row in rows("SELECT name FROM pg_task_checkpoints ORDER BY number")] == names
