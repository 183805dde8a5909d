"""Schedules in memory: the clock that a test moves starts their tasks, by the rules of a worker."""

from __future__ import annotations

import importlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fix_database import run
from paths import REPOSITORY

from pgtask import App, Context, Done, Next, Schedule, Task, WorkflowContext, workflow
from pgtask.testing import MemoryClient, MemoryWorker

NIGHT = datetime(2026, 3, 27, 22, tzinfo=UTC)
HOUR = timedelta(hours=1)


class Nights(Task):
    """A night of work: it looks for the time of its schedule in both steps."""


class Plan(Nights):
    takes: timedelta = timedelta(0)

    async def run(self, ctx: Context) -> Next[Work]:
        ctx.resources.append(ctx.scheduled_for)
        return Next(Work(), after=self.takes)


class Work(Nights):
    async def run(self, ctx: Context) -> Done:
        ctx.resources.append(ctx.scheduled_for)
        return Done()


@workflow("report")
async def report(ctx: WorkflowContext, name: str) -> str:
    return f"{name} {ctx.scheduled_for}"


def worker(*schedules: Schedule, seen: list[Any] | None = None) -> MemoryWorker:
    app = App(Nights, report, schedules=schedules)
    return MemoryWorker(app, resources=seen, client=MemoryClient(now=NIGHT))


def test_schedule_starts_its_task_as_time_passes() -> None:
    async def scenario() -> None:
        seen: list[Any] = []
        nightly = Schedule("nightly", "0 3 * * *", Plan(), zone="Europe/Berlin", queue="night", priority=2)
        async with worker(nightly, seen=seen) as memory:
            await memory.run()
            assert memory.tasks == []
            await memory.run(within=timedelta(days=3))
            assert [(task.state, task.queue, task.priority) for task in memory.tasks] == [("done", "night", 2)] * 3
            nights = [datetime(2026, 3, 28, 2, tzinfo=UTC)] + [
                datetime(2026, 3, day, 1, tzinfo=UTC) for day in (29, 30)
            ]
            assert seen == [night for night in nights for _ in range(2)]
            other = await memory.client.enqueue(Plan())
            await memory.run()
            assert memory.task(other).state == "done"
            assert seen[-2:] == [None, None], "other tasks have no such time"

    run(scenario())


@pytest.mark.parametrize(("overlap", "started"), [("skip", [1, 4, 7]), ("allow", list(range(1, 10)))])
def test_overlap_leaves_times_out(overlap: Any, started: list[int]) -> None:
    async def scenario() -> None:
        seen: list[Any] = []
        hourly = Schedule("hourly", "0 * * * *", Plan(takes=2.5 * HOUR), overlap=overlap)
        async with worker(hourly, seen=seen) as memory:
            await memory.run(within=9 * HOUR)
        assert sorted({round((time - NIGHT) / HOUR) for time in seen}) == started

    run(scenario())


def test_all_waits_for_the_task_before() -> None:
    async def scenario() -> None:
        seen: list[Any] = []
        hourly = Schedule("hourly", "0 * * * *", Plan(takes=2.5 * HOUR), missed="all")
        async with worker(hourly, seen=seen) as memory:
            await memory.run(within=9 * HOUR)
        assert [round((time - NIGHT) / HOUR) for time in seen] == [1, 1, 2, 2, 3, 3, 4]

    run(scenario())


def test_program_of_the_page_on_schedules_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (REPOSITORY / "docs" / "schedules.md").read_text()
    (tmp_path / "crawling.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    crawling: Any = importlib.import_module("crawling")

    async def scenario() -> None:
        async with MemoryWorker(crawling.app, client=MemoryClient(now=NIGHT)) as memory:
            await memory.run(within=timedelta(days=7))
            names = [task.name for task in memory.tasks]
            assert (names.count("Crawl"), names.count("report")) == (7, 1)
            assert {task.state for task in memory.tasks} == {"done"}

    run(scenario())


def test_schedule_starts_a_run_in_memory() -> None:
    async def scenario() -> None:
        async with worker(Schedule("weekly", "@weekly", report, "sales")) as memory:
            await memory.run(within=timedelta(days=7))
            (status,) = await memory.client.runs(report)
            assert await memory.client.run(status.id, report).result() == "sales 2026-03-29 00:00:00+00:00"

    run(scenario())
