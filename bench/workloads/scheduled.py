"""App with many schedules, of which each fires once a minute: all in one second, or spread over the minute."""

from __future__ import annotations

import os
import time

from bench.workloads.steps import Noop
from bench.workloads.worker_report import report_worker
from pgtask import App, Context, Done, Schedule, Task

__all__ = ["SCHEDULES", "app"]

SCHEDULES = "BENCH_SCHEDULES"
"""The environment variable with their number; below zero, all fire in the same second."""


class Ticks(Task):
    """One step that notes the time for which it was scheduled, and the time of its start."""


class Tick(Ticks):
    async def run(self, ctx: Context) -> Done:
        assert ctx.scheduled_for is not None
        ctx.resources.append((int(ctx.scheduled_for.timestamp()), time.time()))
        return Done()


def _schedules(number: int) -> list[Schedule]:
    return [
        Schedule(f"schedule {n}", f"{n % 60 if number > 0 else 0} * * * * *", Tick(), overlap="allow")
        for n in range(abs(number))
    ]


app = App(Noop, Ticks, lifespan=report_worker, schedules=_schedules(int(os.environ.get(SCHEDULES, "0"))))
