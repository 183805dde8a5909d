"""The workflows that the tests run. A step leaves a mark in the table `mark`, so that a second run of it would show."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from pgtask import (
    App,
    Permanent,
    Policy,
    RunFailed,
    SignalTimeout,
    StepFailed,
    Transient,
    WorkflowContext,
    workflow,
)

QUICK = Policy(retry_limit=2, retry_delay=timedelta(milliseconds=20))


async def mark(db: Any, run: UUID, step: str) -> str:
    await db.execute("INSERT INTO mark (run, step, pid) VALUES ($1, $2, $3)", run, step, os.getpid())
    return step


class Params(msgspec.Struct):
    number: int
    name: str = "x"


@dataclasses.dataclass
class Found:
    at: datetime
    id: UUID
    raw: bytes
    params: Params


async def double(number: int) -> int:
    return 2 * number


def in_thread(number: int) -> Found:
    return Found(datetime(2026, 1, 1), UUID(int=number), b"\x00\xff", Params(number))


@workflow("typed")
async def typed(ctx: WorkflowContext, params: Params) -> Found:
    """Each kind of value, through a step in a thread; user code sees the same as a replay."""
    found = await ctx.step("find", in_thread, params.number)
    assert found == in_thread(params.number)
    number = await ctx.step("double", double, params.number)
    branches = await ctx.gather(*(ctx.step(f"branch {at}", double, at) for at in range(3)))
    assert (number, branches) == (2 * params.number, [0, 2, 4])
    return found


def die_once(memory: Path) -> None:
    """End this process, unless a file says that this has been done."""
    if not memory.exists():
        memory.touch()
        os.kill(os.getpid(), signal.SIGKILL)


async def die_and_mark(memory: Path, db: Any, run: UUID, step: str) -> str:
    die_once(memory)
    return await mark(db, run, step)


@workflow("ten_steps")
async def ten_steps(ctx: WorkflowContext, kills: str) -> list[str]:
    """Each step ends its process when it begins, once: `kills` is a directory that remembers."""
    done = []
    for number in range(10):
        name = f"step {number}"
        done.append(await ctx.step(name, die_and_mark, Path(kills, str(number)), ctx.db, ctx.run_id, name))
    return done


@workflow("killed_ahead")
async def killed_ahead(ctx: WorkflowContext, kills: str) -> list[str]:
    """The function ends its process when it has the result of a step, before the commit, once for each."""
    done = []
    for number in range(3):
        done.append(await ctx.step(f"step {number}", mark, ctx.db, ctx.run_id, f"step {number}"))
        die_once(Path(kills, str(number)))
    return done


def wait_for_file(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.02)


@workflow("held")
async def held(ctx: WorkflowContext, path: str) -> str:
    """Marks, waits in a step until a file is there, marks again."""
    await ctx.step("begin", mark, ctx.db, ctx.run_id, f"begin {os.getpid()}")
    await ctx.step("wait", wait_for_file, path)
    return await ctx.step("end", mark, ctx.db, ctx.run_id, "end")


@workflow("napping")
async def napping(ctx: WorkflowContext, seconds: float) -> list[datetime]:
    before = await ctx.now()
    await ctx.sleep("nap", timedelta(seconds=seconds))
    return [before, await ctx.now()]


@workflow("asking")
async def asking(ctx: WorkflowContext, timeout: float) -> list[int] | str:
    """Wants two signals of one name."""
    try:
        return [
            await ctx.wait_for_signal("answer", int, timeout=timedelta(seconds=timeout)),
            await ctx.wait_for_signal("answer", int, timeout=timedelta(seconds=timeout)),
        ]
    except SignalTimeout as error:
        return str(error)


@workflow("either")
async def either(ctx: WorkflowContext) -> list[Any]:
    """Several calls at once, each of which waits."""
    return await ctx.gather(
        ctx.wait_for_signal("left", str),
        ctx.wait_for_signal("right", str),
        ctx.sleep("nap", timedelta(milliseconds=50)),
        ctx.step("mark", mark, ctx.db, ctx.run_id, "mark"),
    )


_failures: dict[UUID, int] = {}


async def shaky(run: UUID, failures: int) -> int:
    """Fails so often, in one process."""
    _failures[run] = _failures.get(run, 0) + 1
    if _failures[run] <= failures:
        raise Transient(f"try {_failures[run]}", retry_after=timedelta(milliseconds=20))
    return _failures[run]


@workflow("transient")
async def transient(ctx: WorkflowContext, failures: int) -> int:
    await ctx.step("before", mark, ctx.db, ctx.run_id, "before")
    tries = await ctx.step("shaky", shaky, ctx.run_id, failures)
    await ctx.step("after", mark, ctx.db, ctx.run_id, "after")
    return tries


async def refuse() -> None:
    raise Permanent("it cannot be")


def breaks(path: str) -> str:
    return Path(path).read_text()


@workflow("repairable", policy=QUICK)
async def repairable(ctx: WorkflowContext, path: str) -> str:
    await ctx.step("before", mark, ctx.db, ctx.run_id, "before")
    return await ctx.step("read", breaks, path)


@workflow("compensating", policy=QUICK)
async def compensating(ctx: WorkflowContext) -> str:
    await ctx.step("book", mark, ctx.db, ctx.run_id, "book")
    try:
        await ctx.step("pay", refuse)
    except StepFailed as error:
        await ctx.step("unbook", mark, ctx.db, ctx.run_id, "unbook")
        return f"undone: {error}"
    return "paid"


async def unstorable() -> object:
    return object()


async def mistyped() -> int:
    return "not a number"  # type: ignore[return-value]


@workflow("bad_result")
async def bad_result(ctx: WorkflowContext, which: str) -> None:
    if which == "mistyped":
        await ctx.step(which, mistyped)
    await ctx.step(which, unstorable)


@workflow("twice")
async def twice(ctx: WorkflowContext) -> None:
    await ctx.step("same", double, 1)
    await ctx.step("same", double, 1)


@workflow("swallows")
async def swallows(ctx: WorkflowContext) -> str:
    """`except Exception` around a pause."""
    try:
        return await ctx.wait_for_signal("go", str)
    except Exception as error:
        return f"swallowed {error!r}"


@workflow("stray")
async def stray(ctx: WorkflowContext) -> None:
    await asyncio.create_task(ctx.step("lost", double, 1))


@workflow("child")
async def child(ctx: WorkflowContext, number: int) -> int:
    if number < 0:
        raise Permanent("a negative number")
    return await ctx.step("double", double, number)


@workflow("parent")
async def parent(ctx: WorkflowContext, number: int) -> list[int]:
    children = await ctx.spawn_many("children", child, range(number))
    found: list[int] = await ctx.results(children)
    return found


@workflow("disappointed")
async def disappointed(ctx: WorkflowContext) -> str:
    good = await ctx.spawn("good", child, 4)
    bad = await ctx.spawn("bad", child, -1)
    try:
        await bad
    except RunFailed as error:
        return f"{await good} {error.error}"
    return "no"


@workflow("patient")
async def patient(ctx: WorkflowContext) -> int:
    """Spawns a child that waits, which spawns another."""
    inner = await ctx.spawn("inner", waiting, 1)
    return await inner


@workflow("waiting")
async def waiting(ctx: WorkflowContext, depth: int) -> int:
    if depth:
        return await (await ctx.spawn("inner", waiting, depth - 1))
    return await ctx.wait_for_signal("go", int)


@workflow("values")
async def values(ctx: WorkflowContext) -> list[Any]:
    before = [await ctx.now(), await ctx.random(), await ctx.uuid(), ctx.idempotency_key("pay")]
    await ctx.step("before", mark, ctx.db, ctx.run_id, str(before))
    await ctx.wait_for_signal("go")
    return before


OLD = "PGTASK_TEST_OLD"
"""Set in the environment of a fleet that has the code of an earlier deploy."""

if os.environ.get(OLD):

    @workflow("changing")
    async def changing(ctx: WorkflowContext) -> str:
        await ctx.step("a", double, 1)
        await ctx.wait_for_signal("go")
        await ctx.step("b", double, 1)
        return f"old {ctx.version}"

    @workflow("reordered")
    async def reordered(ctx: WorkflowContext) -> str:
        await ctx.step("a", double, 1)
        await ctx.step("b", double, 1)
        await ctx.wait_for_signal("go")
        return "old"

    changing_flows = [changing]

else:

    @workflow("changing", version=3, since=2)
    async def changing(ctx: WorkflowContext) -> str:
        await ctx.step("new", double, 1)
        await ctx.wait_for_signal("go")
        return f"new {ctx.version}"

    @workflow("changing", version=1)
    async def changing_1(ctx: WorkflowContext) -> str:
        await ctx.step("a", double, 1)
        await ctx.wait_for_signal("go")
        await ctx.step("b", double, 1)
        return f"still old {ctx.version}"

    @workflow("reordered")
    async def reordered(ctx: WorkflowContext) -> str:
        await ctx.step("b", double, 1)
        await ctx.step("a", double, 1)
        await ctx.wait_for_signal("go")
        return "new"

    changing_flows = [changing, changing_1]

_FLOWS = (typed, ten_steps, held, napping, asking, either, transient, repairable, compensating, bad_result, twice)
_MORE = (killed_ahead, swallows, stray, child, parent, disappointed, patient, waiting, values, reordered)
app = App(*_FLOWS, *_MORE, *changing_flows)
