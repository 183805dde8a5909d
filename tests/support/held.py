"""Steps that never suspend, unless they are told to, so that workers hold their rows; and a ledger of what was held."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from fleet import Rows

from pgtask import App, Batch, BatchContext, Context, Done, Fail, Next, Policy, Task

WARM_UP = 1500
"""Tasks after which a worker holds the others of the lane."""

LEDGER = (
    "CREATE TABLE ledger (task uuid, what text, held boolean, error text)",
    "CREATE FUNCTION ledger_write() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
    " INSERT INTO ledger VALUES (OLD.id, TG_OP, OLD.locked_by IS NULL, CASE TG_OP WHEN 'UPDATE' THEN NEW.error END);"
    " RETURN NULL; END $$",
    "CREATE TRIGGER ledger_deleted AFTER DELETE ON pg_task FOR EACH ROW EXECUTE FUNCTION ledger_write()",
    "CREATE TRIGGER ledger_moved AFTER UPDATE OF step, wakeup_at, error ON pg_task FOR EACH ROW"
    " WHEN (OLD.step <> NEW.step OR OLD.wakeup_at <> NEW.wakeup_at OR NEW.error IS NOT NULL)"
    " EXECUTE FUNCTION ledger_write()",
)


def open_ledger(rows: Rows) -> None:
    """Record each end and each move of a task, and whether it happened without a lease in the row."""
    for statement in LEDGER:
        rows(statement)


class Held(Task):
    """Steps of one class each, which `act` at once."""


class Act(Held):
    """Does what it is told, synchronously. It notes each run in a file beside `path`, if that is given."""

    number: int = 0
    what: str = "done"
    path: str = ""
    policy = Policy(retry_limit=1, retry_delay=timedelta(milliseconds=20))

    async def run(self, ctx: Context) -> Done | Next[Act] | Next[Last] | Fail:
        if self.path:
            note_run(self.path)
        match self.what:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "gate":
                wait_for(self.path)
            case "suspend":
                await asyncio.sleep(0.01)
            case "next":
                return Next(Last(self.number))
            case "again":
                return Next(Act(self.number))
            case "later":
                return Next(Last(self.number), after=timedelta(milliseconds=50))
            case "enqueue":
                return Done(enqueue=[Last(self.number)] * 2)
            case "transact":
                async with ctx.transaction(isolation="repeatable_read") as connection:
                    await connection.execute("INSERT INTO effect VALUES ($1)", ctx.task_id)
            case "raise":
                raise ValueError("as told")
            case "fail":
                return Fail("as told")
        return Done()


class Together(Held):
    """The same in batches: the call does what one of its steps is told; the outcome of each is its own."""

    number: int = 0
    what: str = "done"
    path: str = ""
    policy = Policy(batch=Batch(100), retry_limit=1, retry_delay=timedelta(milliseconds=20))

    @classmethod
    async def run_batch(
        cls, steps: Sequence[Together], ctx: BatchContext
    ) -> list[Done | Next[Last] | Fail | Exception]:
        told = next((step for step in steps if step.what != "done"), steps[0])
        if told.path:
            note_run(told.path)
        match told.what:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "gate":
                wait_for(told.path)
            case "suspend":
                await asyncio.sleep(0.01)
            case "transact":
                async with ctx.transaction() as connection:
                    await connection.execute("INSERT INTO effect SELECT unnest($1::uuid[])", list(ctx.task_ids))
            case "raise":
                raise ValueError("as told")
            case "short":
                return [Done()] * (len(steps) - 1)
        return [step.outcome() for step in steps]

    def outcome(self) -> Done | Next[Last] | Fail | Exception:
        match self.what:
            case "next":
                return Next(Last(self.number))
            case "later":
                return Next(Last(self.number), after=timedelta(milliseconds=50))
            case "fail":
                return Fail("as told")
            case "error":
                return ValueError("as told")
        return Done()


class Last(Held):
    number: int

    async def run(self, ctx: Context) -> Done:
        return Done()


def note_run(path: str) -> None:
    with Path(f"{path}.runs").open("a") as file:
        file.write(f"{os.getpid()}\n")


def wait_for(path: str) -> None:
    """Block the loop until a file exists."""
    while not Path(path).exists():
        time.sleep(0.005)


def runs(path: Path) -> list[int]:
    """Return the pids of the processes that have begun a step of that path."""
    file = Path(f"{path}.runs")
    return list(map(int, file.read_text().split())) if file.exists() else []


def until_run(path: Path, times: int = 1, timeout: float = 45) -> int:
    """Wait for so many runs of the step of that path; return the pid of the last one."""
    deadline = time.monotonic() + timeout
    while len(found := runs(path)) < times:
        assert time.monotonic() < deadline, f"{len(found)} runs of {times}"
        time.sleep(0.005)
    return found[-1]


app = App(Held)
