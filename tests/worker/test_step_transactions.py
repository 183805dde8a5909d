"""transactions: what a step writes in `ctx.transaction()` commits together with its outcome, or not at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from fix_database import run
from pooler import Pooler
from proxy import Line
from sessions import connected, until
from transact_stage import Act, Kept, Later, Threaded, Timed, TransactStage, transact_stage

from pgtask import Context, Done, Fail, Next
from pgtask._fastpath import Outcomes
from pgtask._postgres import step_transaction
from pgtask._postgres.store import statement
from pgtask._worker import transactions as module
from pgtask.errors import PoolExhausted

pytestmark = pytest.mark.one_database("DROP TABLE IF EXISTS effect, parent CASCADE; TRUNCATE pg_task_archive")

WRITE = "INSERT INTO effect VALUES ($1, $2)"


def play(dsn: str, scenario: Callable[[TransactStage], Awaitable[None]]) -> None:
    async def main() -> None:
        async with transact_stage(dsn) as stage:
            await scenario(stage)

    run(main())


async def effect(ctx: Context, what: str = "first") -> None:
    async with ctx.transaction() as conn:
        await conn.execute(WRITE, ctx.task_id, what)


async def finish(ctx: Context) -> Done:
    await effect(ctx)
    return Done()


async def steal(stage: TransactStage, id: UUID) -> UUID:
    """Let another worker have the task."""
    token = uuid4()
    await stage.db.execute("UPDATE pg_task SET locked_by = $2 WHERE id = $1", id, token)
    return token


# --- outcomes


def test_done_commits_with_what_was_written(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            await effect(ctx)
            assert await stage.effects() == []
            assert await stage.row(ctx.task_id) is not None
            return Done()

        stage.acts["act"] = act
        task = await stage.run("act")
        assert await stage.effects() == ["first"]
        assert await stage.row(task) is None
        assert (stage.flush.done, len(stage.leases), stage.dispatch.errors) == (1, 0, 0)
        assert [len(outcomes) for outcomes in stage.written] == [1]

    play(dsn, scenario)


def test_next_goes_on_under_the_lease(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Next[Act]:
            await effect(ctx)
            return Next(Act("then"))

        async def then(ctx: Context) -> Done:
            row = await stage.row(ctx.task_id)
            assert row["position"] > 0
            assert "then" in row["step"]
            await effect(ctx, "second")
            return Done()

        stage.acts.update(act=act, then=then)
        task = await stage.run("act")
        assert await stage.effects() == ["first", "second"]
        assert await stage.row(task) is None
        assert stage.flush.done == 1

    play(dsn, scenario)


@pytest.mark.parametrize("step", [Next(Act("x"), after=timedelta(hours=1)), Next(Later("x"))], ids=["after", "queue"])
def test_next_elsewhere_commits_and_leaves(dsn: str, step: Next[Act]) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Next[Act]:
            await effect(ctx)
            return step

        stage.acts["act"] = act
        row = await stage.row(await stage.run("act"))
        assert await stage.effects() == ["first"]
        assert (row["locked_by"], row["tried"], '"x"' in row["step"]) == (None, 0, True)
        assert len(stage.leases) == 0

    play(dsn, scenario)


def test_returned_fail_commits_with_the_parking(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Fail:
            await effect(ctx, "reported")
            return Fail("no such page")

        stage.acts["act"] = act
        row = await stage.row(await stage.run("act"))
        assert await stage.effects() == ["reported"]
        assert row["error"] == "no such page"
        assert stage.flush.parked == 1

    play(dsn, scenario)


def test_archived_task_commits_with_its_copy(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        stage.acts["act"] = finish
        task = await stage.run(Kept("act"))
        assert await stage.effects() == ["first"]
        assert await stage.db.fetchval("SELECT id FROM pg_task_archive") == task
        assert await stage.row(task) is None

    play(dsn, scenario)


# --- failures of the step


@pytest.mark.parametrize("where", ["in", "after"])
def test_exception_rolls_back_and_counts(dsn: str, where: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            async with ctx.transaction() as conn:
                await conn.execute(WRITE, ctx.task_id, "gone")
                if where == "in":
                    raise ValueError("no")
            raise ValueError("no")

        stage.acts["act"] = act
        row = await stage.row(await stage.run("act"))
        assert await stage.effects() == []
        assert (row["tried"], row["locked_by"], row["error"]) == (1, None, None)
        assert stage.dispatch.errors == 1
        assert not stage.dispatch.db._in_use

    play(dsn, scenario)


def test_exception_caught_outside_leaves_the_outcome(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            try:
                async with ctx.transaction() as conn:
                    await conn.execute(WRITE, ctx.task_id, "gone")
                    raise ValueError("no")
            except ValueError:
                pass
            return Done()

        async def again(ctx: Context) -> Done:
            await act(ctx)
            await effect(ctx, "second")
            return Done()

        stage.acts.update(act=act, again=again)
        assert await stage.row(await stage.run("act")) is None
        assert await stage.effects() == []
        await stage.run("again")
        assert await stage.effects() == ["second"]
        assert (stage.flush.done, stage.dispatch.errors) == (2, 0)

    play(dsn, scenario)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "after"])
def test_further_block_is_a_savepoint(dsn: str, nested: bool) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def inner(ctx: Context) -> None:
            await effect(ctx, "inner")
            with suppress(asyncpg.DivisionByZeroError):
                async with ctx.transaction() as conn:
                    await conn.execute(WRITE, ctx.task_id, "gone")
                    await conn.execute("SELECT 1 / 0")

        async def act(ctx: Context) -> Done:
            async with ctx.transaction() as conn:
                await conn.execute(WRITE, ctx.task_id, "outer")
                if nested:
                    await inner(ctx)
                async with conn.transaction():  # asyncpg's own nest in it
                    await conn.execute(WRITE, ctx.task_id, "asyncpg")
            if not nested:
                await inner(ctx)
            return Done()

        stage.acts["act"] = act
        await stage.run("act")
        assert await stage.effects() == ["asyncpg", "inner", "outer"]
        assert stage.flush.done == 1

    play(dsn, scenario)


def test_wrong_outcome_rolls_back(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Any:
            await effect(ctx, "gone")

        stage.acts["act"] = act
        row = await stage.row(await stage.run("act"))
        assert await stage.effects() == []
        assert row["tried"] == 1

    play(dsn, scenario)


@pytest.mark.parametrize("where", ["in", "after"])
def test_timeout_rolls_back(dsn: str, where: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            async with ctx.transaction() as conn:
                await conn.execute(WRITE, ctx.task_id, "gone")
                if where == "in":
                    await conn.execute("SELECT pg_sleep(60)")
            await asyncio.Event().wait()
            return Done()

        stage.acts["act"] = act
        row = await stage.row(await stage.run(Timed("act")))
        assert await stage.effects() == []
        assert row["tried"] == 1

    play(dsn, scenario)


def test_stop_rolls_back_without_a_try(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        begun = asyncio.Event()

        async def act(ctx: Context) -> Done:
            await effect(ctx, "gone")
            begun.set()
            await asyncio.Event().wait()
            return Done()

        stage.acts["act"] = act
        (lease,) = await stage.put("act")
        stage.dispatch.admit([lease])
        await begun.wait()
        stage.dispatch.cancel_step(lease)
        await stage.end()
        assert await stage.effects() == []
        assert stage.leases.list_unstarted() == [lease]
        assert not stage.dispatch.db._in_use

    play(dsn, scenario)


# --- the fence


@pytest.mark.parametrize("outcome", [Done(), Next(Act("x")), Next(Later("x")), Fail("no")], ids=str)
def test_lost_lease_writes_nothing(dsn: str, outcome: Any) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Any:
            await effect(ctx, "gone")
            stage.token = await steal(stage, ctx.task_id)  # type: ignore[attr-defined]
            return outcome

        stage.acts["act"] = act
        row = await stage.row(await stage.run("act"))
        assert await stage.effects() == []
        assert row["locked_by"] == stage.token  # type: ignore[attr-defined]
        assert (row["tried"], row["error"], '"act"' in row["step"]) == (0, None, True)
        assert (stage.flush.lost, stage.flush.done, stage.flush.parked, len(stage.leases)) == (1, 0, 0, 0)
        assert not stage.dispatch.db._in_use

    play(dsn, scenario)


def test_lease_is_renewed_while_it_is_open(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            await effect(ctx)
            (lease,) = stage.leases.list_open()
            rows = await stage.db.fetch(statement("renew"), [lease.id], [lease.token], 60.0)
            assert [tuple(row) for row in rows] == [(lease.id, True)]
            assert stage.leases.renewed_before(float("inf")) == [lease]
            return Done()

        stage.acts["act"] = act
        await stage.run("act")
        assert await stage.effects() == ["first"]

    play(dsn, scenario)


def test_locked_row_interrupts_the_step(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step runs again without a used try."""
    monkeypatch.setitem(step_transaction._FENCE, "lock_timeout", "50ms")

    async def scenario(stage: TransactStage) -> None:
        stage.acts["act"] = finish
        (lease,) = await stage.put("act")
        async with connected(dsn) as other, other.transaction():
            await other.execute("SELECT FROM pg_task WHERE id = $1 FOR UPDATE", lease.id)
            stage.dispatch.admit([lease])
            await stage.until_outcome()
        await stage.end()
        row = await stage.row(lease.id)
        assert await stage.effects() == []
        assert (row["tried"], row["claims"], row["locked_by"]) == (0, 0, None)
        assert stage.dispatch.errors == 0

    play(dsn, scenario)


# --- misuse


@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK", "COMMIT; BEGIN", "ROLLBACK; BEGIN"])
def test_transaction_ended_by_hand_fails_the_try(dsn: str, sql: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            async with ctx.transaction() as conn:
                await conn.execute(sql)
                await conn.execute("SELECT 1")
            return Done()

        stage.acts["act"] = act
        stage.logged.clear()
        row = await stage.row(await stage.run("act"))
        assert row["tried"] == 1
        assert "leave COMMIT, ROLLBACK and the release" in stage.logged[0]

    play(dsn, scenario)


def test_swallowed_error_fails_the_try(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            async with ctx.transaction() as conn:
                await conn.execute(WRITE, ctx.task_id, "gone")
                with pytest.raises(asyncpg.DivisionByZeroError):
                    await conn.execute("SELECT 1 / 0")
            return Done()

        stage.acts["act"] = act
        row = await stage.row(await stage.run("act"))
        assert await stage.effects() == []
        assert row["tried"] == 1
        assert "whose error the step has caught" in stage.logged[0]

    play(dsn, scenario)


def test_deferred_constraint_fails_the_try(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        await stage.db.execute(
            "CREATE TABLE parent (id uuid PRIMARY KEY);"
            "ALTER TABLE effect ADD FOREIGN KEY (task) REFERENCES parent DEFERRABLE INITIALLY DEFERRED"
        )
        stage.acts["act"] = finish
        row = await stage.row(await stage.run("act"))
        assert await stage.effects() == []
        assert row["tried"] == 1
        assert "foreign key" in stage.logged[0]

    play(dsn, scenario)


def test_connection_left_in_use_fails_the_try(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        left = []

        async def act(ctx: Context) -> Done:
            async with ctx.transaction() as conn:
                left.append(asyncio.create_task(conn.execute("SELECT pg_sleep(60)")))
                await asyncio.sleep(0)
            return Done()

        stage.acts["act"] = act
        row = await stage.row(await stage.run("act"))
        assert row["tried"] == 1
        assert "await all that uses it" in stage.logged[0]
        await asyncio.gather(*left, return_exceptions=True)

    play(dsn, scenario)


def test_use_elsewhere_is_refused(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        kept: list[Context] = []

        def threaded(ctx: Context) -> Any:
            ctx.transaction()

        async def keep(ctx: Context) -> Done:
            kept.append(ctx)
            return Done()

        async def use_kept(ctx: Context) -> Done:
            kept[0].transaction()
            return Done()

        async def misspelt(ctx: Context) -> Done:
            ctx.transaction(isolation="serialisable")  # type: ignore[arg-type]
            return Done()

        async def inside(ctx: Context) -> Done:
            async with ctx.transaction(), ctx.transaction(isolation="serializable"):
                return Done()

        stage.acts.update(threaded=threaded, keep=keep, use_kept=use_kept, misspelt=misspelt, inside=inside)
        for step, text in (
            (Threaded("threaded"), "runs in a thread, where ctx.transaction() cannot be used"),
            (Act("misspelt"), "use 'repeatable_read', 'serializable', or None"),
            (Act("inside"), "is for the first ctx.transaction() of a step"),
        ):
            stage.logged.clear()
            await stage.run(step)
            assert text in stage.logged[0]
        await stage.run("keep")
        stage.logged.clear()
        await stage.run("use_kept")
        assert "outside of the step that ctx belongs to" in stage.logged[0]

    play(dsn, scenario)


@pytest.mark.parametrize("outcome", [Done(), Next(Later("x"))], ids=["one", "any"])
def test_settings_of_the_step_do_not_reach_the_outcome(dsn: str, outcome: Any) -> None:
    async def scenario(stage: TransactStage) -> None:
        await stage.db.execute("DROP ROLE IF EXISTS tenant; CREATE ROLE tenant; GRANT ALL ON effect TO tenant")

        async def act(ctx: Context) -> Any:
            await effect(ctx)
            async with ctx.transaction() as conn:
                await conn.execute("SET LOCAL search_path = nowhere; SET LOCAL ROLE tenant")
            return outcome

        stage.acts["act"] = act
        await stage.run("act")
        assert await stage.effects() == ["first"]
        await stage.db.execute("DROP OWNED BY tenant; DROP ROLE tenant")

    play(dsn, scenario)


# --- conflicts


def test_serialization_failure_runs_again_without_a_try(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        await stage.db.execute("INSERT INTO effect VALUES (gen_random_uuid(), '0')")
        meet = asyncio.Barrier(4)
        first: set[UUID] = set()

        async def act(ctx: Context) -> Done:
            async with ctx.transaction(isolation="repeatable_read") as conn:
                await conn.fetchval("SELECT what FROM effect")
                if ctx.task_id not in first:
                    first.add(ctx.task_id)
                    await meet.wait()
                await conn.execute("UPDATE effect SET what = what::integer + 1")
            return Done()

        stage.acts["act"] = act
        await stage.run("act", "act", "act", "act")
        while await stage.db.fetchval("SELECT count(*) FROM pg_task"):
            assert await stage.db.fetchval("SELECT max(tried) FROM pg_task") == 0
            stage.dispatch.admit(await stage.claim())
            await stage.end()
        assert await stage.effects() == ["4"]
        assert stage.dispatch.errors == 0

    play(dsn, scenario)


def test_conflict_that_lasts_counts_as_a_try(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            async with ctx.transaction() as conn:
                await conn.execute("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")
            return Done()

        stage.acts["act"] = act
        task = await stage.run("act")
        for _ in range(4):
            assert (await stage.row(task))["tried"] == 0
            await stage.db.execute("UPDATE pg_task SET wakeup_at = now()")
            stage.dispatch.admit(await stage.claim())
            await stage.end()
        assert (await stage.row(task))["tried"] == 1
        assert stage.dispatch.errors == 1

    play(dsn, scenario)


def test_snapshot_holds_the_row_of_the_task(dsn: str) -> None:
    """A renewal would change the row after the snapshot, and the outcome could not be written."""

    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            async with ctx.transaction(isolation="serializable") as conn:
                await conn.execute(WRITE, ctx.task_id, "first")
                (lease,) = stage.leases.list_open()
                rows = await stage.db.fetch(statement("renew"), [lease.id], [lease.token], 60.0)
                assert [tuple(row) for row in rows] == [(lease.id, False)]
                assert stage.leases.renewed_before(float("inf")) == []
            return Done()

        stage.acts["act"] = act
        await stage.run("act")
        assert await stage.effects() == ["first"]
        assert len(stage.leases) == 0

    play(dsn, scenario)


# --- a COMMIT without an answer


@pytest.mark.parametrize("how", ["before", "after", "late"])
@pytest.mark.parametrize("outcome", [Done(), Next(Act("then")), Next(Later("then"))], ids=["done", "next", "later"])
def test_commit_without_an_answer_is_looked_up(dsn: str, how: str, outcome: Any) -> None:
    """`before`: it was lost on its way; `after`: its answer was; `late`: it arrives when the worker looks."""

    async def main() -> None:
        async with Line(dsn) as line, transact_stage(dsn, line.dsn) as stage:

            async def act(ctx: Context) -> Any:
                await effect(ctx)
                if not line.cut:
                    line.trap(b"COMMIT", how)
                return outcome

            async def then(ctx: Context) -> Done:
                await effect(ctx, "then")
                return Done()

            stage.acts.update(act=act, then=then)
            (lease,) = await stage.put("act")
            stage.dispatch.admit([lease])
            if how == "late":
                waits = "wait_event_type = 'Lock' AND application_name = 'look'"
                await until(stage.db, f"SELECT EXISTS (SELECT FROM pg_stat_activity WHERE {waits})")
                line.release()
            await stage.end()
            assert line.cut == 1
            row = await stage.row(lease.id)
            if how == "before":
                assert await stage.effects() == []
                assert (row["tried"], row["claims"], row["locked_by"]) == (0, 0, None)
                assert '"act"' in row["step"]
                await stage.db.execute("UPDATE pg_task SET wakeup_at = now()")
                stage.dispatch.admit(await stage.claim())
                await stage.end()
                row = await stage.row(lease.id)
            is_later = isinstance(outcome, Next) and isinstance(outcome.step, Later)
            assert (row is not None) == is_later
            assert await stage.effects() == (
                ["first", "then"] if isinstance(outcome, Next) and not is_later else ["first"]
            )
            assert (stage.dispatch.errors, stage.flush.lost, len(stage.leases)) == (0, 0, 0)

    run(main())


def test_connection_lost_in_the_block_interrupts(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            async with ctx.transaction() as conn:
                await conn.execute(WRITE, ctx.task_id, "gone")
                pid = await conn.fetchval("SELECT pg_backend_pid()")
            await stage.db.execute("SELECT pg_terminate_backend($1, 10000)", pid)
            return Done()

        stage.acts["act"] = act
        row = await stage.row(await stage.run("act"))
        assert stage.logged == []
        assert await stage.effects() == []
        assert (row["tried"], row["claims"]) == (0, 0)

    play(dsn, scenario)


# --- beside other things


def test_pool_of_transactions_that_want_more_does_not_hang(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        raised = []

        async def act(ctx: Context) -> Done:
            async with ctx.transaction() as conn:
                await conn.execute(WRITE, ctx.task_id, "gone")
                try:
                    await ctx.db.fetchval("SELECT 1")
                except PoolExhausted:
                    raised.append(ctx.task_id)
                    raise
            return Done()

        stage.acts["act"] = act
        await stage.run(*["act"] * 10)
        assert raised
        assert len(await stage.effects()) == stage.flush.done

    play(dsn, scenario)


def test_slow_transaction_is_named_once(
    dsn: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLOW", 0.01)
    caplog.set_level(logging.WARNING, "pgtask.transactions")

    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            await effect(ctx)
            await stage.until(lambda: "transaction.slow" in caplog.text)
            return Done()

        stage.acts["act"] = act
        task = await stage.run("act")
        (record,) = caplog.records
        assert str(record.msg).startswith(f"transaction.slow task={task} step=Play.Act seconds=")
        assert await stage.effects() == ["first"]

    play(dsn, scenario)


def test_idle_transaction_ends_with_the_lease(dsn: str) -> None:
    async def scenario(stage: TransactStage) -> None:
        async def act(ctx: Context) -> Done:
            async with ctx.transaction() as conn:
                setting = await conn.fetchval("SELECT current_setting('idle_in_transaction_session_timeout')")
                await conn.execute(WRITE, ctx.task_id, setting)
            return Done()

        stage.acts["act"] = act
        await stage.run("act")
        assert await stage.effects() == ["1min"]
        assert await stage.dispatch.db.fetchval("SELECT current_setting('idle_in_transaction_session_timeout')") == "0"

    play(dsn, scenario)


def test_transaction_works_behind_a_pooler(dsn: str) -> None:
    async def main() -> None:
        async with Pooler(dsn) as pooler, transact_stage(dsn, pooler.dsn, pooled=True) as stage:

            async def act(ctx: Context) -> Next[Act]:
                await effect(ctx)
                async with ctx.transaction(isolation="repeatable_read" if ctx.attempt > 5 else None) as conn:
                    await conn.execute(WRITE, ctx.task_id, "more")
                return Next(Act("then"))

            stage.acts.update(act=act, then=finish)
            await stage.run(*["act"] * 20)
            assert await stage.effects() == ["first"] * 40 + ["more"] * 20
            assert (stage.flush.done, stage.dispatch.errors) == (20, 0)

    run(main())


# --- several leases


def test_leases_of_a_batch_commit_together(dsn: str) -> None:
    """If one was lost, nothing is written, and the caller learns which."""

    async def scenario(stage: TransactStage) -> None:
        first, lost, kept = leases = await stage.put("a", "b", Kept("c"))

        async def attempt(some: list[Any]) -> list[Any]:
            outcomes = Outcomes()
            async with stage.transactions.open_for(some, None) as conn:
                for lease in some:
                    await conn.execute(WRITE, lease.id, lease.token.hex)
            transaction = some[0].transaction
            for lease in some:
                (outcomes.add_archived if lease is kept else outcomes.add_done)(lease)
            result = await stage.transactions.commit(transaction, outcomes)
            assert [lease.transaction for lease in some] == [None] * len(some)
            return result

        await steal(stage, lost.id)
        assert await attempt(leases) == [lost]
        assert await stage.effects() == []
        assert await attempt([first, kept]) == []
        assert len(await stage.effects()) == 2
        assert stage.flush.done == 2
        assert await stage.db.fetchval("SELECT id FROM pg_task") == lost.id
        assert await stage.db.fetchval("SELECT id FROM pg_task_archive") == kept.id
        stage.dispatch.drop_lost(lost)

    play(dsn, scenario)
